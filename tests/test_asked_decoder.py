"""A device's JPEG decoder is made and tried when a file has JPEG for it, and not before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import settings
from test_encoded import COLUMNS, CPU, ROWS, TILE, always, files
from test_reading import PATIENCE, no_thread_is_left

import keyhole
from keyhole.engine import to_device as staging
from keyhole.engine.jpeg import decodes
from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import Plan
from keyhole.engine.to_device import Stager, prefetched
from keyhole.loading import Reader
from keyhole.patches.opener import FileOpener

__all__ = ["files", "no_thread_is_left"]  # fixtures


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
