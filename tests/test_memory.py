"""Memory does not grow with the number of patches: measured in a process of its own for each number."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile

TILE = PATCH = 32
COLUMNS, ROWS = 500, 500
HEADS, TASKS = 8, 1
ALLOWED = 60 * 10**6

CHILD = """
import json, re, sys
from pathlib import Path

import torch

from keyhole.config.settings import ModelConfig, SelectConfig
from keyhole.nn import build_classifier
from keyhole.engine.passes import fetch_kept, select_batch
from keyhole.patches.sources import FileOpener
from keyhole.loading import Reader
from keyhole.tasks.kinds import Task


def peak() -> int:
    # Not ru_maxrss: a child starts with its parent's.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def child(path: Path, patches: int, size: int, heads: int, tasks: int) -> dict[str, int]:
    # both passes of the real model over one image: what training and prediction do with it
    kinds = [Task(f"task{t}", "binary", ("no", "yes")) for t in range(tasks)]
    model = build_classifier(ModelConfig(width=8, heads=heads), kinds, size).eval()
    with Reader(threads=2, ahead=4) as reader:
        for batch in reader.stream([[FileOpener(path, path.name, size)]], chunk=64):
            kept = select_batch(model, batch, SelectConfig(m=16, chunk=64))
            bags, _, _ = fetch_kept(model, batch, kept)
            with torch.no_grad():
                model(bags.patches(), bags.position, bags.mask)
    assert reader.read_patches == patches + 16
    assert bags.mask.sum() == 16
    return {"peak": peak()}


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    print(json.dumps(child(Path(path), *map(int, numbers))))
"""


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


def measure(script: Path, path: Path, patches: int) -> dict[str, int]:
    numbers = map(str, (patches, PATCH, HEADS, TASKS))
    done = subprocess.run([sys.executable, script, path, *numbers], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_selection_over_250_times_the_patches_takes_no_more_memory_but_for_the_logits(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    few = write_tiff(tmp_path / "few.tif", 40, 25)
    many = write_tiff(tmp_path / "many.tif", COLUMNS, ROWS)
    assert (few, many) == (1000, 250_000)
    small, large = measure(script, tmp_path / "few.tif", few), measure(script, tmp_path / "many.tif", many)
    logits = 4 * HEADS * TASKS * many
    assert large["peak"] - small["peak"] < ALLOWED + logits, (small, large)


EPOCHS = """
import re, sys
from pathlib import Path

import keyhole
from keyhole.training.loop import Loop

resident = []
end_epoch = Loop.end_epoch


def noting(self, row):
    end_epoch(self, row)
    resident.append(int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)


Loop.end_epoch = noting
keyhole.train(
    {"path": sys.argv[1], "cache": 0.0},
    sys.argv[2],
    patch={"size": 32, "foreground": "non-empty"},
    model={"width": 4, "heads": 2},
    select={"m": 4},
    train={"epochs": 6, "batch": 8},
    run={"threads": 2},
)
print(*resident)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_epochs_over_200_files_take_no_more_memory_one_after_the_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(200):
        place = tmp_path / "data" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (256, 256, 3), np.uint8)
        tifffile.imwrite(place / f"{number}.tif", pixels, tile=(64, 64), photometric="rgb", compression="zlib")
    script = tmp_path / "epochs.py"
    script.write_text(EPOCHS)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "data", tmp_path / "run"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    resident = [int(word) for word in done.stdout.splitlines()[-1].split()]
    assert len(resident) == 6
    assert max(resident[2:]) - resident[1] < 20 * 2**20, resident
