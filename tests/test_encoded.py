"""Laws of JPEG tiles that leave the file as they are: any decoder makes of them the pixels that the reader gives."""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_images import picture, write_tiff
from on_device import GPU
from PIL import Image
from test_damage import damage
from test_reading import PATIENCE, Opener, eventually, no_thread_is_left

from keyhole.config.settings import ModelConfig, SelectConfig
from keyhole.engine import Engine
from keyhole.engine.jpeg import TRIED_DECODERS, Decoder, decodes
from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import Plan
from keyhole.engine.to_device import Stager, prefetched
from keyhole.errors import ImageError
from keyhole.images.jpeg import COLORS, segments, stored_colors
from keyhole.images.tiff_file import BLOCK
from keyhole.loading import Batch, Delivery, Reader
from keyhole.loading.reading import PATCHES_BETWEEN_LOOKS
from keyhole.nn import build_classifier
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import FilePatches, PatchSource, View
from keyhole.tasks.kinds import Task

pytest.importorskip("torchvision", reason="torchvision decodes JPEG for devices")
__all__ = ["no_thread_is_left"]  # a fixture that every test here uses

CPU = torch.device("cpu")
IN_ONE_PART = Pace(Plan(chunk=2**20))
"""Chunks come in one part."""
TILE, WIDTH, HEIGHT = 32, 200, 136
COLUMNS, ROWS, WHOLE = 7, 5, 6 * 4
"""Tiles of the files, and how many of them lie wholly inside."""
ROUNDING = 1
"""Levels that decoders may differ by; libjpeg's two bindings here have been seen to agree in every bit."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "4:2:0": ("ycbcr", {"subsampling": (2, 2)}),
    "4:2:2": ("ycbcr", {"subsampling": (2, 1)}),
    "4:4:4": ("ycbcr", {"subsampling": (1, 1)}),
    "rgb": ("rgb", {"compressionargs": {"outcolorspace": "rgb"}}),
    "grey": ("grey", {}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoded")
    found = {}
    for name, (color, options) in KINDS.items():
        pixels = picture(1 if color == "grey" else 3, WIDTH, HEIGHT)
        path = folder / f"{name.replace(':', '')}.tif"
        found[name] = write_tiff(path, pixels.squeeze(), tile=(TILE, TILE), compression="jpeg", **options)
    return found


@pytest.fixture
def opened() -> Iterator[Any]:
    """Sources that are closed at the end."""
    made: list[FilePatches] = []

    def make(path: Path, size: int = TILE, **options: Any) -> FilePatches:
        made.append(FileOpener(path, path.name, size, **options)())
        return made[-1]

    yield make
    for source in made:
        source.close()


def check_streams(source: FilePatches, expected: int, colors: frozenset[str] = COLORS) -> None:
    """So many patches can be had as JPEG, and decoded elsewhere they are what the reader gives."""
    streams = source.encoded(slice(None), colors) or []
    rows = [row for row, stream in enumerate(streams) if stream is not None]
    assert len(rows) == expected
    if rows:
        decoded = Decoder(CPU)([stream for stream in streams if stream], source.channels).numpy()
        difference = np.abs(source.view.pixels(decoded).astype(int) - source.read(rows))
        assert difference.max() <= ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_decode_elsewhere_as_here(files: dict[str, Path], opened: Any, kind: str) -> None:
    source = opened(files[kind])
    assert len(source) == ROWS * COLUMNS
    check_streams(source, WHOLE)
    check_streams(source, WHOLE, frozenset([KINDS[kind][0]]))
    check_streams(source, 0, COLORS - {KINDS[kind][0]})


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_the_page_says_what_the_colours_are_where_the_tile_does_not(
    files: dict[str, Path], tmp_path: Path, opened: Any, photometric: str
) -> None:
    """As Aperio stores them: no JFIF header and no marker of Adobe's in the tiles, tables in the page."""
    with tifffile.TiffFile(files["rgb" if photometric == "rgb" else "4:2:0"]) as tif:
        page = tif.pages.first
        tiles, pages_tables = [], b""
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            tif.filehandle.seek(offset)
            data = tif.filehandle.read(count)
            parts = segments(data)
            assert parts is not None
            rest = data[2 + sum(len(body) for _, body in parts) :]
            tables = b"".join(body for marker, body in parts if marker in (0xDB, 0xC4))
            pages_tables = b"\xff\xd8" + tables + b"\xff\xd9"
            frame, scan = bytearray(next(body for marker, body in parts if marker == 0xC0)), bytearray(rest)
            frame[10:19:3] = scan[5:11:2] = b"\0\1\2"  # numbers of the samples that say nothing of colours
            tiles.append(b"\xff\xd8" + bytes(frame) + bytes(scan))
    path = tmp_path / "aperio.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter(tiles), shape=(HEIGHT, WIDTH, 3), dtype="uint8", tile=(TILE, TILE), compression="jpeg", metadata=None,
            photometric=photometric, jpegtables=pages_tables, **KINDS["rgb" if photometric == "rgb" else "4:2:0"][1],
        )  # fmt: skip
    with tifffile.TiffFile(path) as tif:
        assert tif.pages.first.jpegtables is not None
        assert not tif.pages.first.is_jfif
        assert tif.pages.first.photometric.name.lower() == photometric
    check_streams(opened(path), WHOLE, frozenset([photometric]))


