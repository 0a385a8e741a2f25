"""A generated data set: handwritten digits hidden among strokes and clutter, as large image files.

Every image carries some copies of one digit, each from another handwriting sample, and the digit is the class. The
digits cover under 1 % of the image. Everything else is drawn to look alike: doodles (lines, arcs, loops left open,
dots, blobs) that are made as the digits were made, 32 x 32 bitmaps counted down to 8 x 8, and enlarged by the same
code; long strokes of the same darkness; paper with uneven light and grain. So neither a thumbnail nor an
amount of ink tells the class, and a model has to find the digits and to look at them closely.

The digits are scikit-learn's bundled 8 x 8 ones (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits",
UCI): nothing is downloaded.
"""

from __future__ import annotations

import csv
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

from keyhole.errors import ConfigError, OutputError
from keyhole.images.geometry import Box
from keyhole.util.files import writable_folder, write_atomic

Pixels = NDArray[np.uint8]

CLASSES = (0, 2, 4, 6, 7)
"""Digits that are hard to confuse even at 8 x 8; guessing one of five gives 0.20."""
COPIES = (13, 16)
"""Fewest and most copies of its digit in an image."""
MOST_COPIES = 18
"""So many of the largest digits still stay under LARGEST_SHARE."""
CLUTTER = (8, 14)
"""Fewest and most doodles on 1536 x 1536 pixels; other sizes in proportion to the area."""
STROKES = (2, 4)
"""Fewest and most long strokes across an image."""
LARGEST_SHARE = 0.01
"""The digits of an image, by their boxes, cover less than this share of it."""
SMALLEST_SIDE = 1500
"""Below this, so many digits would not stay under the share."""
QUALITY = 90
"""JPEG: a 1536 px page is 0.13 MB and decodes in some 5 ms; as PNG it is 0.66 MB and takes 18 ms."""

SCALE = (3.6, 4.2)
"""Pixels of the image per pixel of an 8 x 8 source: digits are 29 to 34 px high, and strokes 4 to 6 px wide."""
TURN = 12.0
"""Largest rotation in degrees, either way: a digit stays what it is."""
DIGIT_INK = (3.3, 5.3)
"""A doodle gets strokes until the mean of its 8 x 8 source exceeds a value in here; handwriting has 4.9 +- 0.5."""
MARGIN = 6
"""Free pixels around each digit and doodle."""

_DOODLES = {"line": 0.3, "strokes": 0.2, "arcs": 0.3, "dots": 0.1, "blob": 0.1}
"""Kinds of doodles and how often each comes."""

_PURPOSES = ("image", "labels", "doodles")

_SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}
"""Part of the handwriting samples, by their index, that each split draws from."""


class Rendered(NamedTuple):
    """One image: grey pixels (side, side), and the digits' boxes (k, 4) as x, y, width, height."""

    pixels: Pixels
    boxes: NDArray[np.int64]


