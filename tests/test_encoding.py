"""Embedding goes the way of a prediction: full chunks, one behind the device, within the memory plan, whatever fails."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import Say
from on_device import GPU, no_waiting
from processes import run_process
from test_embed import damaged_tiff, noise
from test_out_of_memory import narrow
from torch import Tensor

from keyhole.config.settings import Config, ModelConfig, PatchConfig, RunConfig
from keyhole.data.item import Item
from keyhole.engine import Engine
from keyhole.engine.embedding import Embedding, End, Rows, encoder_alone
from keyhole.engine.memory.meter import has_peak
from keyhole.engine.memory.plan import Plan
from keyhole.engine.opening import opener
from keyhole.inference.embed import Embedded, embed
from keyhole.nn import SmallEncoder
from keyhole.patches.image_cache import ImageCache

CPU = torch.device("cpu")
SIDES = ((64, 64), (96, 80), (16, 16), (160, 48), (48, 48))
COUNTS = [16, 30, 1, 30, 9]
"""Patches of 16 px of images of these sides. No call gets two of them, which is what the trial of a new copy gets."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of other sizes each; do not change them."""
    folder = tmp_path_factory.mktemp("images")
    for number, (width, height) in enumerate(SIDES):
        noise(folder / f"{number}.png", width, height, number)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Patches of each call of an encoder `small`; a copy is tried on two when it is built."""
    found, right = [], SmallEncoder.embed

    def embed_(self: SmallEncoder, patches: Tensor) -> Tensor:
        found.append(len(patches))
        return right(self, patches)

    monkeypatch.setattr(SmallEncoder, "embed", embed_)
    return found


def run(data: Path, out: Path, weights: Path, size: int = 16, **options: Any) -> Embedded:
    settings = {"encoder": "small", "width": 8, "weights": weights, "patch": PatchConfig(size=size)}
    return embed(data, out, **settings | {"threads": 2, "quiet": True} | options)


def features(done: Embedded) -> dict[str, Any]:
    found = {}
    for name, path in sorted(done.files.items()):
        with h5py.File(path) as file:
            found[name] = file["features"][()]
    return found


def same(one: Embedded, other: Embedded, **tolerance: float) -> None:
    found, expected = features(one), features(other)
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], **{"rtol": 0, "atol": 1e-5} | tolerance)


def encoding(encoder: SmallEncoder, files: list[Path], chunk: int, **options: Any) -> Iterator[Rows | End]:
    """What an encoding of images tells, in chunks of a size."""
    model = encoder_alone(encoder, encoder.dim)
    config = Config(patch=PatchConfig(size=16), model=ModelConfig(encoder="small", width=8))
    openers = [opener(config, ImageCache(), Item(path.name, path, {})) for path in files]
    with closing(Engine(model, run=RunConfig(threads=2), plan=Plan(chunk), warn=print)) as engine:
        yield from Embedding(engine, **options)(openers)


# How many patches go through the encoder together


def test_as_on_a_gpu_all_calls_have_one_size_and_images_share_them(
    encoder: SmallEncoder, images: Path, weights: Path, tmp_path: Path, calls: list[int]
) -> None:
    expected = features(run(images, tmp_path / "one", weights))
    calls.clear()
    files = [images / name for name in expected]
    told = [
        (each.number, each.embedding().copy() if isinstance(each, Rows) else None)
        for each in encoding(encoder, files, 16, together=3, whole=True)
    ]
    sizes = [size for size in calls if size != 2]
    assert sizes == [16] * (-(-sum(COUNTS[:3]) // 16) + -(-sum(COUNTS[3:]) // 16)), "6, not 7 for each by itself"
    assert [number for number, rows in told if rows is None] == [*range(5)], "every image ends, in order"
    assert [number for number, _ in told] == sorted(number for number, _ in told)
    for (number, group), rows in zip(itertools.groupby(told, key=lambda each: each[0]), expected.values(), strict=True):
        found = np.concatenate([each for _, each in group if each is not None])
        np.testing.assert_allclose(found, rows, atol=1e-5, err_msg=str(number))


def test_on_a_cpu_features_do_not_depend_on_the_other_images(images: Path, weights: Path, tmp_path: Path) -> None:
    together = features(run(images, tmp_path / "all", weights))
    for name, rows in together.items():
        alone = features(run(images / name, tmp_path / f"of {name}", weights))
        np.testing.assert_array_equal(alone[name], rows)


# One chunk behind the device


@pytest.mark.parametrize("together", [1, 3])
def test_a_chunk_is_handed_out_when_the_next_has_been_launched(
    encoder: SmallEncoder, images: Path, calls: list[int], together: int
) -> None:
    seen, rows = [], 0
    for each in encoding(encoder, sorted(images.iterdir()), 8, together=together):
        if isinstance(each, Rows):
            rows += len(each.index)
            seen.append((sum(size for size in calls if size != 2), rows))
    assert seen[-1] == (sum(COUNTS), sum(COUNTS))
    behind = [launched > handed for launched, handed in seen]
    assert all(behind[:-1]), "also across the border of two batches"


# Out of memory


def test_out_of_memory_halves_the_chunk_and_changes_no_feature(
    images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int], say: Say
) -> None:
    expected = run(images, tmp_path / "expected", weights)
    counted, calls[:] = SmallEncoder.embed, []

    def narrow_embed(self: SmallEncoder, patches: Tensor) -> Tensor:
        found = counted(self, patches)
        if len(patches) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(SmallEncoder, "embed", narrow_embed)
    line = ["embed", images, "--out", tmp_path / "out", "--encoder", "small", "--width", "8", "--weights", weights]
    done = say(*line, "--patch.size", "16", "--chunk", "32")
    assert done.code == 0, done.all
    assert done.all.count("out of memory; going on with less at a time") == 2, "32, 16, 8"
    assert [size for size in calls if size > 8] == [16, 16], "the first image has 16 patches"
    same(run(images, tmp_path / "out", weights), expected)


def test_without_room_to_stage_or_encode_one_patch_one_line_says_what_to_do(
    images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    expected = run(images, tmp_path / "expected", weights)
    narrow(monkeypatch, 4)
    same(run(images, tmp_path / "staged", weights), expected)
    narrow(monkeypatch, 0)
    line = ["embed", images, "--out", tmp_path / "out", "--encoder", "small", "--width", "8", "--weights", weights]
    done = say(*line, "--patch.size", "16")
    assert done.code == 2
    last = done.all.strip().splitlines()[-1]
    assert "even with the smallest plan" in last
    assert last.endswith("raise --memory, or lower --patch.size or the encoder's size")
    assert not list((tmp_path / "out").glob("*.h5"))


@pytest.mark.skipif(not has_peak(), reason="needs the peak of resident memory")
def test_a_budget_is_kept_by_encoding_less_at_a_time(weights: Path, tmp_path: Path, calls: list[int], say: Say) -> None:
    noise(tmp_path / "data" / "0.png", 2048, 2048)
    expected = run(tmp_path / "data", tmp_path / "expected", weights, 256)
    assert max(calls) == 64
    calls.clear()
    line = ["embed", tmp_path / "data", "--encoder", "small", "--width", "8", "--weights", weights]
    done = say(*line, "--patch.size", "256", "--memory", "600kB", "--out", tmp_path / "out")
    assert done.code == 2
    assert done.all.startswith("keyhole: error: --memory: 600 kB is too little"), done.all
    assert "--model" not in done.all
    assert "--select" not in done.all
    ended = run_process("embed_within_budget", tmp_path / "out", tmp_path / "data", weights, 150 * 2**20)
    done = json.loads(ended.stdout)
    assert done["code"] == 0, done["said"]
    assert done["peak"] <= done["budget"]
    assert "less at a time" not in done["said"], "it was planned, not tried"
    size = done["calls"][-1]
    assert done["calls"][-64 // size :] == [size] * (64 // size) != [64]
    same(run(tmp_path / "data", tmp_path / "out", weights, 256), expected)


# What fails among images that share chunks


def damaged_everywhere(path: Path) -> Path:
    """A TIFF of four tiles of 32 px of which none decodes."""
    damaged_tiff(path, 64, tiles=range(4))
    return path


def test_images_that_fail_take_nothing_from_those_around_them(
    encoder: SmallEncoder, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes((images / "1.png").read_bytes()[:400])
    hole = damaged_tiff(tmp_path / "hole.tif", 160)
    lost = damaged_everywhere(tmp_path / "lost.tif")
    files = [images / "0.png", tmp_path / "broken.png", images / "1.png", hole, lost, images / "4.png"]
    told = list(encoding(encoder, files, 16, together=6, whole=True))
    ends = [each for each in told if isinstance(each, End)]
    assert [end.number for end in ends] == [*range(6)]
    assert [end.failed is None for end in ends] == [True, False, True, True, False, True]
    rows = {
        number: sum(len(each.index) for each in told if isinstance(each, Rows) and each.number == number)
        for number in range(6)
    }
    assert rows == {0: 16, 1: 0, 2: 30, 3: 96, 4: 0, 5: 9}
    assert len(ends[3].unreadable) == 4
    assert "none of its 16 patches can be read" in str(ends[4].failed)


# On a GPU


@pytest.mark.cuda
def test_features_of_a_gpu_are_those_of_the_cpu(images: Path, weights: Path, tmp_path: Path) -> None:
    expected = run(images, tmp_path / "cpu", weights, device="cpu")
    found = run(images, tmp_path / "cuda", weights, device=str(GPU))
    same(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_encoding_on_a_gpu_waits_for_nothing_but_the_chunk_before(encoder: SmallEncoder, images: Path) -> None:
    device = GPU
    model = encoder_alone(SmallEncoder(3, 8).eval().to(device), encoder.dim)
    engine = Engine(model, run=RunConfig(threads=2), plan=Plan(8), warn=print)
    engine.encoders.fast(torch.zeros(8, 16, 16, 3, dtype=torch.uint8, device=device))
    config = Config(patch=PatchConfig(size=16), model=ModelConfig(encoder="small", width=8))
    files = sorted(images.iterdir()) * 4
    openers = [opener(config, ImageCache(), Item(path.name, path, {})) for path in files]
    with closing(engine):
        told = Embedding(engine)(openers)
        counts = [len(next(told).embedding())]  # before that it is decided whether to compile
        with no_waiting():
            counts += [len(each.embedding()) for each in told if isinstance(each, Rows)]
    assert sum(counts) == 4 * sum(COUNTS)
