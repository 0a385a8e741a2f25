"""Laws of chunks on their way to the device: the same pixels in order, in one shape, and no buffer used too early."""

from __future__ import annotations

import io
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from make_images import picture, write_tiff
from on_device import DRY, GPU, no_waiting
from test_reading import PATIENCE, Opener, Probe, eventually, no_thread_is_left, openers
from torch import Tensor

from keyhole.config.settings import RunConfig
from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import Plan
from keyhole.engine.opening import open_reader
from keyhole.engine.to_device import Stager, prefetched
from keyhole.loading import Delivery, Reader
from keyhole.loading.chunks import Chunk, Coded
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import TensorPatches, View

__all__ = ["no_thread_is_left"]  # a fixture that every test here uses

CPU = torch.device("cpu")
IN_ONE_PART = Pace(Plan(chunk=2**20))
"""Chunks come in one part."""
DEVICES = [CPU, pytest.param(GPU, marks=pytest.mark.cuda)]


def test_on_a_cpu_the_buffer_itself_is_what_is_encoded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    with Reader(1, stall=PATIENCE) as reader:
        for batch in reader.stream([[Opener("a", lambda: TensorPatches(pixels))]], 4):
            counts = []
            for chunk, tensor in prefetched(batch.chunks(), Stager(CPU), IN_ONE_PART):
                assert tensor.data_ptr() == chunk.pixels.ctypes.data
                assert (tensor.dtype, tensor.shape) == (torch.uint8, (4, 4, 4, 3))
                np.testing.assert_array_equal(tensor[: chunk.count], pixels[chunk.index])
                assert not tensor[chunk.count :].any()
                counts.append(chunk.count)
            assert counts == [4, 4, 1]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_of_any_kind_arrive_as_float32(dtype: type, device: torch.device) -> None:
    features = np.random.default_rng(0).normal(size=(50, 7)).astype(dtype)
    with open_reader(RunConfig(), device) as reader:
        for batch in reader.stream([[Opener("a", lambda: TensorPatches(features))]], 16):
            for chunk, tensor in prefetched(batch.chunks(), Stager(device), IN_ONE_PART):
                assert tensor.dtype == torch.float32
                expected = features[chunk.index].astype(np.float32)
                np.testing.assert_array_equal(tensor.cpu()[: chunk.count], expected)


def test_a_buffer_is_not_filled_again_before_its_copy_is_done() -> None:
    waited_for, copied = threading.Event(), threading.Event()

    def wait() -> None:
        waited_for.set()
        assert copied.wait(PATIENCE)

    with Reader(2, ahead=1, stall=PATIENCE) as reader:
        probes = [Probe("a", n=40), Probe("b", n=40)]
        index: list[int] = []
        for batch in reader.stream([openers(probe) for probe in probes], 4):
            for chunk in batch.chunks():
                index += chunk.index.tolist()
                if len(index) == 4:
                    first, before = chunk.pixels, chunk.pixels.copy()
                    chunk.copied = wait
                elif len(index) == 12:  # the third of three buffers: the first is wanted again
                    assert waited_for.wait(5)
                    np.testing.assert_array_equal(first, before)
                    copied.set()
        assert index == [*range(40)] * 2
        assert not np.array_equal(first, before), "it was used again in the end"


def test_the_next_stream_waits_for_copies_of_the_last() -> None:
    copied, taken = threading.Event(), []

    def wait() -> None:
        taken.append(1)
        assert copied.wait(PATIENCE)

    with Reader(1, ahead=1, stall=PATIENCE) as reader:
        for batch in reader.stream([openers(Probe(n=12))], 4):
            shown = []
            for chunk in batch.chunks():
                chunk.copied = wait
                shown.append((chunk.pixels, chunk.pixels.copy()))
        probe = Probe("next", n=12)
        stream = reader.stream([openers(probe)], 4)
        batch = next(stream)
        assert eventually(lambda: bool(taken))
        for pixels, before in shown:
            np.testing.assert_array_equal(pixels, before)
        copied.set()
        assert sum(chunk.count for chunk in batch.chunks()) == 12


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_what_came_encoded_is_turned_on_the_device_as_the_reader_turns_it(device: torch.device) -> None:
    pytest.importorskip("torchvision")
    pixels, streams = [], []
    for seed in range(16):
        data = io.BytesIO()
        PIL.Image.fromarray(picture(3, 16, 16, seed)).save(data, "JPEG", quality=95, subsampling=0)
        streams.append(data.getvalue())
        pixels.append(np.asarray(PIL.Image.open(data)))
    views = [View(bool(n & 1), bool(n & 2), n >> 2) for n in range(16)]
    buffer = np.zeros((20, 16, 16, 3), np.uint8)
    encoded = {row + 2: Coded(stream, view) for row, (stream, view) in enumerate(zip(streams, views, strict=True))}
    buffer[:2] = 7
    chunk = Chunk(buffer, 18, np.zeros(18, np.int64), np.arange(18), encoded)
    stager = Stager(device, encoded=True)
    if stager.deliver is None:
        pytest.skip(f"no decoder on the device: {stager.note}")
    tensor = stager(chunk).cpu().numpy().astype(int)
    assert (tensor[:2] == 7).all()
    assert not tensor[18:].any()
    for row, (block, view) in enumerate(zip(pixels, views, strict=True)):
        expected = view.pixels(block[None])[0].astype(int)
        assert np.abs(tensor[row + 2] - expected).mean() <= (1 if device.type == "cpu" else 2)


