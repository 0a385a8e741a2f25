"""Outlines -> which cells of a grid they cover: the even-odd rule at the centres, or every cell that is touched.

Plain numpy: a drawing library fills the outline itself too, so that a polygon grows by half a pixel all around.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Edges = NDArray[np.float64]
"""(k, 4): x and y of where an edge begins, x and y of where it ends."""
Outline = list[Edges]
"""The edges of an outer ring, then of each hole in it."""

_BLOCK = 1 << 18
"""Crossings of edges and rows worked on at once; bounds memory, not the result."""


def fill(
    outlines: Sequence[Outline], box: tuple[float, ...], shape: tuple[int, int], touched: bool
) -> NDArray[np.bool_]:
    """Mask (rows, columns): the cells of a grid of `shape` over `box` that the outlines cover together.

    Args:
        outlines: in any coordinates.
        box: x, y, width and height in the same; what lies outside is cut off.
        shape: rows and columns of the grid.
        touched: every cell that shares area with an outline, and not only those whose centre is inside.
    """
    mask = np.zeros(shape, bool)
    for outline in outlines:
        place = _around(outline[0], box, shape)  # thousands of small outlines must not each cost the whole grid
        part = mask[place]
        if part.size == 0:
            continue
        corner = np.tile([place[1].start, place[0].start], 2)
        outer, *holes = (_onto(edges, box, shape, part.shape, corner) for edges in outline)
        covered = _inside(outer, part.shape)
        if touched:
            covered |= _crossed(outer, part.shape)
        for hole in holes:
            free = _inside(hole, part.shape)
            covered &= ~(free & ~_crossed(hole, part.shape)) if touched else ~free
        part |= covered
    return mask


def _around(edges: Edges, box: tuple[float, ...], shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the cells that an outer ring may cover."""
    spans = []
    for start, extent, cells, values in (
        (box[1], box[3], shape[0], edges[:, 1]),
        (box[0], box[2], shape[1], edges[:, 0]),
    ):
        low, high = (np.array([values.min(), values.max()]) - start) * cells / extent
        first, last = np.clip([np.floor(low) - 1, np.ceil(high) + 1], 0, cells).astype(int).tolist()
        spans.append(slice(first, max(first, last)))
    return spans[0], spans[1]


def _onto(
    edges: Edges, box: tuple[float, ...], shape: tuple[int, int], part: tuple[int, ...], corner: NDArray[np.int64]
) -> Edges:
    """Edges in cells from `corner` on, without those above, below and right of the part, which change nothing in it."""
    x, y, width, height = box
    onto: Edges = (edges - np.tile([x, y], 2)) * np.tile([shape[1] / width, shape[0] / height], 2) - corner
    upper, lower = np.minimum(onto[:, 1], onto[:, 3]), np.maximum(onto[:, 1], onto[:, 3])
    return onto[(upper < part[0]) & (lower > 0) & (np.minimum(onto[:, 0], onto[:, 2]) < part[1])]


def _inside(edges: Edges, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Cells whose centre is inside, by the even-odd rule: right of every crossing of its row, in and out change."""
    rows, columns = shape
    (x0, y0, x1, y1) = edges.T
    # rows r with a centre r + 0.5 from the upper end on and above the lower, so that no corner counts twice
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, rows).astype(np.int64)
    count = np.maximum(np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, rows).astype(np.int64) - first, 0)
    changes = np.zeros(rows * (columns + 1), bool)
    for part in _blocks(count):
        edge, step = _repeated(count, part)
        row = first[edge] + step
        x = x0[edge] + (row + 0.5 - y0[edge]) / (y1 - y0)[edge] * (x1 - x0)[edge]
        column = np.clip(np.ceil(x - 0.5), 0, columns).astype(np.int64)
        changes ^= np.bincount(row * (columns + 1) + column, minlength=len(changes)) % 2 == 1
    inside: NDArray[np.bool_] = np.logical_xor.accumulate(changes.reshape(rows, -1), axis=1)[:, :columns]
    return inside


def _crossed(edges: Edges, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Cells through whose inside an edge runs; one that runs exactly between two cells is in neither."""
    rows, columns = shape
    crossed = np.zeros(shape, bool)
    near = (np.maximum(edges[:, 0], edges[:, 2]) > 0) & (np.minimum(edges[:, 0], edges[:, 2]) < columns)
    near &= (np.maximum(edges[:, 1], edges[:, 3]) > 0) & (np.minimum(edges[:, 1], edges[:, 3]) < rows)
    for piece in _cut(edges[near], 0, columns):
        for bit in _cut(piece, 1, rows):
            middle = (bit[:, :2] + bit[:, 2:]) / 2
            cell = np.floor(middle).astype(np.int64)
            here = (middle != cell).all(axis=1) & (cell >= 0).all(axis=1) & (cell < (columns, rows)).all(axis=1)
            crossed[cell[here, 1], cell[here, 0]] = True
    return crossed


def _cut(edges: Edges, axis: int, most: int) -> Iterator[Edges]:
    """The edges in pieces between the whole numbers 0 ... most of one axis, in blocks."""
    begin, end = edges[:, axis], edges[:, axis + 2]
    low, high = np.minimum(begin, end), np.maximum(begin, end)
    first = np.clip(np.floor(low), -1, most).astype(np.int64)
    count = np.clip(np.ceil(high), 0, most + 1).astype(np.int64) - first
    count = np.maximum(count, 1)
    for part in _blocks(count):
        edge, step = _repeated(count, part)
        line = first[edge] + step
        length = (end - begin)[edge]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            shares = np.stack([(line - begin[edge]) / length, (line + 1 - begin[edge]) / length])
        flat = length == 0
        start = np.where(flat, 0.0, np.clip(shares.min(axis=0), 0, 1))[:, None]
        stop = np.where(flat, 1.0, np.clip(shares.max(axis=0), 0, 1))[:, None]
        origin, way = edges[edge, :2], edges[edge, 2:] - edges[edge, :2]
        yield np.concatenate([origin + start * way, origin + stop * way], axis=1)[(stop > start)[:, 0]]


def _blocks(count: NDArray[np.int64]) -> Iterator[slice]:
    """Runs of edges whose counts sum to about `_BLOCK` at most."""
    start = 0
    total = np.concatenate([[0], np.cumsum(count)])
    while start < len(count):
        stop = max(start + 1, int(np.searchsorted(total, total[start] + _BLOCK, side="right")) - 1)
        yield slice(start, stop)
        start = stop


def _repeated(count: NDArray[np.int64], part: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each edge of the run as often as its count says, and 0, 1, ... within each."""
    counts = count[part]
    edge = np.repeat(np.arange(part.start, part.stop), counts)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    return edge, step
