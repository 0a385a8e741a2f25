"""Memory does not grow with the number of patches: measured in a process of its own for each number."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

TILE = 64
COLUMNS, ROWS = 317, 317  # 100,489 patches of 32 px
PATCH = 32
HEADS, TASKS = 8, 1
ALLOWED = 40 * 2**20

CHILD = """
import json, re, sys
from pathlib import Path

import torch

from keyhole.config import ModelConfig
from keyhole.nn import build_classifier
from keyhole.passes import fetch_kept, select_batch
from keyhole.patches import FileOpener
from keyhole.reading import Reader
from keyhole.tasks import Task


def peak() -> int:
    # Not ru_maxrss: a child starts with its parent's.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def child(path: Path, patches: int, size: int, heads: int, tasks: int) -> dict[str, int]:
    # both passes of the real model over one image: what training and prediction do with it
    kinds = [Task(f"task{t}", "binary", ("no", "yes")) for t in range(tasks)]
    model = build_classifier(ModelConfig(width=8, heads=heads), kinds, size).eval()
    with Reader(threads=2, ahead=4) as reader:
        for batch in reader.stream([[FileOpener(path, path.name, size)]], chunk=64):
            (kept,) = select_batch(model, batch, m=16, chunk=64)
            bags, _ = fetch_kept(model, batch, [kept])
            with torch.no_grad():
                model(bags.patches, bags.position, bags.mask)
    assert kept.logits.shape == (patches, heads, tasks), kept.logits.shape
    assert bags.patches.shape == (1, 16, 3, size, size)
    return {"peak": peak(), "logits": kept.logits.nbytes, "pixels": reader.read_patches}


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    print(json.dumps(child(Path(path), *map(int, numbers))))
"""


def write_tiff(path: Path, columns: int, rows: int) -> int:
    """A tiled TIFF of so many patches, written tile by tile; returns the number of patches."""
    rng = np.random.default_rng(0)
    some = np.repeat(np.repeat(rng.integers(0, 256, (50, 4, 4, 3), dtype=np.uint8), 16, axis=1), 16, axis=2)
    width, height = columns * PATCH, rows * PATCH
    across, down = -(-width // TILE), -(-height // TILE)

    def tiles() -> Iterator[np.ndarray]:
        for i in range(across * down):
            yield some[i % len(some)]

    options = {"tile": (TILE, TILE), "photometric": "rgb", "compression": "zlib"}
    tifffile.imwrite(path, tiles(), shape=(height, width, 3), dtype=np.uint8, **options)
    return columns * rows


def measure(script: Path, path: Path, patches: int) -> dict[str, int]:
    numbers = map(str, (patches, PATCH, HEADS, TASKS))
    done = subprocess.run([sys.executable, script, path, *numbers], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_selection_over_50_times_the_patches_takes_no_more_memory_but_for_the_logits(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    few = write_tiff(tmp_path / "few.tif", 50, 40)
    many = write_tiff(tmp_path / "many.tif", COLUMNS, ROWS)
    assert few == 2000
    assert many > 100_000
    small, large = measure(script, tmp_path / "few.tif", few), measure(script, tmp_path / "many.tif", many)
    assert large["logits"] == 4 * HEADS * TASKS * many
    assert large["peak"] - small["peak"] < ALLOWED + large["logits"], (small, large)