def test_a_real_slide(shared: Path, opened: Any) -> None:
    source = opened(shared / "data" / "slides" / "CMU-1-Small-Region.svs", 240)
    check_streams(source, 9 * 12, frozenset(["rgb"]))


def test_only_patches_that_are_whole_tiles_come_encoded(files: dict[str, Path], tmp_path: Path, opened: Any) -> None:
    path = files["4:2:0"]
    check_streams(opened(path, stride=16), WHOLE)
    check_streams(opened(path, offset=(TILE, 2 * TILE)), 5 * 2)
    check_streams(opened(path, offset=(-TILE + 1, 0)), 0)
    assert opened(path, 16).encoded([0], COLORS) is None
    assert opened(path, channels=1).encoded([0], COLORS) is None
    deflate = write_tiff(tmp_path / "deflate.tif", picture(3, 64, 64), tile=(TILE, TILE), compression="deflate")
    assert opened(deflate).encoded([0], COLORS) is None
    strips = write_tiff(tmp_path / "strips.tif", picture(3, 64, 64), rowsperstrip=TILE, compression="jpeg")
    assert opened(strips).encoded([0], COLORS) is None


def test_a_tile_that_is_missing_cut_off_or_of_another_size_stays_with_the_reader(
    files: dict[str, Path], tmp_path: Path, opened: Any
) -> None:
    path = tmp_path / "odd.tif"
    shutil.copy(files["4:2:0"], path)
    small = write_tiff(tmp_path / "small.tif", picture(3, 16, 16), tile=(16, 16), compression="jpeg")
    with tifffile.TiffFile(small) as tif:
        tif.filehandle.seek(tif.pages.first.dataoffsets[0])
        another = tif.filehandle.read(tif.pages.first.databytecounts[0])
    with tifffile.TiffFile(path, mode="r+") as tif:
        page = tif.pages.first
        offsets, counts = page.dataoffsets, list(page.databytecounts)
        assert len(another) <= counts[2]
        with path.open("r+b") as file:
            file.seek(offsets[2])
            file.write(another)
        counts[0], counts[1], counts[2] = 0, counts[1] // 2, len(another)
        page.tags[325].overwrite(counts)
    source = opened(path)
    streams = source.encoded([0, 1, 2, 3], COLORS)
    assert streams[:3] == [None, None, None]
    assert streams[3] is not None
    assert (source.read([0]) == source.image.background).all()


