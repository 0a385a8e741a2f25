"""Predicted and measured peak of whole runs on a CPU without --memory, into a dated Markdown file.

    python benchmarks/host_memory.py [--quick] [--no-write]

Each run is `keyhole train` in a process of its own: photographs of many sizes, with augmentation, several epochs.
Predicted is what the run prints before the first step, measured is the VmHWM of its process. The last columns are the
resident memory after the second epoch and after the last. Give it an older version of keyhole with PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import write_result
from PIL import Image

CHILD = Path(__file__).parent / "host_memory_run.py"
TIMM = ["--recipe", "traffic", "--model.no-pretrained", "--train.warmup", "1", "--train.watch", "val"]
RUNS = {
    "small, 64 px": ["--recipe", "small", "--train.explore", "1", "--train.warmup", "1"],
    "small, 96 px": ["--patch.size", "96", "--train.warmup", "1"],
    "2 stages of ResNet-18, 100 px": [*TIMM, "--model.stages", "2"],
    "large photographs, 96 px": [
        "--patch.size",
        "96",
        "--train.warmup",
        "1",
        "--data.cache",
        "0",
    ],
    "stored features": ["--train.warmup", "1"],
}
UNITS = {"kB": 1e-3, "MB": 1, "GB": 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first run alone, of two epochs")
    parser.add_argument("--no-write", action="store_true", help="print the result and write no file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, settings in list(RUNS.items())[: 1 if options.quick else None]:
            data = _data(name, root)
            rows.append(measured(name, [str(data), *settings], root / f"run {name}", 2 if options.quick else 4))
            print(rows[-1], flush=True)
    text = [
        "`keyhole train` without `--memory`; sizes in MB.",
        "",
        "| run | predicted | measured peak | measured / predicted | after epoch 2 | after the last epoch |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    if not options.no_write:
        print(write_result("host_memory", "Predicted and measured peak of runs without a budget, CPU", text))


def _data(name: str, root: Path) -> Path:
    """Photographs that `name` asks for, or features."""
    if name == "stored features":
        return features(root / "features")
    large = name.startswith("large")
    folder = root / ("large" if large else "photographs")
    return folder if folder.exists() else photographs(folder, *((15, 3000, 4500) if large else (60, 400, 1000)))


def photographs(folder: Path, count: int, smallest: int, largest: int) -> Path:
    """A folder of three classes of JPEG files with sides between the two."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        width, height = (int(side) for side in rng.integers(smallest, largest, 2))
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(place / f"{number}.jpg", quality=85)
    return folder


def features(folder: Path) -> Path:
    """A CSV of 40 bags of 500 to 3,000 features of 512 numbers."""
    import torch

    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = ["image,label"]
    for number in range(40):
        values = torch.from_numpy(rng.standard_normal((int(rng.integers(500, 3000)), 512), np.float32))
        torch.save(values, folder / f"{number}.pt")
        lines.append(f"{folder / f'{number}.pt'},{'ab'[number % 2]}")
    (folder / "bags.csv").write_text("\n".join(lines) + "\n")
    return folder / "bags.csv"


def measured(name: str, settings: list[str], out: Path, epochs: int) -> str:
    """A row of the table."""
    command = [sys.executable, str(CHILD), *settings, "--train.epochs", str(epochs), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(done.stderr)
    predicted, unit = re.search(r"predicted peak ([\d.]+) (\wB)", done.stderr).groups()  # type: ignore[union-attr]
    expected = float(predicted) * UNITS[unit]
    peak, *after = (int(size) / 1e6 for size in done.stdout.splitlines()[-1].split())
    cells = [f"{expected:.0f}", f"{peak:.0f}", f"{peak / expected:.2f}", f"{after[1]:.0f}", f"{after[-1]:.0f}"]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
