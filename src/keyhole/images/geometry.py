"""Sizes and boxes, and which boxes are read together. `l0_` are level-0 pixels, `lv_` pixels of a level."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_WASTE = 1.5
"""Boxes are read together while the box around them has at most this many times their own pixels."""


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class Box(NamedTuple):
    """Left, top, width and height in pixels of a level; may reach over the border."""

    x: int
    y: int
    width: int
    height: int


class Level(NamedTuple):
    """One resolution of an image: its size in its own pixels, and level-0 pixels per pixel of it."""

    size: Size
    downsample: float


def downsample_of(l0_size: Size, lv_size: Size) -> float:
    """Return level-0 pixels per pixel of a level: a whole number if rounding of the sizes explains the difference."""
    quotient = (l0_size.width / lv_size.width + l0_size.height / lv_size.height) / 2
    whole = round(quotient)
    if whole >= 1 and all(abs(l0 / whole - lv) < 1 for l0, lv in zip(l0_size, lv_size, strict=True)):
        return float(whole)
    return quotient


def same_shape(l0_size: Size, lv_size: Size) -> bool:
    """Return whether the second can be a level of the first: smaller, by one factor in both directions.

    Each side may be off by less than a pixel, since writers round in different ways.
    """
    if lv_size.width >= l0_size.width or lv_size.height > l0_size.height or min(lv_size) < 1:
        return False
    lowest = max(l0 / (lv + 1) for l0, lv in zip(l0_size, lv_size, strict=True))
    highest = min(l0 / (lv - 1) if lv > 1 else float("inf") for l0, lv in zip(l0_size, lv_size, strict=True))
    return lowest < highest


def runs_of(boxes: Sequence[Box]) -> Iterator[tuple[int, int, Box]]:
    """Cut boxes in raster order into runs; yield start and stop of each run and the box around it."""
    if not boxes:
        return
    flat = np.fromiter(itertools.chain.from_iterable(boxes), np.int64, 4 * len(boxes))  # faster than np.array
    x, y, width, height = flat.reshape(-1, 4).T
    right, bottom = x + width, y + height
    gaps = (np.diff(y) != 0) | (np.diff(x) < 0) | (np.diff(x) > MAX_WASTE * width[:-1])
    bounds = [0, *(np.flatnonzero(gaps) + 1).tolist(), len(boxes)]
    begin, joint, covered = 0, (0, 0, 0, 0), 0
    for first, last in itertools.pairwise(bounds):  # pieces of one row
        piece = int(x[first]), int(y[first]), int(right[first:last].max()), int(bottom[first:last].max())
        new = (piece[2] - piece[0]) * (piece[3] - piece[1])
        if first > begin:
            wider = min(joint[0], piece[0]), joint[1], max(joint[2], piece[2]), max(joint[3], piece[3])
            more = covered + (piece[2] - piece[0]) * min(piece[3] - piece[1], piece[3] - joint[3])
            if (wider[2] - wider[0]) * (wider[3] - wider[1]) <= MAX_WASTE * more:
                joint, covered = wider, more
                continue
            yield begin, first, Box(joint[0], joint[1], joint[2] - joint[0], joint[3] - joint[1])
        begin, joint, covered = first, piece, new
    yield begin, len(boxes), Box(joint[0], joint[1], joint[2] - joint[0], joint[3] - joint[1])