@pytest.mark.parametrize("stride", [TILE, TILE // 2])
def test_tiles_side_by_side_are_read_together_and_give_what_each_gives_alone(
    files: dict[str, Path], opened: Any, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    source = opened(files["4:2:0"], stride=stride)
    index = np.random.default_rng(0).permutation(np.repeat(np.arange(len(source)), 2))
    alone = {number: source.encoded([number], COLORS)[0] for number in index}
    assert source.encoded(index, COLORS) == [alone[number] for number in index]
    assert source.encoded([], COLORS) == []
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *what: reads.append(what) or pread(*what))
    streams = source.encoded(slice(None), COLORS)
    assert sum(stream is not None for stream in streams) == WHOLE
    assert len(reads) == 1


def test_tiles_of_several_blocks_of_the_tables_are_found(tmp_path: Path, opened: Any) -> None:
    pixels = picture(3, 16 * 160, 16 * 16)
    source = opened(write_tiff(tmp_path / "long.tif", pixels, tile=(16, 16), compression="jpeg"), 16)
    assert len(source) > 2 * BLOCK
    some = [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5]
    decoded = Decoder(CPU)(source.encoded(some, COLORS), 3).numpy()
    assert np.abs(decoded.astype(int) - source.read(some)).max() <= ROUNDING
    drawn = pixels.reshape(16, 16, 160, 16, 3).swapaxes(1, 2).reshape(-1, 16, 16, 3)
    off = np.abs(decoded.astype(int)[:, None] - drawn).mean(axis=(2, 3, 4))
    assert off.argmin(axis=1).tolist() == some, "each looks like the tile that was asked for"


def staged(batch: Batch, stager: Stager) -> tuple[dict[tuple[int, int], np.ndarray], int]:
    """Pixels by image and patch, of images that have not failed, and how many came encoded."""
    seen: dict[tuple[int, int], np.ndarray] = {}
    encoded = 0

    def stage(chunk: Any, rows: int) -> torch.Tensor:
        nonlocal encoded
        encoded += len(chunk.encoded)
        return stager(chunk, rows)

    for chunk, pixels in prefetched(batch.chunks(), stage, IN_ONE_PART):
        assert len(pixels) == len(chunk.pixels)
        assert not pixels[chunk.count :].any()
        assert len(chunk.image) == len(chunk.index) == chunk.count
        for row, key in enumerate(zip(chunk.image.tolist(), chunk.index.tolist(), strict=True)):
            assert key not in seen
            seen[key] = pixels[row].cpu().numpy().copy()
    return {key: pixels for key, pixels in seen.items() if key[0] not in batch.failed}, encoded


def always(stager: Stager) -> Delivery:
    assert stager.deliver is not None
    return Delivery(stager.deliver.colors, always=True)


@settings(max_examples=12, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["4:2:0", "4:2:2", "rgb"]), min_size=1, max_size=3),
    views=st.lists(st.builds(View, st.booleans(), st.booleans(), st.integers(0, 3)), min_size=3, max_size=3),
    x=st.sampled_from([0, -TILE, 5]),
    chunk=st.integers(1, 50),
    threads=st.integers(1, 3),
    hold=st.sampled_from([0, 2**24]),
)
def test_chunks_and_fetched_patches_are_the_same_as_without(
    files: dict[str, Path], kinds: list[str], views: list[View], x: int, chunk: int, threads: int, hold: int
) -> None:
    openers = [
        FileOpener(files[kind], kind, TILE, view=view, offset=(x, 0)) for kind, view in zip(kinds, views, strict=False)
    ]
    stager = Stager(CPU, encoded=True)
    with Reader(threads, ahead=2, stall=PATIENCE) as reader:
        for batch in reader.stream([openers, openers[:1]], chunk, "mask", hold, always(stager)):
            seen, encoded = staged(batch, stager)
            assert encoded == (0 if x == 5 else WHOLE * len(batch.names))
            kept = [np.array([0, 9, 30, 9])] * len(batch.names)
            for image, (opener, rows) in enumerate(zip(openers, batch.fetch(kept), strict=False)):
                with closing(opener()) as source:
                    pixels = source.read(slice(None)).astype(int)
                np.testing.assert_array_equal(rows, pixels[kept[image]])
                assert {index for each, index in seen if each == image} == set(range(len(pixels)))
                for index in range(len(pixels)):
                    assert np.abs(seen[image, index] - pixels[index]).max() <= ROUNDING
        assert reader.encoded_patches == (0 if x == 5 else WHOLE * (len(openers) + 1))
    assert stager.refused == 0


