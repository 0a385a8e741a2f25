"""Where JPEG is decoded: on the device when a file has it, and by the reading threads where `run.decode` is cpu."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Say, settings
from on_device import GPU
from test_encoded import COLUMNS, ROWS, TILE, always, files
from test_reading import PATIENCE, no_thread_is_left

import keyhole
from keyhole.config.settings import Decode, ModelConfig, RunConfig
from keyhole.engine import Engine
from keyhole.engine import to_device as staging
from keyhole.engine.jpeg import Decoder, decodes
from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import Plan
from keyhole.engine.to_device import Stager, prefetched
from keyhole.errors import ConfigError
from keyhole.inference.embed import embed
from keyhole.loading import Delivery, Reader
from keyhole.nn import build_classifier
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import View
from keyhole.tasks.kinds import Task

__all__ = ["files", "no_thread_is_left"]  # fixtures

pytest.importorskip("torchvision", reason="torchvision decodes JPEG for devices")
CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(GPU, marks=pytest.mark.cuda)]
faithful = Decoder.__call__


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU may decode what comes as JPEG, as a GPU may, and its decoder is off by one level."""

    def off_by_one(self: Decoder, streams: Sequence[bytes], channels: int) -> torch.Tensor:
        return faithful(self, streams, channels) + 1

    monkeypatch.setattr(staging, "may_decode", lambda _device: True)
    monkeypatch.setattr(Decoder, "__call__", off_by_one)


def stager_of(decode: Decode, device: torch.device) -> Stager:
    """The stager of a run."""
    model = build_classifier(
        ModelConfig(encoder="small", width=4, heads=2), [Task("a", "binary", ("no", "yes"))], TILE
    ).to(device)
    return Engine(model, run=RunConfig(decode=decode)).stager


@pytest.mark.usefixtures("decoding")
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_pixels_looked_at_are_those_learned_from(files: dict[str, Path], device: torch.device) -> None:
    stager = stager_of("cpu", device)
    opener = FileOpener(files["4:2:0"], "tiles", TILE, view=View(flip_x=True, turns=1))
    with Reader(2, stall=PATIENCE) as reader:
        for batch in reader.stream([[opener]] * 2, 16, deliver=stager.deliver):
            looked: dict[int, np.ndarray] = {}
            for chunk, pixels in prefetched(batch.chunks(), stager, Pace(Plan(chunk=2**20))):
                looked |= zip(chunk.index.tolist(), pixels.cpu().numpy().copy(), strict=False)
            (learned,) = batch.fetch([np.arange(ROWS * COLUMNS)])
            np.testing.assert_array_equal(np.stack([looked[index] for index in range(ROWS * COLUMNS)]), learned)
        assert reader.encoded_patches == 0


@pytest.fixture
def delivered(monkeypatch: pytest.MonkeyPatch) -> list[Delivery | None]:
    """What every stream is told that it may deliver as JPEG."""
    told: list[Delivery | None] = []
    stream = Reader.stream

    def note(
        self: Reader, batches: Any, chunk: int, on_error: Any = "raise", hold: int = 0, deliver: Any = None
    ) -> Any:
        told.append(deliver)
        return stream(self, batches, chunk, on_error, hold, deliver)

    monkeypatch.setattr(Reader, "stream", note)
    return told


@pytest.mark.usefixtures("decoding")
@pytest.mark.parametrize("decode", ["auto", "cpu"])
def test_training_evaluating_predicting_and_embedding_leave_jpeg_to_the_cpu_where_asked_to(
    files: dict[str, Path], tmp_path: Path, say: Say, delivered: list[Delivery | None], decode: Any
) -> None:
    for name, label in (("4:2:0", "a"), ("rgb", "b")):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(6):
            shutil.copy(files[name], tmp_path / "data" / label / f"{number}.tif")
    small = settings(patch={"size": TILE}, train={"epochs": 1})
    image, answers = tmp_path / "data" / "a" / "0.tif", tmp_path / "answers"

    def jpeg() -> bool:
        """Whether the streams since the last call were to deliver JPEG."""
        (told,) = {each is not None for each in delivered}
        delivered.clear()
        return told

    run = keyhole.train(tmp_path / "data", tmp_path / "run", **small | {"run": {"threads": 2, "decode": decode}}).path
    assert jpeg() == (decode == "auto")
    for words in (("predict", run, image, "--out", answers), ("evaluate", run, "--out", tmp_path / "evaluation")):
        assert say(*words, "--decode", decode)[0] == 0
        assert jpeg() == (decode == "auto")
    embed(tmp_path / "data", tmp_path / "features", run=run, decode=decode, quiet=True)
    assert jpeg() == (decode == "auto")


@pytest.mark.usefixtures("decoding")
def test_a_gpu_takes_part_unless_it_is_told_not_to() -> None:
    assert stager_of("auto", CPU).deliver is not None
    assert stager_of("cpu", CPU).deliver is None


def test_another_word_is_refused(toy_run: Path) -> None:
    with pytest.raises(ConfigError, match="decode gpu: expected auto or cpu"):
        keyhole.load(toy_run, decode="gpu")  # type: ignore[arg-type]


# A device's decoder is made and tried when a file has JPEG for it, and not before


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The CPU may decode what comes as JPEG, as a GPU may; every trial of its decoder is noted."""
    tried: list[torch.device] = []

    def note(device: torch.device) -> tuple[frozenset[str], str]:
        tried.append(device)
        return decodes(device)

    monkeypatch.setattr(staging, "may_decode", lambda _device: True)
    monkeypatch.setattr(staging, "decodes", note)
    return tried


def test_images_without_jpeg_need_no_decoder(toy: Path, tmp_path: Path, trials: list[torch.device]) -> None:
    keyhole.train(toy, tmp_path / "run", **settings(train={"epochs": 1}))
    assert trials == []


def test_the_first_jpeg_asks_for_the_decoder_and_those_behind_it_come_encoded(
    files: dict[str, Path], trials: list[torch.device]
) -> None:
    stager = Stager(CPU)
    pace, chunk = Pace(Plan(8), print), 8
    unaligned = FileOpener(files["4:2:0"], "unaligned", TILE, offset=(5, 0))
    with Reader(1, ahead=1, stall=PATIENCE) as reader:
        for batch in reader.stream([[unaligned]], chunk, deliver=always(stager)):
            assert not [part for part, _ in prefetched(batch.chunks(), stager, pace) if part.encoded]
        assert trials == []
        seen, encoded = [], []
        for batch in reader.stream([[FileOpener(files["4:2:0"], "aligned", TILE)]] * 2, chunk, deliver=always(stager)):
            for part, _ in prefetched(batch.chunks(), stager, pace):
                seen += part.index.tolist()
                encoded.append(len(part.encoded))
        assert trials == [CPU]
        assert encoded[0] == 0, "nothing was known before"
        assert encoded[-2] > 0
        assert sorted(seen) == sorted([*range(ROWS * COLUMNS)] * 2)
        stager = Stager(CPU)
        for batch in reader.stream([[FileOpener(files["4:2:0"], "host", TILE)]], chunk):
            list(prefetched(batch.chunks(), stager, pace))
        assert trials == [CPU], "nothing may come as JPEG, so nothing asks"
