"""Generated images of handwritten digits that are hidden among strokes and clutter, to try training on.

An image holds copies of one digit, its class, on less than 1 % of its area. The clutter is drawn and enlarged like the
digits, which are those of scikit-learn: neither a thumbnail nor the amount of ink shows the class.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from keyhole.datasets.new_folder import NewFolder
from keyhole.errors import ConfigError
from keyhole.images.geometry import Box
from keyhole.util.files import write_atomic

Pixels = NDArray[np.uint8]

CLASSES = (0, 2, 4, 6, 7)  # digits that are hard to confuse even at 8 x 8; guessing gives 0.20
COPIES = (13, 16)  # fewest and most copies of its digit in an image
CLUTTER = (8, 14)  # fewest and most doodles on 1536 x 1536 pixels; other sizes in proportion to the area
STROKES = (2, 4)
MAX_DIGIT_SHARE = 0.01
MIN_SIDE = 1500  # in a smaller image the digits could exceed their share
QUALITY = 90
SCALE = (3.6, 4.2)  # pixels of the image per pixel of an 8 x 8 source
MAX_TURN = 12.0  # degrees: a digit keeps its meaning
DIGIT_INK = (3.3, 5.3)
"""Range of the mean of a doodle's 8 x 8 source, after which it gets no more strokes; handwriting has 4.9 +- 0.5."""
MARGIN = 6
_DOODLES = {"line": 0.3, "strokes": 0.2, "arcs": 0.3, "dots": 0.1, "blob": 0.1}  # probabilities
_PURPOSES = ("image", "labels", "doodles")
_SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}
"""The part of the handwriting samples, by index, that each split draws from."""


class Rendered(NamedTuple):
    """Grey pixels (side, side) of an image, and the boxes (k, 4) of its digits: x, y, width, height."""

    pixels: Pixels
    boxes: NDArray[np.int64]


def make_digits(
    out: Path, *, train: int = 320, val: int = 80, test: int = 200, side: int = 1536, seed: int = 0
) -> Path:
    """Write `images/*.jpg` (grey), `boxes.csv` and, last, `manifest.csv` into a folder.

    `manifest.csv` has the columns image, label, split; `read_manifest` reads it. `boxes.csv` has the boxes of the
    digits (image, x, y, width, height in pixels, label). Classes are balanced in each split. The splits draw from
    disjoint handwriting samples. The same arguments give the same bytes.

    Args:
        out: the folder, created if needed; it must be empty.
        train: number of training images.
        val: number of validation images.
        test: number of test images.
        side: width and height of the images in pixels, at least 1500.
        seed: seed of everything random.

    Returns:
        Path of `manifest.csv`.

    Raises:
        ConfigError: an argument is out of its range.
        OutputError: `out` holds something, or cannot be written.

    Example:
        >>> from pathlib import Path
        >>> manifest = make_digits(Path("digits"), train=2, val=0, test=1)
        >>> len(manifest.read_text().splitlines())
        4
    """
    if min(train, val, test) < 0 or train + val + test == 0:
        raise ConfigError(f"train, val, test: expected counts of images, not {train}, {val}, {test}.")
    if side < MIN_SIDE:
        raise ConfigError(f"side: must be at least {MIN_SIDE} pixels, not {side}, for digits to stay under 1 %.")
    if seed < 0:
        raise ConfigError(f"seed: must be 0 or more, not {seed}.")
    rows = [
        (f"images/{split}-{number:04d}.jpg", int(label), split, number)
        for split, count in {"train": train, "val": val, "test": test}.items()
        for number, label in enumerate(_random(seed, split, "labels").permutation(np.resize(np.array(CLASSES), count)))
    ]
    with NewFolder(Path(out), "images") as folder, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        samples = handwriting()
        doodles = {split: scribbles(_random(seed, split, "doodles")) for split in _SHARES}

        def write(row: tuple[str, int, str, int]) -> list[list[int]]:
            name, label, split, number = row
            page = render(_random(seed, split, "image", number), samples[split][label], doodles[split], side)
            file = io.BytesIO()
            Image.fromarray(page.pixels).save(file, "JPEG", quality=QUALITY)
            write_atomic(folder.file(name), file.getvalue())
            return page.boxes.tolist()

        boxes = [
            (name, *box, label)
            for (name, label, *_), found in zip(rows, pool.map(write, rows), strict=True)
            for box in found
        ]
        folder.write_csv("boxes.csv", ["image", "x", "y", "width", "height", "label"], boxes)
        return folder.write_csv("manifest.csv", ["image", "label", "split"], [row[:3] for row in rows])