def break_quietly(path: Path, source: Path, tiles: Sequence[int]) -> Path:
    """A copy in which tiles keep their head and their end, but not what is between."""
    shutil.copy(source, path)
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        for tile in tiles:
            offset, count = page.dataoffsets[tile], page.databytecounts[tile]
            tif.filehandle.seek(offset)
            data = tif.filehandle.read(count)
            parts = segments(data)
            assert parts is not None
            start = 2 + sum(len(body) for _, body in parts)
            with path.open("r+b") as file:
                file.seek(offset + start)
                file.write(b"\0" * (count - start - 2))
    return path


@pytest.mark.parametrize("quietly", [True, False])
@pytest.mark.parametrize("chunk", [8, 100])
def test_damaged_tiles_are_unreadable_as_on_the_host(
    files: dict[str, Path], tmp_path: Path, quietly: bool, chunk: int
) -> None:
    bad = (break_quietly if quietly else damage)(tmp_path / "bad.tif", files["4:2:0"], [3, 8])
    lists = [[FileOpener(bad, "bad", TILE), FileOpener(files["rgb"], "good", TILE)]]
    stager = Stager(CPU, encoded=True)
    found = []
    for deliver in (None, always(stager)):
        with Reader(2, stall=PATIENCE) as reader:
            for batch in reader.stream(lists, chunk, "mask", deliver=deliver):
                seen, _ = staged(batch, stager)
                found.append((batch.unreadable, list(batch.failed), sorted(seen)))
            assert reader.read_patches == len(seen)
    assert found[0] == found[1]
    assert set(found[0][0][0]) == {3, 8}
    # on a busy machine a read may be given up and made again, then on the host from the start
    assert stager.refused in ((0,) if not quietly else (1, 2) if chunk == 8 else (1,))


def test_a_damaged_tile_ends_the_stream_where_errors_are_raised(files: dict[str, Path], tmp_path: Path) -> None:
    bad = FileOpener(break_quietly(tmp_path / "bad.tif", files["4:2:0"], [3]), "bad", TILE)
    stager = Stager(CPU, encoded=True)
    with Reader(2, stall=PATIENCE) as reader:
        stream = reader.stream([[bad]], 16, "raise", deliver=always(stager))
        with pytest.raises(ImageError, match="damaged at"):
            staged(next(stream), stager)


def test_a_chunk_of_damaged_tiles_alone_is_not_shown(files: dict[str, Path], tmp_path: Path) -> None:
    bad = FileOpener(break_quietly(tmp_path / "bad.tif", files["4:2:0"], [0, 1, 2]), "bad", TILE)
    stager = Stager(CPU, encoded=True)
    with Reader(2, stall=PATIENCE) as reader:
        for batch in reader.stream([[bad]], 3, "mask", deliver=always(stager)):
            counts = [chunk.count for chunk, _ in prefetched(batch.chunks(), stager, IN_ONE_PART)]
            assert sum(counts) == ROWS * COLUMNS - 3
            assert 0 not in counts
            assert set(batch.unreadable[0]) == {0, 1, 2}


def test_an_image_that_fails_takes_its_encoded_rows_along(files: dict[str, Path], tmp_path: Path) -> None:
    bad = FileOpener(break_quietly(tmp_path / "bad.tif", files["4:2:0"], [3]), "bad", TILE)
    stager = Stager(CPU, encoded=True)
    with Reader(2, stall=PATIENCE) as reader:
        for batch in reader.stream(
            [[bad, FileOpener(files["rgb"], "good", TILE)]], 100, "skip", deliver=always(stager)
        ):
            seen, _ = staged(batch, stager)
            assert list(batch.failed) == [0]
            assert {image for image, _ in seen} == {1}
            assert len(seen) == ROWS * COLUMNS


