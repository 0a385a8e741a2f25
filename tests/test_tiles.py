"""Laws of reading many boxes of a tiled image: the same pixels as one by one, each tile decoded once, bounded memory."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from make_images import picture, write_tiff
from make_zarr import write_multiscale

from keyhole.images import Image, open_image
from keyhole.images.jpeg import frame_of
from keyhole.images.tiff import TiffImage
from keyhole.images.tile_cache import TILE_CACHE, TileCache
from keyhole.images.tiles import TiledImage
from keyhole.loading import Reader
from keyhole.patches.edge import Edge
from keyhole.patches.grid import PatchGrid
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import FilePatches, View

WIDTH, HEIGHT, TILE = 200, 136, 32
COLUMNS, ROWS = 7, 5
EDGES: tuple[Edge, ...] = ("drop", "shift", "reflect", "background")

KINDS: dict[str, dict[str, Any]] = {
    "jpeg": {"compression": "jpeg", "compressionargs": {"level": 90}},
    "jpeg-420": {"compression": "jpeg", "compressionargs": {"subsampling": "420"}},
    "jpeg-rgb": {"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}},
    "deflate": {"compression": "deflate", "predictor": True},
    "zstd": {"compression": "zstd"},
    "jpeg2000": {"compression": "jpeg2000", "compressionargs": {"level": 0, "reversible": True}},
    "planes": {"planarconfig": "separate", "compression": "deflate"},
    "plain": {},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The picture in tiles of every kind, in strips, and in the chunks of OME-Zarr."""
    folder, pixels = tmp_path_factory.mktemp("tiles"), picture(3, WIDTH, HEIGHT)
    found = {name: write_tiff(folder / f"{name}.tif", pixels, tile=(TILE, TILE), **kw) for name, kw in KINDS.items()}
    found["grey"] = write_tiff(folder / "grey.tif", pixels[..., 0], tile=(TILE, TILE), compression="jpeg")
    found["strips"] = write_tiff(folder / "strips.tif", pixels, rowsperstrip=TILE, compression="jpeg")
    found["zarr"] = write_multiscale(folder / "a.zarr", [pixels], 3, chunk=TILE)
    found["zarr-yxc"] = write_multiscale(folder / "b.zarr", [pixels], 2, axes="yxc", chunk=TILE)
    found["shards"] = write_multiscale(folder / "c.zarr", [pixels], 3, chunk=TILE, shards=4 * TILE)
    return found


NAMES = [*KINDS, "grey", "strips", "zarr", "zarr-yxc", "shards"]


@contextmanager
def counted(image: Image) -> Iterator[Counter[int]]:
    """How often each tile of level 0 is decoded."""
    assert isinstance(image, TiledImage)
    seen: Counter[int] = Counter()
    lock, decode = threading.Lock(), image.decode_tile

    def count(level: int, tile: int, *rest: Any) -> Any:
        with lock:
            seen[tile] += 1
        return decode(level, tile, *rest)

    image.decode_tile = count  # type: ignore[method-assign]
    yield seen


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    size=st.integers(12, 80),
    stride=st.integers(12, 80),
    offset=st.tuples(st.integers(-70, 30), st.integers(-70, 30)),
    view=st.builds(View, st.booleans(), st.booleans(), st.integers(0, 3)),
    run=st.integers(1, 70),
    mpp=st.sampled_from([None, 0.2, 0.7]),
    edge=st.sampled_from(EDGES),
)
def test_a_pass_gives_what_each_patch_by_itself_gives(
    files: dict[str, Path],
    name: str,
    size: int,
    stride: int,
    offset: tuple[int, int],
    view: View,
    run: int,
    mpp: float | None,
    edge: Edge,
) -> None:
    size = min(size, 40) if mpp else size
    opener = FileOpener(files[name], name, size, stride, mpp=mpp, view=view, offset=offset, image_mpp=0.25, edge=edge)
    source, alone = opener(), opener()
    seen = np.concatenate([source.read(slice(start, start + run)) for start in range(0, len(source), run)])
    for index in range(0, len(source), 1 + len(source) // 25):
        np.testing.assert_array_equal(seen[index], alone.read([index])[0])
    if mpp is None and "jpeg" not in name and name not in ("grey", "strips"):
        how: dict[str, Any] = {"mode": "reflect"} if edge == "reflect" else {"constant_values": 255}
        whole = np.pad(picture(3, WIDTH, HEIGHT), ((99, 99), (99, 99), (0, 0)), **how)
        boxes = source.grid.boxes(slice(None))
        patches = np.stack([whole[y + 99 : y + 99 + h, x + 99 : x + 99 + w] for x, y, w, h in boxes])
        np.testing.assert_array_equal(seen, view.pixels(patches))
    source.close()
    alone.close()


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, -1)])
def test_patches_of_a_turned_tiff_are_those_of_the_upright_picture(
    tmp_path: Path, orientation: int, turns: int
) -> None:
    pixels = picture(3, 96, 64)
    path = write_tiff(tmp_path / "a.tif", pixels, tile=(32, 32), extratags=[(274, 3, 1, orientation, True)])
    upright = np.rot90(pixels, turns)
    with open_image(path) as image:
        grid = PatchGrid(image, 32)
        for (x, y, width, height), patch in zip(grid.boxes(slice(None)), grid.read(slice(None)), strict=True):
            np.testing.assert_array_equal(patch, upright[y : y + height, x : x + width])


