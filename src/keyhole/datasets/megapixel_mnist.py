"""Megapixel MNIST: large black canvases with five handwritten digits among many small strokes of noise.

Three digits are of one class and two of others; four tasks ask for the class of the three (`majority`), the largest
digit (`max`), the one whose upper edge is highest (`top`), and the digits that are there (`multi`).

With the pen "thin", canvases are drawn as published (Katharopoulos and Fleuret, ICML 2019; Bergner, Lippert, Mahendran,
ICLR 2023): patterns of two lines one pixel wide are made once for a split and placed anywhere, also over each other;
the digits are drawn over them. With "thick", each stroke is new, as wide as the pen of the digits, and covers nothing:
a harder problem, on which the published code stays at chance.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from keyhole.datasets.mnist import SIDE, Digits, Pixels
from keyhole.datasets.new_folder import NewFolder
from keyhole.errors import ConfigError
from keyhole.util.files import atomic_file

Pen = Literal["thin", "thick"]
COPIES, OTHERS = 3, 2
"""Digits of the majority's class, and of other classes."""
POINTS = 56
"""Points at which a thin line is sampled."""
MAX_ANGLE = math.pi / 2.5
"""Largest angle between a thin line and the horizontal, in radians."""
MIRRORED = 0.33
"""Probability that the second line of a pattern is mirrored, in x and in y."""
THICK_LINES = (2, 4)
"""Fewest and most lines of a thick stroke."""
TILE = 512
"""Side of the tiles that a canvas is stored in, in pixels."""
SPLITS = ("train", "val", "test")
MIN_SIZE = 10 * SIDE


class Canvas(NamedTuple):
    """What is drawn on a canvas, in this order; black elsewhere.

    Attributes:
        noise: patterns (k, 28, 28); of those that overlap the brighter value shows.
        noise_places: left upper corners (k, 2), x and y in pixels.
        digits: (5, 28, 28), those of the majority first; they cover the noise.
        places: their left upper corners (5, 2); no two overlap.
        labels: the classes (5,).
    """

    noise: Pixels
    noise_places: NDArray[np.int64]
    digits: Pixels
    places: NDArray[np.int64]
    labels: NDArray[np.int64]

    def tasks(self) -> tuple[int, int, int, str]:
        """Return the labels of majority, max, top and multi (classes joined by `|`)."""
        shown = self.labels.tolist()
        top = shown[int(self.places[:, 1].argmin())]  # the earlier of two that are equally high
        return shown[0], max(shown), top, "|".join(map(str, sorted(set(shown))))

    def rows(self, start: int, stop: int, size: int) -> Pixels:
        """Draw the rows from `start` to before `stop` of a canvas `size` pixels wide: uint8 (rows, size)."""
        band = np.zeros((stop - start, size), np.uint8)
        for stamps, places, over in ((self.noise, self.noise_places, False), (self.digits, self.places, True)):
            for stamp, (x, y) in zip(stamps, places.tolist(), strict=True):
                top, bottom = max(y, start), min(y + SIDE, stop)
                if top < bottom:
                    place, part = band[top - start : bottom - start, x : x + SIDE], stamp[top - y : bottom - y]
                    place[:] = part if over else np.maximum(place, part)
        return band


@dataclass(frozen=True)
class MegapixelMnist:
    """A data set of canvases.

    Attributes:
        size: width and height of a canvas in pixels; memory grows with it, not with its square.
        train, val, test: number of canvases.
        noise: strokes of noise on a canvas; with the pen "thin" also the number of different ones in a split.
        noise_pen: "thin" as published, or "thick".
        seed: everything random follows from it; the same arguments give the same bytes.

    Raises:
        ConfigError: a value is out of its range.
    """

    size: int = 1500
    train: int = 5000
    val: int = 0
    test: int = 1000
    noise: int = 50
    noise_pen: Pen = "thin"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.train, self.val, self.test) < 0 or self.train + self.val + self.test == 0:
            raise ConfigError(f"train, val, test: expected counts, not {self.train}, {self.val}, {self.test}.")
        if self.noise < 0 or self.seed < 0:
            raise ConfigError(f"noise (={self.noise}) and seed (={self.seed}) must be 0 or more.")
        if self.size < MIN_SIZE:
            raise ConfigError(f"size (={self.size}) must be at least {MIN_SIZE} pixels, so that five digits fit.")
        boxes = COPIES + OTHERS + (self.noise if self.noise_pen == "thick" else 0)
        if boxes * (2 * SIDE) ** 2 > self.size**2:
            raise ConfigError(
                f"noise (={self.noise}): thick strokes cover nothing, and so many do not fit on {self.size} x "
                f"{self.size} pixels. At most {self.size**2 // (2 * SIDE) ** 2 - COPIES - OTHERS}"
            )

    def patterns(self, split: str) -> Pixels:
        """Return the thin patterns of a split (noise, 28, 28)."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), 0])
        lines = np.stack([_thin_line(math.tan(rng.random() * MAX_ANGLE)) for _ in range(self.noise)] or [_NO_LINE])
        others = lines[rng.permutation(len(lines))]
        for axis in (1, 2):
            mirrored = rng.random(len(lines)) < MIRRORED
            others[mirrored] = np.flip(others[mirrored], axis)
        bright = rng.uniform(0.8, 1.0, lines.shape) * 255
        return np.where(lines | others, np.rint(bright), 0).astype(np.uint8)

    def canvas(self, split: str, number: int, digits: Digits, patterns: Pixels) -> Canvas:
        """Choose what is drawn on canvas `number` of a split, with its digits and patterns."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), 1 + number])
        thin = self.noise_pen == "thin"
        if thin:
            noise = patterns[rng.integers(len(patterns), size=self.noise)]
            noise_places = rng.integers(SIDE, self.size - 2 * SIDE + 1, (self.noise, 2))
        majority = int(rng.integers(10))
        samples = [
            *rng.choice(np.flatnonzero(digits.labels == majority), COPIES),
            *rng.choice(np.flatnonzero(digits.labels != majority), OTHERS),
        ]
        places = _free_places(rng, len(samples) + (0 if thin else self.noise), self.size)
        if not thin:
            noise_places = places[len(samples) :]
            noise = np.stack([thick_stroke(rng) for _ in noise_places]) if self.noise else patterns[:0]
        shown = places[: len(samples)]
        return Canvas(noise, noise_places, digits.pixels[samples], shown, digits.labels[samples])