def test_only_what_the_consumer_waits_for_comes_encoded(files: dict[str, Path]) -> None:
    begun, asked = threading.Event(), threading.Event()

    class Gated(FilePatches):
        def read(self, index: Any, out: np.ndarray | None = None) -> np.ndarray:
            begun.set()
            assert asked.wait(PATIENCE)
            return super().read(index, out)

    class Watched(Reader):
        @contextmanager
        def waiting(self) -> Iterator[None]:
            if begun.is_set() and not asked.is_set():
                waits.append(1)
                if len(waits) == 2:  # for the chunk to be planned, then for its pixels
                    asked.set()
            with super().waiting():
                yield

    def gated() -> PatchSource:
        source = FileOpener(files["4:2:0"], "gated", TILE)()
        return Gated(source.image, source.grid)

    waits: list[int] = []
    patches = ROWS * COLUMNS
    openers = [Opener("gated", gated), FileOpener(files["4:4:4"], "open", TILE)]
    stager = Stager(CPU, encoded=True)
    assert stager.deliver is not None
    with Watched(1, ahead=4, stall=PATIENCE) as reader:
        stream = reader.stream([openers] * 2, 2 * patches, deliver=stager.deliver)
        batch = next(stream)
        assert begun.wait(PATIENCE)
        chunk = next(chunks := batch.chunks())
        assert not {0, 1, 2} & set(chunk.encoded), "begun before the consumer waited"
        assert {int(chunk.image[row]) for row in chunk.encoded} >= {1}, "in the queue when it did"
        stager(chunk)
        for image, name in enumerate(("4:2:0", "4:4:4")):
            with closing(FileOpener(files[name], name, TILE)()) as source:
                difference = chunk.pixels[: chunk.count][chunk.image == image] - source.read(slice(None)).astype(int)
                assert np.abs(difference).max() <= ROUNDING
        assert not list(chunks)
        batch = next(stream)
        assert eventually(lambda: bool(batch.planned) and batch.planned[0].finished())
        assert not next(batch.chunks()).encoded, "all was read before the consumer asked"


def test_what_threads_get_to_while_the_consumer_waits_comes_encoded_for_later_chunks_too(tmp_path: Path) -> None:
    """Four threads, six chunks of two runs in the ring: runs of the chunk that is waited for have all begun."""
    run = 5 * PATCHES_BETWEEN_LOOKS // 2
    chunk = 2 * run
    path = write_tiff(tmp_path / "many.tif", picture(3, 16 * 16, 7 * chunk), tile=(16, 16), compression="jpeg")
    waits, filled, again = threading.Event(), threading.Event(), threading.Event()
    decoded: set[int] = set()
    ended: set[int] = set()
    begun: list[int] = []
    asked: list[Batch] = []

    class Gated(FilePatches):
        def read(self, index: Any, out: np.ndarray | None = None) -> np.ndarray:
            if index[0] < 4 * run:  # begun before the consumer waits: the first run ends when it does, the others later
                begun.append(int(index[0]))
                assert (waits if index[0] == 0 else filled).wait(PATIENCE)
            if index[0] == 6 * chunk + PATCHES_BETWEEN_LOOKS:
                assert again.wait(PATIENCE)
            pixels = super().read(index, out)
            decoded.update(index.tolist())
            self.end(index)
            return pixels

        def encoded(self, index: Any, colors: frozenset[str]) -> list[bytes | None] | None:
            streams = super().encoded(index, colors)
            self.end(index)
            return streams

        def end(self, index: Any) -> None:
            ended.update(index.tolist())
            if ended >= set(range(4 * run, 6 * chunk)):
                filled.set()

    class Watched(Reader):
        @contextmanager
        def waiting(self) -> Iterator[None]:
            if asked and len(asked[0].planned) < 6:  # the first chunk has been taken, and is waited for
                waits.set()
            if asked and not asked[0].planned:  # likewise the last
                again.set()
            with super().waiting():
                yield

    def gated() -> PatchSource:
        source = FileOpener(path, "gated", 16)()
        return Gated(source.image, source.grid)

    with Watched(4, ahead=4, stall=PATIENCE) as reader:
        batch = next(stream := reader.stream([[Opener("gated", gated)]], chunk, deliver=Delivery(COLORS)))
        assert eventually(lambda: len(batch.planned) == 6 and len(begun) == 4)
        asked.append(batch)
        found = [next(chunks := batch.chunks())]
        assert eventually(lambda: all(planned.finished() for planned in batch.planned))
        found += [next(chunks), next(chunks)]
        busy = {*range(6 * chunk, 6 * chunk + PATCHES_BETWEEN_LOOKS), *range(6 * chunk + run, 7 * chunk)}
        assert eventually(lambda: decoded >= busy), "the consumer is busy: the host decodes"
        found += chunks
        encoded = [len(one.encoded) for one in found]
        assert encoded == [0, 0, chunk, chunk, chunk, chunk, run - 2 * PATCHES_BETWEEN_LOOKS], (
            "and a thread looks again"
        )
        assert not list(stream)