@pytest.mark.parametrize("name", ["jpeg", "jpeg-420", "jpeg-rgb", "grey"])
def test_jpeg_decoded_in_place_is_what_tifffile_decodes(files: dict[str, Path], name: str) -> None:
    with tifffile.TiffFile(files[name]) as tif, TiffImage(files[name]) as image:
        expected = tif.pages.first.asarray().reshape(HEIGHT, WIDTH, -1)
        np.testing.assert_array_equal(image.read((0, 0, WIDTH, HEIGHT)), expected)
        np.testing.assert_array_equal(image.read((TILE, TILE, TILE, TILE)), expected[TILE : 2 * TILE, TILE : 2 * TILE])


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    size=st.integers(12, 70),
    stride=st.integers(12, 70),
    offset=st.tuples(st.integers(-40, 0), st.integers(-40, 0)),
    run=st.integers(1, 40),
    threads=st.integers(1, 4),
    edge=st.sampled_from(EDGES),
)
def test_each_tile_is_decoded_once_in_a_pass(
    files: dict[str, Path],
    name: str,
    size: int,
    stride: int,
    offset: tuple[int, int],
    run: int,
    threads: int,
    edge: Edge,
) -> None:
    with open_image(files[name]) as image, counted(image) as decoded, ThreadPoolExecutor(threads) as pool:
        grid = PatchGrid(image, size, stride, offset=offset, edge=edge)
        edges = [*range(0, len(grid), run), len(grid)]
        runs = [np.arange(*edge) for edge in itertools.pairwise(edges)]
        assert sum(map(len, pool.map(grid.read, runs))) == len(grid)
        assert set(decoded.values()) == {1}


def test_the_reader_decodes_each_tile_once(files: dict[str, Path]) -> None:
    class Counted(FileOpener):
        def __call__(self) -> FilePatches:
            source = super().__call__()
            seen.append(counting := counted(source.image))
            counts.append(counting.__enter__())
            return source

    seen: list[AbstractContextManager[Counter[int]]] = []
    counts: list[Counter[int]] = []
    openers = [Counted(files[name], name, TILE, offset=(-9, -9)) for name in ("jpeg", "zstd", "zarr")]
    with Reader(3, ahead=2) as reader:
        for batch in reader.stream([openers], 16):
            assert sum(chunk.count for chunk in batch.chunks()) == 3 * (COLUMNS * ROWS)
    assert [set(count.values()) for count in counts] == [{1}] * 3


