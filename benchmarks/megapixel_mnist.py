"""Megapixel MNIST: canvases with five digits among line noise, written as grey PNG files with a manifest.

    python benchmarks/megapixel_mnist.py FOLDER [--train 5000] [--val 0] [--test 1000] [--side 1500] [--seed 0]

Three digits of a canvas are of one class and two of others; none touches another. Fifty patterns of straight lines of
the digits' size lie among them; everything else is black. The tasks are those of the paper (Bergner, Lippert,
Mahendran, ICLR 2023): `majority` the class of the three, `max` the largest digit, `top` the one whose box is highest,
`multi` which digits there are. The noise is our own rendering of "line noise", which is drawn anew for
each canvas; `published_canvases.py` has the published generator's.

The digits are the 28 px ones of MNIST where its files are given, else the 8 x 8 ones that scikit-learn carries,
enlarged. Splits never share a handwriting sample.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from keyhole.util.files import writable_folder, write_atomic

Pixels = NDArray[np.uint8]
Labels = tuple[int, int, int, str]
"""Of a canvas: majority, max, top, multi (classes joined by `|`)."""

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
SIDE = 28
"""Of a digit and of a noise pattern, in pixels."""
COPIES = 3
OTHERS = 2
NOISE = 50
LINES = (2, 4)
"""Fewest and most lines of a noise pattern."""
SPLITS = ("train", "val", "test")
VAL_DIGITS = 5000
"""Of the training digits, the last ones: only the canvases of `val` show them."""


class Digits(NamedTuple):
    """Digits (n, 28, 28) that a split draws from, and their classes (n,)."""

    pixels: Pixels
    labels: NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--val", type=int, default=0)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--side", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = {split: getattr(options, split) for split in SPLITS}
    print(write_canvases(options.folder, counts, options.side, options.seed))


def write_canvases(folder: Path, counts: Mapping[str, int], side: int = 1500, seed: int = 0) -> Path:
    """Writes `images/*.png` and, last, `manifest.csv` with image, split and the four tasks.

    The same arguments give the same bytes.

    Args:
        folder: created if need be.
        counts: canvases of each of the splits.
        side: width and height in pixels.
        seed: everything random follows from it.
    """
    digits = source_digits()

    def draw(split: str, number: int) -> tuple[Pixels, Labels]:
        return draw_canvas(np.random.default_rng([seed, SPLITS.index(split), number]), digits[split], side)

    return write_drawn(folder, counts, draw)


def write_drawn(folder: Path, counts: Mapping[str, int], draw: Callable[[str, int], tuple[Pixels, Labels]]) -> Path:
    """Writes what `draw` gives for each (split, number), on several threads, and the manifest."""
    writable_folder(folder / "images")

    def write(job: tuple[str, int]) -> tuple[object, ...]:
        split, number = job
        pixels, labels = draw(split, number)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        name = f"images/{split}-{number:05d}.png"
        (folder / name).write_bytes(file.getvalue())
        return name, split, *labels

    jobs = [(split, number) for split in SPLITS for number in range(counts.get(split, 0))]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(write, jobs))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "split", "majority", "max", "top", "multi"))
    writer.writerows(rows)
    return write_atomic(folder / "manifest.csv", text.getvalue())


def has_mnist() -> bool:
    return MNIST.is_dir()


def source_digits(mnist: Path = MNIST) -> dict[str, Digits]:
    """What each split draws from."""
    if not mnist.is_dir():
        return _bundled_digits()
    train, test = read_mnist(mnist, "train"), read_mnist(mnist, "t10k")
    return {
        "train": Digits(train.pixels[:-VAL_DIGITS], train.labels[:-VAL_DIGITS]),
        "val": Digits(train.pixels[-VAL_DIGITS:], train.labels[-VAL_DIGITS:]),
        "test": test,
    }


def read_mnist(folder: Path, name: str) -> Digits:
    """MNIST's idx files of `train` or `t10k`: 16 bytes of header before the pixels, 8 before the labels."""
    pixels = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    return Digits(
        np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, SIDE, SIDE),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


def _bundled_digits() -> dict[str, Digits]:
    """scikit-learn's digits, enlarged to 24 px inside a border of 2."""
    from keyhole.datasets.digits import handwriting

    found = {}
    for split, samples in handwriting(range(10)).items():
        pixels = [
            np.pad(
                np.asarray(Image.fromarray(np.uint8(sample * (255 / 16))).resize((24, 24), Image.Resampling.BICUBIC)), 2
            )
            for digit in range(10)
            for sample in samples[digit]
        ]
        labels = np.repeat(range(10), [len(samples[digit]) for digit in range(10)])
        found[split] = Digits(np.stack(pixels), labels.astype(np.int64))
    return found


def draw_canvas(rng: np.random.Generator, digits: Digits, side: int) -> tuple[Pixels, Labels]:
    """One canvas (side, side) and its labels."""
    majority, *others = rng.choice(10, 1 + OTHERS, replace=False).tolist()
    shown = [majority] * COPIES + others
    places = free_places(rng, len(shown) + NOISE, side)
    canvas = np.zeros((side, side), np.uint8)
    for digit, (x, y) in zip(shown, places, strict=False):
        canvas[y : y + SIDE, x : x + SIDE] = digits.pixels[rng.choice(np.flatnonzero(digits.labels == digit))]
    for x, y in places[len(shown) :]:
        canvas[y : y + SIDE, x : x + SIDE] = draw_noise(rng)
    return canvas, labels_of(shown, places)


def labels_of(shown: Sequence[int], places: Sequence[tuple[int, int]]) -> Labels:
    """The labels of digits, the majority first, with their left upper corners (x, y)."""
    top = shown[min(range(len(shown)), key=lambda number: places[number][1])]
    return shown[0], max(shown), top, "|".join(map(str, sorted(set(shown))))


def draw_noise(rng: np.random.Generator) -> Pixels:
    """Straight lines (28, 28) as wide and as bright as the pen of the digits, drawn four times larger and shrunk."""
    large = Image.new("L", (4 * SIDE, 4 * SIDE))
    pen = ImageDraw.Draw(large)
    for _ in range(rng.integers(LINES[0], LINES[1] + 1)):
        ends = rng.integers(8, 4 * SIDE - 8, 4).tolist()
        pen.line(ends, fill=int(rng.integers(200, 256)), width=int(rng.integers(6, 13)))
    return np.asarray(large.reduce(4))


def free_places(rng: np.random.Generator, count: int, side: int) -> list[tuple[int, int]]:
    """Left upper corners of boxes of 28 px that do not overlap."""
    taken = np.empty((0, 2), np.int64)
    while len(taken) < count:
        place = rng.integers(0, side - SIDE + 1, 2)
        if (np.abs(taken - place) >= SIDE).any(axis=1).all():
            taken = np.vstack([taken, place])
    return [(int(x), int(y)) for x, y in taken]


if __name__ == "__main__":
    main()