def test_the_same_patches_are_kept(shared: Path, files: dict[str, Path]) -> None:
    slide = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    stager = Stager(CPU, encoded=True)
    part = FileOpener(slide, "slide", 240, offset=(5 * 240, 8 * 240))
    small = [FileOpener(path, name, TILE) for name, path in list(files.items())[:4]]
    for size, openers in ((240, [part]), (TILE, small)):
        torch.manual_seed(0)
        config = ModelConfig(encoder="small", width=8, heads=2)
        model = build_classifier(config, [Task("a", "binary", ("no", "yes"))], size).eval()
        kept = []
        for deliver in (None, always(stager)):
            with Reader(2, stall=PATIENCE) as reader:
                engine = Engine(model, SelectConfig(m=10))
                engine.stager = stager
                for batch in reader.stream([openers], 16, deliver=deliver):
                    kept.append(engine.select(batch))
                assert (reader.encoded_patches > 0) == (deliver is not None)
        for one, other in zip(*kept, strict=True):
            assert one is not None
            assert other is not None
            assert len(set(one.index.tolist()) & set(other.index.tolist())) >= 0.95 * len(one.index)


Decode = Callable[[Decoder, Sequence[bytes], int], torch.Tensor]
ADOBE = b"\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00"
faithful: Decode = Decoder.__call__


def numbers_of(stream: bytes) -> bytes:
    """The numbers of a JPEG's samples."""
    return next(body for marker, body in segments(stream) or [] if marker == 0xC0)[10:19:3]


def blind(self: Decoder, streams: Sequence[bytes], channels: int) -> torch.Tensor:
    """Does not see the marker that says RGB, as some decoders do."""
    return faithful(self, [stream.replace(ADOBE + b"\0", ADOBE + b"\1") for stream in streams], channels)


def by_names(self: Decoder, streams: Sequence[bytes], channels: int) -> torch.Tensor:
    """Takes samples for RGB where they are called so."""
    read = [
        stream.replace(ADOBE + b"\0", ADOBE + b"\1") if numbers_of(stream) != b"RGB" else stream for stream in streams
    ]
    return faithful(self, read, channels)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decode], None]:
    """Replace torchvision's decoder by another, of which nothing is known yet."""

    def install(decode: Decode) -> None:
        monkeypatch.setattr(Decoder, "__call__", decode)
        monkeypatch.setattr("keyhole.engine.jpeg.TRIED_DECODERS", {})

    return install


@pytest.mark.parametrize(("decode", "numbers"), [(blind, "R, G, B"), (by_names, "0, 1, 2")])
def test_what_a_decoder_gets_wrong_is_not_delivered(
    decoder: Callable[[Decode], None], files: dict[str, Path], decode: Decode, numbers: str
) -> None:
    decoder(decode)
    colors, note = decodes(CPU)
    assert colors == {"grey", "ycbcr"}
    assert f"wrong colours for rgb with samples {numbers}" in note
    stager = Stager(CPU, encoded=True)
    with Reader(2, stall=PATIENCE) as reader:
        for batch in reader.stream([[FileOpener(files["rgb"], "rgb", TILE)]], 16, deliver=always(stager)):
            staged(batch, stager)
        assert reader.encoded_patches == 0


