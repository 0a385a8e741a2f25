"""Polygons drawn on an image: as a mask of any resolution, and how much of a box they cover.

A point is in a region if it is in its outer ring and in none of its holes; a ring that crosses itself is filled by the
even-odd rule. A cell of a mask is filled if its centre is inside, so that regions that share a border share no cell.
Drawing libraries also fill the outline itself, so that a polygon grows by half a pixel all around.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ring = NDArray[np.float64]
Edges = NDArray[np.float64]
"""(k, 4): x and y of where an edge begins, x and y of where it ends."""
Outline = list[Edges]
"""The edges of an outer ring, then of each hole in it."""
MAX_CROSSINGS = 1 << 18
"""Crossings of edges and rows that are computed at once; bounds the memory."""
POINTS_ALONG_BOX = 64
"""Points along each side of a box at which its covered share is counted."""


@dataclass(frozen=True)
class Region:
    """One polygon.

    Attributes:
        rings: (n, 2) each, x and y in level-0 pixels, the outer one first, then its holes; the first point is not
            repeated at the end.
        name: its name or class; may be empty.
    """

    rings: tuple[Ring, ...]
    name: str = ""


def rasterize(
    regions: Sequence[Region], l0_size: tuple[int, int], shape: tuple[int, int], touched: bool = False
) -> NDArray[np.bool_]:
    """Fill regions in a mask over a whole image; an area in several regions counts once.

    Args:
        regions: in level-0 pixels; parts outside the image are cut off.
        l0_size: width and height of the image in level-0 pixels.
        shape: rows and columns of the mask.
        touched: fill every cell that shares area with a region, and not only cells whose centre a region covers. A
            cell that is cut by both an outline and a hole is filled.

    Returns:
        Mask, bool (rows, cols).
    """
    return fill(_outlines(regions), (0, 0, *l0_size), shape, touched)


def covered(regions: Sequence[Region], boxes: ArrayLike) -> NDArray[np.float64]:
    """Compute how much of each box the regions cover.

    Counted at 64 x 64 points of the box: the error is about the length of the outline in it over 64 of its side.

    Args:
        regions: in level-0 pixels.
        boxes: (k, 4) x, y, width and height in level-0 pixels.

    Returns:
        Shares from 0 to 1, float64 (k,).

    >>> square = Region((np.array([[0.0, 0.0], [30.0, 0.0], [30.0, 30.0], [0.0, 30.0]]),))
    >>> covered([square], [[0, 0, 60, 30], [40, 0, 30, 30]])
    array([0.5, 0. ])
    """
    shares = np.zeros(len(np.reshape(boxes, (-1, 4))))
    for index, box, near in _near(regions, boxes):
        shares[index] = fill(near, box, (POINTS_ALONG_BOX, POINTS_ALONG_BOX), False).mean()
    return shares


def touching(regions: Sequence[Region], boxes: ArrayLike) -> NDArray[np.bool_]:
    """Return which of the boxes (k, 4) share area with a region, however little: bool (k,)."""
    touched = np.zeros(len(np.reshape(boxes, (-1, 4))), bool)
    for index, box, near in _near(regions, boxes):
        touched[index] = fill(near, box, (1, 1), True)[0, 0]
    return touched


def _outlines(regions: Sequence[Region]) -> list[Outline]:
    return [[np.concatenate([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in each.rings] for each in regions]


def _near(regions: Sequence[Region], boxes: ArrayLike) -> Iterator[tuple[int, tuple[float, ...], list[Outline]]]:
    """Yield index and place of each box that meets bounding boxes of regions, and the outlines of these regions."""
    if not regions:
        return
    outlines = _outlines(regions)
    left, top, right, bottom = np.array(
        [[*region.rings[0].min(axis=0), *region.rings[0].max(axis=0)] for region in regions]
    ).T
    for index, box in enumerate(np.reshape(np.asarray(boxes, np.float64), (-1, 4)).tolist()):
        x, y, width, height = box
        meets = (left < x + width) & (right > x) & (top < y + height) & (bottom > y)
        if meets.any():
            yield index, tuple(box), [outline for outline, meet in zip(outlines, meets, strict=True) if meet]


def fill(
    outlines: Sequence[Outline], box: tuple[float, ...], shape: tuple[int, int], touched: bool
) -> NDArray[np.bool_]:
    """Return the cells (rows, columns) of a grid over `box` (x, y, width, height) that the outlines cover together.

    With `touched`, these are all cells that share area with an outline, and not only those whose centre is inside.
    """
    mask = np.zeros(shape, bool)
    corner, scale = np.tile(box[:2], 2), np.tile([shape[1] / box[2], shape[0] / box[3]], 2)
    for outline in outlines:
        outer, *holes = ((edges - corner) * scale for edges in outline)
        # Thousands of small outlines must not each cost the whole grid.
        reach = np.floor(outer[:, :2].min(axis=0)) - 1, np.ceil(outer[:, :2].max(axis=0)) + 1
        (left, top), (right, bottom) = np.clip(reach, 0, shape[::-1]).astype(int).tolist()
        part = mask[top:bottom, left:right]
        if part.size == 0:
            continue
        outer, *holes = (_beside(edges - np.tile([left, top], 2), part.shape) for edges in (outer, *holes))
        covered = _inside(outer, part.shape)
        if touched:
            covered |= _crossed(outer, part.shape)
        for hole in holes:
            free = _inside(hole, part.shape)
            covered &= ~(free & ~_crossed(hole, part.shape)) if touched else ~free
        part |= covered
    return mask


def _beside(edges: Edges, shape: tuple[int, ...]) -> Edges:
    """Leave out the edges above, below and right of the cells, which do not change them."""
    upper, lower = np.minimum(edges[:, 1], edges[:, 3]), np.maximum(edges[:, 1], edges[:, 3])
    return edges[(upper < shape[0]) & (lower > 0) & (np.minimum(edges[:, 0], edges[:, 2]) < shape[1])]


def _inside(edges: Edges, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the cells whose centre is inside: right of every crossing of its row, inside and outside change."""
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
    """Return the cells through whose inside an edge runs; an edge exactly between two cells is in neither."""
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
    """Cut the edges at the whole numbers 0 ... most of one axis; yield blocks of pieces."""
    begin, end = edges[:, axis], edges[:, axis + 2]
    low, high = np.minimum(begin, end), np.maximum(begin, end)
    first = np.clip(np.floor(low), -1, most).astype(np.int64)
    count = np.maximum(np.clip(np.ceil(high), 0, most + 1).astype(np.int64) - first, 1)
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
    """Yield runs of edges whose counts sum to about `MAX_CROSSINGS` at most."""
    start = 0
    total = np.concatenate([[0], np.cumsum(count)])
    while start < len(count):
        stop = max(start + 1, int(np.searchsorted(total, total[start] + MAX_CROSSINGS, side="right")) - 1)
        yield slice(start, stop)
        start = stop


def _repeated(count: NDArray[np.int64], part: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Repeat each edge of the run by its count; return the edges, and 0, 1, ... within each."""
    counts = count[part]
    edge = np.repeat(np.arange(part.start, part.stop), counts)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    return edge, step
