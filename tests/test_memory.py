"""Memory does not grow with the number of patches: measured in a process of its own for each number."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from processes import run_process

TILE = PATCH = 32
COLUMNS, ROWS = 500, 500
HEADS, TASKS = 8, 1
ALLOWED = 60 * 10**6


def write_tiff(path: Path, columns: int, rows: int) -> int:
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_selection_over_250_times_the_patches_takes_no_more_memory_but_for_the_logits(tmp_path: Path) -> None:
    few = write_tiff(tmp_path / "few.tif", 40, 25)
    many = write_tiff(tmp_path / "many.tif", COLUMNS, ROWS)
    assert (few, many) == (1000, 250_000)
    small, large = (
        int(run_process("selection_peak", tmp_path / name, patches, PATCH, HEADS, TASKS).stdout)
        for name, patches in (("few.tif", few), ("many.tif", many))
    )
    logits = 4 * HEADS * TASKS * many
    assert large - small < ALLOWED + logits, (small, large)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
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
