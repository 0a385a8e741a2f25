"""Megapixel MNIST as the published generator draws it, whose noise decides how hard the problem is.

    python benchmarks/published_canvases.py FOLDER [--train 5000] [--test 1000] [--side 1500] [--seed 0] [--mnist DIR]

Facts of the generator (Bergner, Lippert, Mahendran, ICLR 2023; the data of Katharopoulos and Fleuret, ICML 2019): fifty
patterns of 28 px are made once for a split, of two straight lines one pixel wide each; a canvas places fifty of them,
drawn with replacement, anywhere but in a margin of 28 px, also over each other. Five digits overwrite what is under
them: three of one class, drawn evenly, and two of the samples of all others. Training canvases show MNIST's training
digits, the others its test digits.

The test canvases are of the split `val` in the manifest, so that `keyhole train` measures on them after every epoch, as
the published code does. Nothing is chosen by that, but the figure of the best epoch would be a choice.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from megapixel_mnist import (
    COPIES,
    MNIST,
    NOISE,
    OTHERS,
    SIDE,
    Digits,
    Labels,
    Pixels,
    free_places,
    labels_of,
    read_mnist,
    source_digits,
    write_drawn,
)

POINTS = 56
"""At which a line is sampled."""
STEEPEST = math.pi / 2.5
"""Largest angle between a line and the horizontal, in radians."""
MIRRORED = 0.33
"""How often the second line is mirrored, in x and in y."""
SPLITS = ("train", "val")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--side", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mnist", type=Path, default=MNIST, help="folder of MNIST's four files")
    options = parser.parse_args()
    counts = {"train": options.train, "val": options.test}
    print(write_published(options.folder, counts, options.side, options.seed, options.mnist))


def write_published(
    folder: Path, counts: Mapping[str, int], side: int = 1500, seed: int = 0, mnist: Path = MNIST
) -> Path:
    """Writes canvases and, last, `manifest.csv`; the same arguments give the same bytes.

    Args:
        folder: created if need be.
        counts: canvases of `train`, and of `val`, which show the test digits.
        side: width and height in pixels.
        seed: everything random follows from it.
        mnist: folder of MNIST's files; without them scikit-learn's digits are shown, enlarged.
    """
    digits = published_digits(mnist)
    patterns = {split: draw_patterns(np.random.default_rng([seed, SPLITS.index(split)])) for split in SPLITS}

    def draw(split: str, number: int) -> tuple[Pixels, Labels]:
        rng = np.random.default_rng([seed, SPLITS.index(split), 1 + number])
        return draw_canvas(rng, digits[split], patterns[split], side)

    return write_drawn(folder, counts, draw)


def published_digits(mnist: Path) -> dict[str, Digits]:
    """All training digits for `train`, the test digits for `val`."""
    if not mnist.is_dir():
        found = source_digits(mnist)
        return {"train": found["train"], "val": found["test"]}
    return {"train": read_mnist(mnist, "train"), "val": read_mnist(mnist, "t10k")}


def draw_patterns(rng: np.random.Generator, count: int = NOISE) -> Pixels:
    """Noise (count, 28, 28): in each a line from a corner, and another pattern's line, which may be mirrored."""
    lines = np.stack([draw_line(math.tan(rng.random() * STEEPEST)) for _ in range(count)])
    others = lines[rng.permutation(count)]
    for axis in (1, 2):
        mirrored = rng.random(count) < MIRRORED
        others[mirrored] = np.flip(others[mirrored], axis)
    bright = rng.uniform(0.8, 1.0, lines.shape) * 255
    return np.where(lines | others, bright, 0).astype(np.uint8)


def draw_line(tangent: float) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """A line (28, 28) of single pixels from the first corner, as far as it lies inside."""
    x = np.linspace(0, SIDE - 1, POINTS)
    columns, rows = np.rint(x).astype(int), np.rint(x * tangent).astype(int)
    line = np.zeros((SIDE, SIDE), np.bool_)
    line[rows[rows < SIDE], columns[rows < SIDE]] = True
    return line


def draw_canvas(rng: np.random.Generator, digits: Digits, patterns: Pixels, side: int) -> tuple[Pixels, Labels]:
    """One canvas (side, side) and its labels."""
    canvas = np.zeros((side, side), np.uint8)
    for number, (x, y) in zip(
        rng.integers(len(patterns), size=NOISE), rng.integers(SIDE, side - 2 * SIDE + 1, (NOISE, 2)), strict=True
    ):
        place = canvas[y : y + SIDE, x : x + SIDE]
        np.maximum(place, patterns[number], out=place)
    majority = int(rng.integers(10))
    samples = [
        *rng.choice(np.flatnonzero(digits.labels == majority), COPIES),
        *rng.choice(np.flatnonzero(digits.labels != majority), OTHERS),
    ]
    places = free_places(rng, len(samples), side)
    for sample, (x, y) in zip(samples, places, strict=True):
        canvas[y : y + SIDE, x : x + SIDE] = digits.pixels[sample]
    return canvas, labels_of([int(digits.labels[sample]) for sample in samples], places)


if __name__ == "__main__":
    main()