def make_digits(
    out: Path,
    *,
    train: int = 320,
    val: int = 80,
    test: int = 200,
    side: int = 1536,
    seed: int = 0,
    classes: Sequence[int] = CLASSES,
    copies: tuple[int, int] = COPIES,
    clutter: tuple[int, int] = CLUTTER,
) -> Path:
    """Writes `images/*.jpg` (grey), `boxes.csv` and, last, `manifest.csv` into `out`.

    `manifest.csv` has the columns image, label, split and is what `read_manifest` reads; `boxes.csv` says where the
    digits are (image, x, y, width, height in pixels, label). Classes are balanced in each split. The splits draw from
    disjoint handwriting samples. The same arguments give the same bytes.

    Args:
        out: folder, created if need be.
        train, val, test: images of each split.
        side: width and height of the images in pixels, at least 1500.
        seed: everything random follows from it.
        classes: two or more digits out of 0 ... 9.
        copies: fewest and most copies of the digit in an image.
        clutter: fewest and most doodles on 1536 x 1536 pixels.

    Returns:
        Path of `manifest.csv`.

    Raises:
        ConfigError: an argument out of its range.
        OutputError: `out` cannot be written, or holds a data set already.
    """
    _check(train, val, test, side, seed, classes, copies, clutter)
    out = Path(out)
    manifest = out / "manifest.csv"
    if manifest.exists():
        raise OutputError(f"{manifest}: there is a data set already. Choose another folder or delete this one.")
    writable_folder(out / "images")
    samples = handwriting(classes)
    doodles = {split: scribbles(_random(seed, split, "doodles")) for split in _SHARES}

    def write(job: tuple[str, int, int]) -> tuple[str, int, NDArray[np.int64]]:
        split, number, label = job
        rng = _random(seed, split, "image", number)
        name = f"images/{split}-{number:04d}.jpg"
        pixels, boxes = render(rng, samples[split][label], doodles[split], side, copies=copies, clutter=clutter)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        write_atomic(out / name, file.getvalue())
        return name, label, boxes

    jobs = [
        (split, number, label)
        for split, count in {"train": train, "val": val, "test": test}.items()
        for number, label in enumerate(_labels(_random(seed, split, "labels"), count, classes))
    ]
    # Drawing, scaling, compressing and syncing to disk leave Python's lock, so threads are enough.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        written = list(pool.map(write, jobs))
    boxes_rows = [(name, *map(int, box), label) for name, label, boxes in written for box in boxes]
    write_atomic(out / "boxes.csv", _table(("image", "x", "y", "width", "height", "label"), boxes_rows))
    rows = [(name, label, split) for (name, label, _), (split, _, _) in zip(written, jobs, strict=True)]
    return write_atomic(manifest, _table(("image", "label", "split"), rows))


def handwriting(classes: Sequence[int] = CLASSES) -> dict[str, dict[int, NDArray[np.float64]]]:
    """The source samples (n, 8, 8), 0 ... 16, by split and digit; no sample is in two splits."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    n = len(bunch.target)
    samples: dict[str, dict[int, NDArray[np.float64]]] = {}
    for split, (start, stop) in _SHARES.items():
        part = slice(round(start * n), round(stop * n))
        images, target = bunch.images[part], bunch.target[part]
        samples[split] = {digit: images[target == digit] for digit in classes}
    return samples


def scribbles(rng: np.random.Generator, count: int = 1000) -> NDArray[np.float64]:
    """Sources of clutter (count, 8, 8), 0 ... 16, made as the digits were: 32 x 32 bitmaps, counted in 4 x 4 blocks."""
    return np.stack([_doodle(rng) for _ in range(count)])


def render(
    rng: np.random.Generator,
    samples: NDArray[np.float64],
    doodles: NDArray[np.float64],
    side: int,
    *,
    copies: tuple[int, int] = COPIES,
    clutter: tuple[int, int] = CLUTTER,
    strokes: tuple[int, int] = STROKES,
) -> Rendered:
    """Draws one image: long strokes, then digits and doodles that touch none of each other, then paper and grain.

    Args:
        rng: source of everything random.
        samples: handwriting (n, 8, 8), 0 ... 16, of the digit to hide.
        doodles: sources (n, 8, 8), 0 ... 16, of the clutter.
        side: width and height in pixels.
        copies, clutter, strokes: fewest and most of each; `clutter` is for 1536 x 1536 pixels.
    """
    digits = _hidden(rng, samples, copies, limit=LARGEST_SHARE * side * side)
    count = round(_between(rng, clutter) * (side / 1536) ** 2)
    others = [_enlarged(rng, doodles[index]) for index in rng.integers(len(doodles), size=count)]
    ink = _long_strokes(rng, side, _between(rng, strokes))
    taken: list[Box] = []
    for number, stamp in enumerate(digits + others):
        box = _free_place(rng, stamp.shape, side, taken)
        if box is None:
            # Only with far more clutter than the default is the page ever full: then it holds fewer doodles.
            assert number >= len(digits), "an empty page has no place for the digits"
            continue
        taken.append(box)
        target = ink[box.y : box.y + box.height, box.x : box.x + box.width]
        np.maximum(target, stamp, out=target)
    boxes = np.array(taken[: len(digits)], dtype=np.int64).reshape(-1, 4)
    assert (boxes[:, 2] * boxes[:, 3]).sum() < LARGEST_SHARE * side * side
    return Rendered(_on_paper(rng, ink), boxes)


def _hidden(
    rng: np.random.Generator, samples: NDArray[np.float64], copies: tuple[int, int], limit: float
) -> list[Pixels]:
    """The digit's copies as ink, each of another sample, drawn anew if they should cover `limit` pixels or more."""
    count = min(_between(rng, copies), len(samples))
    while True:
        chosen = rng.choice(len(samples), count, replace=False)
        stamps = [_enlarged(rng, samples[index]) for index in chosen]
        if sum(stamp.size for stamp in stamps) < limit:
            return stamps


