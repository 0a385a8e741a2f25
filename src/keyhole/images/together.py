"""Boxes of an image without tiles that are read together, so that neighbours cost one access."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from keyhole.images.geometry import Box

MAX_WASTE = 1.5
"""Boxes are read together while the box around them has at most this many times their own pixels."""


def runs_of(boxes: Sequence[Box]) -> Iterator[tuple[int, int, Box]]:
    """Cut boxes in raster order into runs; yield start and stop of each run and the box around it."""
    if not boxes:
        return
    x, y, width, height = np.array(boxes, np.int64).reshape(-1, 4).T
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
            yield begin, first, _box(*joint)
        begin, joint, covered = first, piece, new
    yield begin, len(boxes), _box(*joint)


def _box(left: int, top: int, right: int, bottom: int) -> Box:
    return Box(left, top, right - left, bottom - top)