@pytest.mark.parametrize("name", ["jpeg", "zarr"])
def test_an_aligned_pass_keeps_no_tile_and_others_only_until_the_last_use(files: dict[str, Path], name: str) -> None:
    with open_image(files[name]) as image:
        image.read((0, 0, 8, 8))  # places of tiles may be looked up
        before = TILE_CACHE.bytes
        PatchGrid(image, TILE).read(slice(None))
        assert TILE_CACHE.bytes == before
        grid = PatchGrid(image, TILE, offset=(-5, -5))
        grid.read(np.arange(len(grid) // 2))
        assert before < TILE_CACHE.bytes <= before + (COLUMNS + 1) * (TILE * TILE * 3 + 1000)
        grid.read(np.arange(len(grid) // 2, len(grid)))
        assert TILE_CACHE.bytes == before


def test_patches_picked_here_and_there_keep_no_tile(files: dict[str, Path]) -> None:
    with open_image(files["jpeg"]) as image:
        image.read((0, 0, 8, 8))  # places of tiles are looked up once
        grid = PatchGrid(image, TILE, TILE // 2)
        before = TILE_CACHE.bytes
        grid.read(np.arange(0, len(grid), 3))
        assert TILE_CACHE.bytes == before


def test_who_wants_a_tile_that_is_being_decoded_waits_for_it() -> None:
    cache, started, go = TileCache(), threading.Event(), threading.Event()
    owner, decoded = cache.owner(), []

    def decode() -> np.ndarray[Any, Any]:
        started.set()
        assert go.wait(30)
        decoded.append(1)
        return np.zeros((8, 8, 3), np.uint8)

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(cache.fetch, owner, "tile", decode, uses=1, total=8)
        assert started.wait(30)
        others = [pool.submit(cache.fetch, owner, "tile", decode, uses=1, total=8) for _ in range(7)]
        go.set()
        assert all(other.result() is first.result() for other in others)
    assert decoded == [1]
    assert cache.bytes == 0, "dropped after the last use"


def test_who_wants_a_tile_that_is_being_decoded_does_all_else_before_waiting(files: dict[str, Path]) -> None:
    with open_image(files["jpeg"]) as image:
        expected = PatchGrid(image, TILE, offset=(-5, -5)).read(np.arange(4))
    with open_image(files["jpeg"]) as image:
        assert isinstance(image, TiledImage)
        grid, decode = PatchGrid(image, TILE, offset=(-5, -5)), image.decode_tile
        begun, last, seen = threading.Event(), threading.Event(), []

        def slow_first(level: int, tile: int, *rest: Any) -> Any:
            seen.append(tile)
            if tile == 0:
                begun.set()
                assert last.wait(10), "the other thread waits for tile 0 with other tiles left to do"
            elif tile == 2:
                last.set()
            return decode(level, tile, *rest)

        image.decode_tile = slow_first  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(grid.read, np.arange(0, 2))
            assert begun.wait(30)
            other = pool.submit(grid.read, np.arange(1, 3))
            assert np.array_equal(one.result(), expected[:2])
            assert np.array_equal(other.result(), expected[1:3])
        assert sorted(seen) == [0, 1, 2], "each once"


def test_a_tile_that_cannot_be_decoded_is_tried_by_the_next_who_wants_it() -> None:
    cache = TileCache()
    owner = cache.owner()

    def fail() -> np.ndarray[Any, Any]:
        raise ValueError("damaged")

    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            cache.fetch(owner, "tile", fail, uses=1, total=2)
    pixels = np.zeros((8, 8, 3), np.uint8)
    assert cache.fetch(owner, "tile", lambda: pixels, uses=1, total=2) is pixels
    assert cache.fetch(owner, "tile", fail, uses=1, total=2) is pixels
    cache.drop(owner)
    assert cache.fetch(owner, "tile", lambda: pixels, uses=1, total=2) is pixels
    assert cache.bytes == 0, "a closed image keeps nothing"


def test_what_is_shared_stays_within_its_limit_and_a_row_that_does_not_fit_is_still_of_use() -> None:
    cache = TileCache(shared_limit=100_000)
    owner, decoded = cache.owner(), []

    def decode() -> np.ndarray[Any, Any]:
        decoded.append(1)
        return np.zeros(9_000, np.uint8)

    for row in range(20):  # each tile is wanted by two rows of patches, of which ten tiles of fifteen fit
        for key in [*((row, column) for column in range(15)), *((row + 1, column) for column in range(15))]:
            cache.fetch(owner, key, decode, uses=1, total=2)
            assert cache.bytes <= 100_000
    assert len(decoded) < 20 * 15 * 1.8
    cache.drop(owner)
    assert cache.bytes == 0


@pytest.mark.parametrize("side", [16, 48, 800])
def test_a_tile_of_another_size_than_its_page_says_is_not_decoded_in_place(tmp_path: Path, side: int) -> None:
    path = write_tiff(tmp_path / "a.tif", picture(3, 96, 96), tile=(32, 32), compression="jpeg")
    other = imagecodecs.jpeg8_encode(np.zeros((side, side, 3), np.uint8))
    with tifffile.TiffFile(path, mode="r+") as tif:
        end = path.stat().st_size
        for tag, value in ((324, end), (325, len(other))):
            values = list(tif.pages.first.tags[tag].value)
            values[4] = value
            tif.pages.first.tags[tag].overwrite(values)
    with path.open("ab") as file:
        file.write(other)
    with TiffImage(path) as image:
        grid = PatchGrid(image, 32)
        sound = [0, 1, 2, 3, 5, 6, 7, 8]
        np.testing.assert_array_equal(grid.read(sound)[3], image.read((0, 32, 32, 32)))
        with pytest.raises(Exception, match=r"damaged at|holds a picture"):
            grid.read(slice(None))


def test_the_frame_of_a_jpeg_is_found_behind_other_marks() -> None:
    data = bytes(imagecodecs.jpeg8_encode(picture(3, 40, 24)))
    end, frame = frame_of(data)
    assert frame == (8, 24, 40, 3)
    assert frame_of(memoryview(data)) == (end, frame)
    comment = data[:2] + b"\xff\xff\xfe\x00\x05abc" + data[2:]
    assert frame_of(comment) == (end + 8, frame)
    assert frame_of(data[:20]) == (0, None)
    assert frame_of(b"") == (0, None)
