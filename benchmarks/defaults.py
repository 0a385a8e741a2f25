"""Defaults that follow from the encoder beside the values they had before: accuracy on images never seen.

    python benchmarks/defaults.py [--seeds 0 1 2]

Generated photographs of 96 px with clutter; three small marks decide the class, rings or crosses of the same size.
Everything runs as a user would run it: `keyhole train DATA --patch.size 16 --select.m 4`, `keyhole evaluate`. The
images are generated: the figures compare settings, and say nothing about real data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import write_result
from PIL import Image, ImageDraw

SIDE, MARK = 96, 10
COUNTS = {"train": 600, "val": 60, "test": 200}
SETTINGS = {
    "3e-4, 0: the defaults before": ("--train.lr=3e-4", "--train.explore=0"),
    "1e-3, 0": ("--train.lr=1e-3", "--train.explore=0"),
    "1e-3, 6": ("--train.lr=1e-3", "--train.explore=6"),
    "1e-3, 15": ("--train.lr=1e-3", "--train.explore=15"),
}
"""Peak rate and epochs of exploring, of 30."""


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """One photograph: grain, five lines and blobs in any colour, and three marks of the class."""
    image = Image.fromarray(rng.integers(110, 150, (SIDE, SIDE, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)

    def ink() -> tuple[int, int, int]:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        return red, green, blue

    for _ in range(5):
        x, y, dx, dy = rng.integers(0, SIDE - 24, 2).tolist() + rng.integers(6, 24, 2).tolist()
        shape = pen.line if rng.random() < 0.5 else pen.ellipse
        shape((x, y, x + dx, y + dy), fill=ink())
    for _ in range(3):
        x, y = rng.integers(0, SIDE - MARK, 2).tolist()
        if kind == "ring":
            pen.ellipse((x, y, x + MARK, y + MARK), outline=ink(), width=3)
        else:
            color, middle = ink(), MARK // 2
            pen.line((x, y + middle, x + MARK, y + middle), fill=color, width=3)
            pen.line((x + middle, y, x + middle, y + MARK), fill=color, width=3)
    return image


def write_images(folder: Path, seed: int) -> Path:
    """The CSV of the images."""
    rng = np.random.default_rng(seed)
    rows = ["image,label,split"]
    for split, count in COUNTS.items():
        for number in range(count):
            kind = ("ring", "cross")[number % 2]
            name = f"{split}-{number}.png"
            draw(kind, rng).save(folder / name)
            rows.append(f"{name},{kind},{split}")
    path = folder / "photos.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def keyhole(*words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "keyhole", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"keyhole {words[0]} ended with {done.returncode}: {done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in parser.parse_args().seeds:
            folder = Path(scratch) / f"images-{seed}"
            folder.mkdir()
            data = write_images(folder, seed)
            for name, flags in SETTINGS.items():
                run, start = Path(scratch) / f"run-{len(rows)}", time.monotonic()
                keyhole("train", data, "--patch.size=16", "--select.m=4", f"--train.seed={seed}", *flags, "--out", run)
                seconds = time.monotonic() - start
                keyhole("evaluate", run)
                found = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
                accuracy = found["tasks"]["label"]["overall"]["accuracy"]
                shown = f"{accuracy['value']:.3f} [{accuracy['low']:.3f} {accuracy['high']:.3f}]"
                rows.append((seed, name, shown, f"{seconds:.0f} s"))
                print(*rows[-1], sep="; ", flush=True)
    lines = [
        "`keyhole train photos.csv --patch.size 16 --select.m 4`, all else at its default: encoder `small` from random "
        "weights, 30 epochs, batches of 8.",
        f"Generated photographs of {SIDE} px, 36 patches each: {COUNTS['train']} to learn from, {COUNTS['val']} to "
        f"choose by, {COUNTS['test']} never seen; guessing gives 0.50.",
        "",
        "| seed | `train.lr`, `train.explore` | accuracy on the unseen [95 % interval] | time of training |",
        "|---|---|---|---|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
    ]
    print(write_result("defaults", "Defaults that follow from the encoder", lines))


if __name__ == "__main__":
    main()