def _enlarged(rng: np.random.Generator, source: NDArray[np.float64]) -> Pixels:
    """An 8 x 8 source, 0 ... 16, as ink 0 ... 255: enlarged smoothly, a little turned, cut to its box."""
    scale = rng.uniform(*SCALE)
    turn = math.radians(rng.uniform(-TURN, TURN))
    padded = Image.fromarray(np.pad(source * (255 / 16), 1).astype(np.uint8))
    size = math.ceil(10 * scale)
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    middle = size / 2
    # Output pixel -> source pixel, both measured from the middle.
    matrix = (cos, sin, 5 - (cos + sin) * middle, -sin, cos, 5 - (cos - sin) * middle)
    smooth = padded.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    ink = _EDGE[np.asarray(smooth)]
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (cut * rng.uniform(0.8, 1.0)).astype(np.uint8)


def _doodle(rng: np.random.Generator) -> NDArray[np.float64]:
    """One source (8, 8): strokes of one kind, until it has the ink of a digit."""
    kind = rng.choice(list(_DOODLES), p=list(_DOODLES.values()))
    bitmap = Image.new("L", (32, 32))
    pen = ImageDraw.Draw(bitmap)
    width = _between(rng, (3, 5))
    enough = rng.uniform(*DIGIT_INK) * 64
    x, y = rng.integers(2, 30, 2).tolist()
    opening = _between(rng, (0, 359))
    while (ink := np.asarray(bitmap)).sum() < enough:
        to_x, to_y = rng.integers(2, 30, 2).tolist()
        if kind == "line":
            pen.line((x, y, to_x, to_y), fill=1, width=width)
            x, y = to_x, to_y
        elif kind == "strokes":
            pen.line((to_x, to_y, *rng.integers(2, 30, 2).tolist()), fill=1, width=width)
        elif kind == "arcs":  # all open to one side: together they must not close to a zero
            left, top, right, bottom = rng.integers((0, 0, 18, 18), (14, 14, 32, 32)).tolist()
            start = opening + _between(rng, (-30, 30))
            pen.arc((left, top, right, bottom), start, start + _between(rng, (90, 200)), fill=1, width=width)
        elif kind == "dots":
            pen.ellipse((to_x - width, to_y - width, to_x + width, to_y + width), fill=1)
        else:
            pen.polygon([(16, 16), (x, y), (to_x, to_y)], fill=1, outline=1, width=width)
            x, y = to_x, to_y
    return ink.reshape(8, 4, 8, 4).sum(axis=(1, 3)).astype(np.float64)


def _long_strokes(rng: np.random.Generator, side: int, count: int) -> Pixels:
    """Ink (side, side) of `count` smooth strokes as dark as the digits, each some hundred pixels long."""
    bitmap = Image.new("L", (side, side))
    pen = ImageDraw.Draw(bitmap)
    t = np.linspace(0, 1, 24)[:, None]
    for _ in range(count):
        start = rng.uniform(0, side, 2)
        bend, end = start + rng.uniform(-side / 3, side / 3, (2, 2))
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        points = [(x, y) for x, y in curve.tolist()]
        pen.line(points, fill=_between(rng, (204, 255)), width=_between(rng, (7, 10)), joint="curve")
    # Shrunk and enlarged, the jagged edges of the pen become as soft as those of the digits.
    return np.array(bitmap.reduce(2).resize((side, side), Image.Resampling.BILINEAR))