def handwriting(classes: Sequence[int] = CLASSES) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Return the source samples (n, 8, 8), 0 ... 16, by split and digit; no sample is in two splits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    n = len(bunch.target)
    parts = {split: slice(round(start * n), round(stop * n)) for split, (start, stop) in _SHARES.items()}
    return {
        split: {digit: bunch.images[part][bunch.target[part] == digit] for digit in classes}
        for split, part in parts.items()
    }


def scribbles(rng: np.random.Generator, count: int = 1000) -> NDArray[np.float64]:
    """Draw sources of clutter (count, 8, 8), 0 ... 16, from 32 x 32 bitmaps, as the digits were made."""
    return np.stack([_doodle(rng) for _ in range(count)])


def render(
    rng: np.random.Generator,
    samples: NDArray[np.float64],
    doodles: NDArray[np.float64],
    side: int,
    *,
    clutter: tuple[int, int] = CLUTTER,
    strokes: tuple[int, int] = STROKES,
) -> Rendered:
    """Hide digits of `samples` (n, 8, 8), 0 ... 16, among strokes and `doodles` (n, 8, 8); no two of them overlap."""
    copies = min(_between(rng, COPIES), len(samples))
    digits: list[Pixels] = []
    while not digits or sum(stamp.size for stamp in digits) >= MAX_DIGIT_SHARE * side * side:
        digits = [enlarged(rng, samples[index]) for index in rng.choice(len(samples), copies, replace=False)]
    count = round(_between(rng, clutter) * (side / 1536) ** 2)
    others = [enlarged(rng, doodles[index]) for index in rng.integers(len(doodles), size=count)]
    ink = _long_strokes(rng, side, _between(rng, strokes))
    taken: list[Box] = []
    for number, stamp in enumerate(digits + others):
        box = _free_place(rng, stamp.shape, side, taken)
        if box is None:  # the page is full: it gets fewer doodles
            assert number >= len(digits), "an empty page has no place for the digits"
            continue
        taken.append(box)
        target = ink[box.y : box.y + box.height, box.x : box.x + box.width]
        np.maximum(target, stamp, out=target)
    boxes = np.array(taken[: len(digits)], dtype=np.int64).reshape(-1, 4)
    assert (boxes[:, 2] * boxes[:, 3]).sum() < MAX_DIGIT_SHARE * side * side
    return Rendered(_on_paper(rng, ink), boxes)


def enlarged(rng: np.random.Generator, source: NDArray[np.float64]) -> Pixels:
    """Turn an 8 x 8 source, 0 ... 16, into ink 0 ... 255: enlarged smoothly, rotated a little, cut to its box."""
    scale = rng.uniform(*SCALE)
    turn = math.radians(rng.uniform(-MAX_TURN, MAX_TURN))
    padded = Image.fromarray(np.pad(source * (255 / 16), 1).astype(np.uint8))
    size = math.ceil(10 * scale)
    cos, sin, middle = math.cos(turn) / scale, math.sin(turn) / scale, size / 2
    matrix = (cos, sin, 5 - (cos + sin) * middle, -sin, cos, 5 - (cos - sin) * middle)
    smooth = padded.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    ink = _EDGE[np.asarray(smooth)]
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (cut * rng.uniform(0.8, 1.0)).astype(np.uint8)