# On a GPU.


@pytest.fixture
def decoding() -> tuple[Stager, Delivery]:
    """A stager with a decoder on the GPU, and what delivers every tile to it."""
    stager = Stager(GPU, encoded=True)
    if stager.deliver is None:
        pytest.skip(f"no decoder on the device: {stager.note}")
    return stager, Delivery(stager.deliver.colors, always=True)


def on_gpu(pixels: Tensor) -> Tensor:
    """Work that takes the device far longer than copying does, and its result: a sum for each patch."""
    for _ in range(20):
        pixels.float().square().sum()
    return pixels.flatten(1).sum(1)


@pytest.mark.cuda
def test_every_chunk_arrives_whole_and_in_order_while_the_device_is_behind() -> None:
    device = GPU
    arrays = [np.random.default_rng(n).integers(0, 256, (700, 64, 64, 3), dtype=np.uint8) for n in range(3)]
    stager, sums, places = Stager(device), [], []
    with no_waiting(), open_reader(RunConfig(), device) as reader:
        for _ in range(3):
            lists = [[Opener(str(n), lambda array=array: TensorPatches(array))] for n, array in enumerate(arrays)]
            for number, batch in enumerate(reader.stream(lists, 128)):
                for chunk, pixels in prefetched(batch.chunks(), stager, IN_ONE_PART):
                    assert pixels.shape == (128, 64, 64, 3)
                    places.append(pixels.data_ptr())
                    sums.append((number, chunk.index, on_gpu(pixels)))
        assert DRY or len(set(places)) == 2, "two buffers for all batches and epochs"
    for number, index, result in sums:
        expected = arrays[number][index].reshape(len(index), -1).sum(1, dtype=np.int64)
        np.testing.assert_array_equal(result.cpu()[: len(index)], expected)
        assert not result.cpu()[len(index) :].any()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["rgb", "4:4:4", "4:2:0"])
def test_tiles_decoded_on_a_gpu_are_nearly_those_of_the_host(
    decoding: tuple[Stager, Delivery], tmp_path: Path, kind: str
) -> None:
    stager, deliver = decoding
    options: dict[str, Any] = {"subsampling": (1, 1) if kind == "4:4:4" else (2, 2)}
    if kind == "rgb":
        options = {"compressionargs": {"outcolorspace": "rgb"}}
    path = write_tiff(tmp_path / "tiles.tif", picture(3, 1024, 512), tile=(64, 64), compression="jpeg", **options)
    opener = FileOpener(path, kind, 64, view=View(turns=1))
    with closing(opener()) as source:
        expected = source.read(slice(None)).astype(int)
    found = np.zeros_like(expected)
    with open_reader(RunConfig(), GPU) as reader:
        for batch in reader.stream([[opener]], 48, deliver=deliver):
            for chunk, pixels in prefetched(batch.chunks(), stager, IN_ONE_PART):
                found[chunk.index] = pixels.cpu().numpy()[: chunk.count]
        delivered = (kind if kind == "rgb" else "ycbcr") in deliver.colors
        assert reader.encoded_patches == (len(expected) if delivered else 0)
    # At edges of colour decoders differ where a JPEG holds less colour than brightness: libjpeg interpolates it, and
    # nvJPEG, as torchvision calls it, repeats it. That alone is a mean of 8.5 levels in this picture. Brightness agrees.
    brightness = np.array([0.299, 0.587, 0.114])
    assert np.abs((found - expected) @ brightness).mean() <= 3
    assert np.abs(found - expected).mean() <= (12 if kind == "4:2:0" else 2)
    assert stager.refused == 0


@pytest.mark.cuda
def test_a_gpu_that_waits_for_patches_decodes_some_of_them(decoding: tuple[Stager, Delivery], tmp_path: Path) -> None:
    stager, _ = decoding
    path = write_tiff(tmp_path / "tiles.tif", picture(3, 2048, 2048), tile=(64, 64), compression="jpeg")
    with open_reader(RunConfig(), GPU) as reader:
        for batch in reader.stream([[FileOpener(path, "tiles", 64)]] * 3, 64, deliver=stager.deliver):
            assert sum(chunk.count for chunk, _ in prefetched(batch.chunks(), stager, IN_ONE_PART)) == 32 * 32
        assert reader.encoded_patches > 0
    assert not stager.refused


@pytest.mark.cuda
def test_a_tile_that_the_gpu_refuses_is_named_by_the_host(decoding: tuple[Stager, Delivery], tmp_path: Path) -> None:
    from test_encoded import break_quietly

    stager, deliver = decoding
    whole = write_tiff(tmp_path / "whole.tif", picture(3, 256, 256), tile=(64, 64), compression="jpeg")
    bad = FileOpener(break_quietly(tmp_path / "bad.tif", whole, [5]), "bad", 64)
    with open_reader(RunConfig(), GPU) as reader:
        for batch in reader.stream([[bad]], 8, "mask", deliver=deliver):
            seen = [
                index for chunk, _ in prefetched(batch.chunks(), stager, IN_ONE_PART) for index in chunk.index.tolist()
            ]
            assert len(seen) == 16 or (set(batch.unreadable[0]) == {5} and len(seen) == 15)
            assert (stager.refused > 0) == (len(seen) == 15)