def _free_place(rng: np.random.Generator, shape: tuple[int, ...], side: int, taken: Sequence[Box]) -> Box | None:
    """A random place for ink of `shape`, with a margin to everything placed before; None if 100 tries find none."""
    height, width = shape
    others = np.array(taken, dtype=np.int64).reshape(-1, 4)
    for x, y in rng.integers(MARGIN, (side - width - MARGIN, side - height - MARGIN), (100, 2)):
        beside = (x + width + MARGIN <= others[:, 0]) | (others[:, 0] + others[:, 2] + MARGIN <= x)
        above = (y + height + MARGIN <= others[:, 1]) | (others[:, 1] + others[:, 3] + MARGIN <= y)
        if (beside | above).all():
            return Box(int(x), int(y), width, height)
    return None


def _on_paper(rng: np.random.Generator, ink: Pixels) -> Pixels:
    """Dark ink (side, side) on light paper with uneven light and grain."""
    side = ink.shape[0]
    across, down = (np.interp(np.linspace(0, 5, side), range(6), rng.uniform(104, 116, 6)) for _ in range(2))
    page = Image.fromarray(np.add.outer(down.astype(np.uint8), across.astype(np.uint8)))
    page.paste(int(rng.integers(40, 80)), mask=Image.fromarray(ink))
    # The page lies in 40 ... 232 and the grain in -3 ... 3, so that adding them as bytes never wraps around.
    return np.asarray(page) + _GRAIN[rng.integers(0, 256, (side, side), dtype=np.uint8)]


def _random(seed: int, split: str, purpose: str, number: int = 0) -> np.random.Generator:
    """A stream of its own for every image and purpose, whichever thread draws it and however many images there are."""
    return np.random.default_rng([number, list(_SHARES).index(split), _PURPOSES.index(purpose), seed])


def _between(rng: np.random.Generator, ends: tuple[int, int]) -> int:
    return int(rng.integers(ends[0], ends[1] + 1))


def _labels(rng: np.random.Generator, count: int, classes: Sequence[int]) -> list[int]:
    """`count` labels in random order, as many of each class as can be."""
    balanced = np.resize(np.array(classes), count)
    return [int(label) for label in rng.permutation(balanced)]


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _check(
    train: int,
    val: int,
    test: int,
    side: int,
    seed: int,
    classes: Sequence[int],
    copies: tuple[int, int],
    clutter: tuple[int, int],
) -> None:
    if min(train, val, test) < 0 or train + val + test == 0:
        raise ConfigError(f"train, val, test: expected counts of images, not {train}, {val}, {test}.")
    if side < SMALLEST_SIDE:
        raise ConfigError(f"side: must be at least {SMALLEST_SIDE} pixels, not {side}, for digits to stay under 1 %.")
    if seed < 0:
        raise ConfigError(f"seed: must be 0 or more, not {seed}.")
    if len(set(classes)) != len(classes) or len(classes) < 2 or not set(classes) <= set(range(10)):
        raise ConfigError(f"classes: expected two or more different digits out of 0 ... 9, not {tuple(classes)}.")
    if not 1 <= copies[0] <= copies[1] <= MOST_COPIES:
        raise ConfigError(
            f"copies: expected fewest and most within 1 ... {MOST_COPIES}, not {copies}; more could exceed 1 %."
        )
    if not 0 <= clutter[0] <= clutter[1]:
        raise ConfigError(f"clutter: expected fewest and most, 0 or more, not {clutter}.")


_STEP = np.clip((np.arange(256) / 255 - 0.25) / 0.4, 0, 1)
_EDGE = np.round(255 * _STEP**2 * (3 - 2 * _STEP)).astype(np.uint8)
"""Ink from smoothed coverage: a soft step, so that an enlarged digit has a pen's edges and not a blur."""

_GRAIN = np.clip(np.round(np.random.default_rng(0).normal(0, 1, 256)), -3, 3).astype(np.int8).view(np.uint8)
"""Grain of the paper by a random byte: normal, standard deviation 1, as bytes modulo 256."""