def _doodle(rng: np.random.Generator) -> NDArray[np.float64]:
    shape = rng.choice(list(_DOODLES), p=list(_DOODLES.values()))
    bitmap = Image.new("L", (32, 32))
    pen = ImageDraw.Draw(bitmap)
    width = _between(rng, (3, 5))
    enough = rng.uniform(*DIGIT_INK) * 64
    x, y = rng.integers(2, 30, 2).tolist()
    opening = _between(rng, (0, 359))
    while (ink := np.asarray(bitmap)).sum() < enough:
        to_x, to_y = rng.integers(2, 30, 2).tolist()
        if shape == "line":
            pen.line((x, y, to_x, to_y), fill=1, width=width)
            x, y = to_x, to_y
        elif shape == "strokes":
            pen.line((to_x, to_y, *rng.integers(2, 30, 2).tolist()), fill=1, width=width)
        elif shape == "arcs":  # all open to one side: together they must not look like a zero
            left, top, right, bottom = rng.integers((0, 0, 18, 18), (14, 14, 32, 32)).tolist()
            start = opening + _between(rng, (-30, 30))
            pen.arc((left, top, right, bottom), start, start + _between(rng, (90, 200)), fill=1, width=width)
        elif shape == "dots":
            pen.ellipse((to_x - width, to_y - width, to_x + width, to_y + width), fill=1)
        else:
            pen.polygon([(16, 16), (x, y), (to_x, to_y)], fill=1, outline=1, width=width)
            x, y = to_x, to_y
    return ink.reshape(8, 4, 8, 4).sum(axis=(1, 3)).astype(np.float64)


def _long_strokes(rng: np.random.Generator, side: int, count: int) -> Pixels:
    bitmap = Image.new("L", (side, side))
    pen = ImageDraw.Draw(bitmap)
    t = np.linspace(0, 1, 24)[:, None]
    for _ in range(count):
        start = rng.uniform(0, side, 2)
        bend, end = start + rng.uniform(-side / 3, side / 3, (2, 2))
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        pen.line(curve.ravel().tolist(), fill=_between(rng, (204, 255)), width=_between(rng, (7, 10)), joint="curve")
    # Shrinking and enlarging makes the jagged edges of the pen as soft as those of the digits.
    return np.array(bitmap.reduce(2).resize((side, side), Image.Resampling.BILINEAR))


def _free_place(rng: np.random.Generator, shape: tuple[int, ...], side: int, taken: Sequence[Box]) -> Box | None:
    height, width = shape
    others = np.array(taken, dtype=np.int64).reshape(-1, 4)
    for x, y in rng.integers(MARGIN, (side - width - MARGIN, side - height - MARGIN), (100, 2)):
        beside = (x + width + MARGIN <= others[:, 0]) | (others[:, 0] + others[:, 2] + MARGIN <= x)
        above = (y + height + MARGIN <= others[:, 1]) | (others[:, 1] + others[:, 3] + MARGIN <= y)
        if (beside | above).all():
            return Box(int(x), int(y), width, height)
    return None


def _on_paper(rng: np.random.Generator, ink: Pixels) -> Pixels:
    side = ink.shape[0]
    across, down = (np.interp(np.linspace(0, 5, side), range(6), rng.uniform(104, 116, 6)) for _ in range(2))
    page = Image.fromarray(np.add.outer(down.astype(np.uint8), across.astype(np.uint8)))
    page.paste(int(rng.integers(40, 80)), mask=Image.fromarray(ink))
    # The page has values 40 ... 232 and the grain -3 ... 3, so that their sum as bytes does not wrap around.
    return np.asarray(page) + _GRAIN[rng.integers(0, 256, (side, side), dtype=np.uint8)]


def _random(seed: int, split: str, purpose: str, number: int = 0) -> np.random.Generator:
    return np.random.default_rng([number, list(_SHARES).index(split), _PURPOSES.index(purpose), seed])


def _between(rng: np.random.Generator, ends: tuple[int, int]) -> int:
    return int(rng.integers(ends[0], ends[1] + 1))


_STEP = np.clip((np.arange(256) / 255 - 0.25) / 0.4, 0, 1)
_EDGE = np.round(255 * _STEP**2 * (3 - 2 * _STEP)).astype(np.uint8)
"""Ink by smoothed coverage: a soft step gives an enlarged digit the sharp edges of a pen."""
_GRAIN = np.clip(np.round(np.random.default_rng(0).normal(0, 1, 256)), -3, 3).astype(np.int8).view(np.uint8)
"""Grain of the paper by a random byte."""
