"""Host memory does not grow with the number of open images, patches or epochs. Each is measured in a process of its own."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile
from make_images import picture, pyramid, write_many_tiles, write_tiff
from make_zarr import write_multiscale
from processes import run_process

from keyhole.images import open_image
from keyhole.images.tiff import TiffImage
from keyhole.images.tile_cache import TileCache

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")

ALLOWED = 3 * 2**20
"""Growth that is not a leak: the allocator's own, and pages touched late."""


def growth(kind: str, reader: str, count: int, *paths: Path) -> int:
    return int(run_process("images_memory", kind, reader, count, *paths).stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


def test_sixteen_open_slides_of_250000_tiles_take_little(folder: Path) -> None:
    small = write_many_tiles(folder / "small.tif", 4, 4)
    large = write_many_tiles(folder / "large.tif", 500, 500)
    with open_image(large) as image:
        assert image.size == (500 * 64, 500 * 64)
    # The places of tiles that were looked up are kept, to the limit of all that is kept; whole tables would be 64 MB.
    assert growth("held", "open_image", 16, small, large) < 24 * 2**20


def test_many_open_slides_share_one_cache_of_tiles(shared: Path, folder: Path) -> None:
    source = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    copies = [Path(shutil.copy(source, folder / f"copy-{k}.svs")) for k in range(8)]
    # OpenSlide would keep 26 MB for each; keyhole 32 MB for all, of which the first two fill what they can.
    assert growth("whole", "OpenSlideImage", 0, *copies) < 16 * 2**20


def test_many_open_images_of_strips_share_one_cache(folder: Path) -> None:
    pixels = np.tile(picture(3, 1000, 800), (3, 3, 1))
    source = write_tiff(folder / "wide.tif", pixels, rowsperstrip=16, compression="zstd")
    copies = [Path(shutil.copy(source, folder / f"wide-{k}.tif")) for k in range(8)]
    assert growth("whole", "open_image", 0, *copies) < 16 * 2**20


def write_for(reader: str, path: Path, seed: int = 0) -> Path:
    """An image of the picture for one reader, `path` without suffix."""
    pixels = picture(3, 384, 256, seed)
    if reader == "tiles":
        return write_tiff(path.with_suffix(".tif"), pixels, tile=(64, 64), compression="jpeg")
    if reader == "strips":
        return write_tiff(path.with_suffix(".tif"), pixels, rowsperstrip=16, compression="deflate")
    if reader == "pillow":
        PIL.Image.fromarray(pixels).save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    return write_multiscale(path.with_suffix(".zarr"), pyramid(pixels), 3, chunk=64)


@pytest.mark.parametrize("reader", ["tiles", "strips", "pillow", "zarr"])
def test_500_rounds_of_opening_reading_and_closing_leak_nothing(folder: Path, reader: str) -> None:
    assert growth("rounds", "open_image", 500, write_for(reader, folder / reader)) < ALLOWED


def test_500_rounds_through_openslide_leak_nothing(shared: Path) -> None:
    path = shared / "data" / "slides" / "CMU-1-Small-Region.svs"
    # The first rounds fill the one cache of the process; what OpenSlide frees in threads of its own comes back late.
    assert growth("rounds", "OpenSlideImage", 500, path) < ALLOWED


def test_a_pass_over_200_files_leaks_nothing(folder: Path) -> None:
    kinds = {kind: write_for(kind, folder / f"pass-{kind}") for kind in ("tiles", "strips", "pillow", "zarr")}
    paths = []
    for k in range(200):
        source = list(kinds.values())[k % 4]
        target = folder / f"{k}{source.suffix}"
        paths.append(Path((shutil.copytree if source.is_dir() else shutil.copy)(source, target)))
    assert growth("rounds", "open_image", 400, *paths) < ALLOWED


def arrays(count: int, size: int) -> list[np.ndarray[Any, Any]]:
    return [np.zeros(size, np.uint8) for _ in range(count)]


def test_what_is_kept_is_bounded_for_all_images_together() -> None:
    cache = TileCache(limit=100_000)
    owners = [cache.owner() for _ in range(50)]
    for owner in owners:
        for key, array in enumerate(arrays(10, 10_000)):
            cache.put(owner, key, array)
            assert cache.bytes <= 100_000
    assert cache.get(owners[-1], 9) is not None
    assert cache.get(owners[0], 0) is None
    cache.put(owners[0], "larger than all", np.zeros(200_000, np.uint8))
    assert cache.get(owners[0], "larger than all") is not None
    assert cache.bytes < 202_000
    for owner in owners:
        cache.drop(owner)
    assert cache.bytes == 0


def test_a_closed_image_keeps_nothing(folder: Path) -> None:
    from keyhole.images.tile_cache import TILE_CACHE

    before = TILE_CACHE.bytes
    with TiffImage(write_for("strips", folder / "closed")) as image:
        image.read((0, 0, 64, 64))
        assert TILE_CACHE.bytes > before
    assert TILE_CACHE.bytes == before


# Patches and epochs


TILE = PATCH = 32
COLUMNS, ROWS = 500, 500
HEADS, TASKS = 8, 1
ALLOWED_BESIDE_LOGITS = 60 * 10**6


def write_patches(path: Path, columns: int, rows: int) -> int:
    """A tiled TIFF of so many patches, written tile by tile; returns the number of patches."""
    rng = np.random.default_rng(0)
    some = [
        zlib.compress(np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8)).tobytes())
        for _ in range(50)
    ]
    width, height = columns * PATCH, rows * PATCH
    tiles = (some[i % len(some)] for i in range(columns * rows))
    options = {"tile": (TILE, TILE), "photometric": "rgb", "compression": "zlib"}
    tifffile.imwrite(path, tiles, shape=(height, width, 3), dtype=np.uint8, **options)
    return columns * rows


def test_a_selection_over_250_times_the_patches_takes_no_more_memory_but_for_the_logits(tmp_path: Path) -> None:
    few = write_patches(tmp_path / "few.tif", 40, 25)
    many = write_patches(tmp_path / "many.tif", COLUMNS, ROWS)
    assert (few, many) == (1000, 250_000)
    small, large = (
        int(run_process("selection_peak", tmp_path / name, patches, PATCH, HEADS, TASKS).stdout)
        for name, patches in (("few.tif", few), ("many.tif", many))
    )
    logits = 4 * HEADS * TASKS * many
    assert large - small < ALLOWED_BESIDE_LOGITS + logits, (small, large)


def test_epochs_over_200_files_take_no_more_memory_one_after_the_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(200):
        place = tmp_path / "data" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (256, 256, 3), np.uint8)
        tifffile.imwrite(place / f"{number}.tif", pixels, tile=(64, 64), photometric="rgb", compression="zlib")
    done = run_process("epochs_memory", tmp_path / "data", tmp_path / "run")
    resident = [int(word) for word in done.stdout.splitlines()[-1].split()]
    assert len(resident) == 6
    assert max(resident[2:]) - resident[1] < 20 * 2**20, resident