def make_megapixel_mnist(
    out: Path, data: MegapixelMnist, digits: Mapping[str, Digits], written: Callable[[], None] = lambda: None
) -> Path:
    """Write `images/*.tif` (tiled, compressed), `digits.csv` and, last, `manifest.csv` into a folder.

    `manifest.csv` has the columns image, split, majority, max, top, multi; `digits.csv` has image, digit, and the left
    upper corner x, y of each digit in pixels.

    Args:
        out: the folder, created if needed; it must be empty.
        data: what to draw.
        digits: that the canvases of each split show, as `mnist_splits` reads them.
        written: called after each canvas, on any thread.

    Returns:
        Path of `manifest.csv`.

    Raises:
        OutputError: `out` holds something, or cannot be written.
    """
    counts = {split: count for split in SPLITS if (count := getattr(data, split))}
    jobs = [(f"images/{split}-{place:05d}.tif", split, place) for split in counts for place in range(counts[split])]
    patterns = {split: data.patterns(split) for split in counts}
    with NewFolder(out, "images") as folder, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:

        def write(job: tuple[str, str, int]) -> Canvas:
            name, split, number = job
            canvas = data.canvas(split, number, digits[split], patterns[split])
            with atomic_file(folder.file(name)) as file:
                tifffile.imwrite(
                    file,
                    _tiles(canvas, data.size),
                    shape=(data.size, data.size),
                    dtype=np.uint8,
                    tile=(TILE, TILE),
                    compression="zlib",
                    photometric="minisblack",
                    metadata=None,
                    software=False,
                    maxworkers=1,
                )
            written()
            return canvas

        drawn = dict(zip(jobs, pool.map(write, jobs), strict=True))
        corners = [
            (name, digit, *corner)
            for (name, *_), canvas in drawn.items()
            for digit, corner in zip(canvas.labels, canvas.places.tolist(), strict=True)
        ]
        folder.write_csv("digits.csv", ("image", "digit", "x", "y"), corners)
        rows = [(name, split, *canvas.tasks()) for (name, split, _), canvas in drawn.items()]
        return folder.write_csv("manifest.csv", ("image", "split", "majority", "max", "top", "multi"), rows)


def _tiles(canvas: Canvas, size: int) -> Iterator[Pixels]:
    """Yield the tiles of a canvas in the order of the file, those at the edges filled up with black."""
    for top in range(0, size, TILE):
        band = np.zeros((TILE, -(-size // TILE) * TILE), np.uint8)
        drawn = canvas.rows(top, min(size, top + TILE), size)
        band[: len(drawn), :size] = drawn
        for left in range(0, size, TILE):
            yield np.ascontiguousarray(band[:, left : left + TILE])


_NO_LINE = np.zeros((SIDE, SIDE), np.bool_)


def _thin_line(tangent: float) -> NDArray[np.bool_]:
    """Return a line (28, 28) of single pixels from the first corner, as far as it is inside."""
    x = np.linspace(0, SIDE - 1, POINTS)
    columns, rows = np.rint(x).astype(int), np.rint(x * tangent).astype(int)
    line = _NO_LINE.copy()
    line[rows[rows < SIDE], columns[rows < SIDE]] = True
    return line


def thick_stroke(rng: np.random.Generator) -> Pixels:
    """Return straight lines (28, 28) as wide and as bright as the pen of the digits, drawn four times larger."""
    large = Image.new("L", (4 * SIDE, 4 * SIDE))
    pen = ImageDraw.Draw(large)
    for _ in range(rng.integers(THICK_LINES[0], THICK_LINES[1] + 1)):
        ends = rng.integers(8, 4 * SIDE - 8, 4).tolist()
        pen.line(ends, fill=int(rng.integers(200, 256)), width=int(rng.integers(6, 13)))
    return np.asarray(large.reduce(4))


def _free_places(rng: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """Draw left upper corners (count, 2) of boxes of 28 px that do not overlap."""
    taken = np.empty((0, 2), np.int64)
    while len(taken) < count:
        place = rng.integers(0, size - SIDE + 1, 2)
        if (np.abs(taken - place) >= SIDE).any(axis=1).all():
            taken = np.vstack([taken, place])
    return taken