def test_a_decoder_is_tried_once_on_pictures_as_tiles_are_delivered(
    decoder: Callable[[Decode], None], files: dict[str, Path], opened: Any
) -> None:
    tried: list[bytes] = []

    def noted(self: Decoder, streams: Sequence[bytes], channels: int) -> torch.Tensor:
        tried.extend(streams)
        return faithful(self, streams, channels)

    decoder(noted)
    assert decodes(CPU) == (COLORS, "")
    once = len(tried)
    assert decodes(CPU) == (COLORS, "")
    assert len(tried) == once
    assert {b"RGB", b"\0\1\2", b"\1\2\3"} == {numbers_of(stream) for stream in tried} - {b"\1"}
    for kind in ("rgb", "4:2:0", "grey"):
        tile = next(stream for stream in opened(files[kind]).encoded([0], COLORS) if stream)
        markers = [body[:16] for marker, body in segments(tile) if 0xE0 <= marker <= 0xEF]
        assert any([body[:16] for marker, body in segments(each) or [] if 0xE0 <= marker <= 0xEF] == markers
                   for each in tried), f"no trial has the markers of a tile in {kind}"  # fmt: skip


def test_a_decoder_that_fails_is_tried_again_later(decoder: Callable[[Decode], None]) -> None:
    tries = 0

    def waiting_is_an_error_at_first(self: Decoder, streams: Sequence[bytes], channels: int) -> torch.Tensor:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RuntimeError("called a synchronizing CUDA operation")
        return faithful(self, streams, channels)

    decoder(waiting_is_an_error_at_first)
    colors, note = decodes(CPU)
    assert colors == {"rgb", "ycbcr"}
    assert note == "the CPU decodes JPEG tiles in grey: called a synchronizing CUDA operation for grey"
    assert decodes(CPU) == (COLORS, "")


def test_a_gpu_is_tried_once_whether_it_is_named_with_its_index_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setitem(TRIED_DECODERS, torch.device("cuda", 0), (COLORS, "tried"))
    for device in (torch.device("cuda", 0), torch.device("cuda")):
        assert decodes(device) == (COLORS, "tried")


@pytest.mark.cuda(dry=False)
def test_a_decoder_waits_for_whoever_has_the_same_stream() -> None:
    if "ycbcr" not in decodes(GPU)[0]:
        pytest.skip("this GPU decodes no JPEG")
    data = io.BytesIO()
    Image.effect_noise((256, 256), 50).convert("RGB").save(data, "JPEG")
    decoder = Decoder(GPU)
    expected = decoder([data.getvalue()], 3).cpu()
    for _ in range(32):  # as many streams as torch has
        with torch.cuda.stream(torch.cuda.Stream(GPU)):
            block = torch.empty(expected.numel(), dtype=torch.uint8, device=GPU)
            torch.cuda._sleep(200_000_000)
            block.fill_(7)
            del block  # the decoder may be given its memory, to which this stream has yet to write
    assert decoder([data.getvalue()], 3).cpu().equal(expected)


def test_without_a_decoder_the_host_decodes_and_says_why(decoder: Callable[[Decode], None]) -> None:
    def missing(self: Decoder, streams: Sequence[bytes], channels: int) -> torch.Tensor:
        raise RuntimeError("torchvision not compiled with nvJPEG support")

    decoder(missing)
    stager = Stager(CPU, encoded=True)
    assert stager.deliver is None
    assert stager.note == "the CPU decodes JPEG tiles in grey, rgb, ycbcr: torchvision not compiled with nvJPEG support"


def test_colours_are_told_as_libjpeg_tells_them() -> None:
    def frame(ids: bytes) -> tuple[int, bytes]:
        return 0xC0, b"\xff\xc0\0\x11\x08\0\x10\0\x10\x03" + b"".join(bytes([one, 0x11, 0]) for one in ids)

    jfif, adobe = (0xE0, b"\xff\xe0\0\x10JFIF\0" + bytes(9)), b"\xff\xee\0\x0eAdobe\0\x64" + bytes(4)
    assert stored_colors([jfif, (0xEE, adobe + b"\0"), frame(b"\1\2\3")]) == "ycbcr"
    assert stored_colors([(0xEE, adobe + b"\0"), frame(b"\1\2\3")]) == "rgb"
    assert stored_colors([(0xEE, adobe + b"\1"), frame(b"RGB")]) == "ycbcr"
    assert stored_colors([frame(b"RGB")]) == "rgb"
    assert stored_colors([frame(b"\0\1\2")]) == "ycbcr"
