"""What is looked for in an image, as somebody has marked it: outlines, or a mask of any resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import DataError, ImageError
from keyhole.images.geometry import Size
from keyhole.patches.foreground import regions
from keyhole.patches.foreground.mask_file import check_png, read_mask
from keyhole.patches.foreground.region_files import read_regions
from keyhole.patches.foreground.regions import Region

PNG_SUFFIX = ".png"
MAX_SIDE = 4096
"""Cells along the longest side of a mask in memory; its sums take 4 bytes each."""


class Annotation(Protocol):
    """Marked areas of an image; boxes are (k, 4) x, y, width and height in level-0 pixels."""

    def __len__(self) -> int:
        """Return the number of marked areas."""

    def covered(self, boxes: ArrayLike) -> NDArray[np.float64]:
        """Return how much of each box is marked: shares from 0 to 1 (k,)."""

    def touching(self, boxes: ArrayLike) -> NDArray[np.bool_]:
        """Return which boxes share area with what is marked, however little: (k,)."""


def read_annotation(path: Path, l0_size: Size, origin: tuple[int, int] = (0, 0)) -> Annotation:
    """Read an annotation from a PNG mask, GeoJSON (QuPath) or XML (ASAP); its suffix says which it is.

    Args:
        path: The file.
        l0_size: Width and height of its image, whose proportions a mask must have.
        origin: `Image.qupath_origin` of the image, from which GeoJSON counts.

    Raises:
        DataError: The file is damaged, of another kind or of other proportions.

    >>> import PIL.Image
    >>> PIL.Image.fromarray(np.diag([255, 0, 0, 0]).astype(np.uint8)).save("spot.png")
    >>> read_annotation(Path("spot.png"), Size(400, 400)).covered([[0, 0, 200, 200], [200, 200, 200, 200]])
    array([0.25, 0.  ])
    """
    if path.suffix.lower() != PNG_SUFFIX:
        return Outlines(read_regions(path, origin))
    try:
        return MarkedPixels(read_mask(path, l0_size, MAX_SIDE), l0_size)
    except ImageError as error:
        raise DataError(str(error)) from error


def far_regions(marked: Annotation, l0_size: Size) -> str:
    """Return where the marked areas lie if all of them lie outside of the image; "" if one reaches into it, or none is.

    >>> square = Region((np.array([[500.0, 20.0], [900.0, 20.0], [900.0, 60.0], [500.0, 60.0]]),))
    >>> far_regions(Outlines([square]), Size(400, 400))
    'x 500 to 900, y 20 to 60'
    >>> far_regions(Outlines([square]), Size(600, 400))
    ''
    """
    if not isinstance(marked, Outlines) or not marked.regions or marked.touching([[0, 0, *l0_size]])[0]:
        return ""  # a mask covers its image, whatever its resolution
    corners = np.concatenate([region.rings[0] for region in marked.regions])
    (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
    return f"x {left:,.0f} to {right:,.0f}, y {top:,.0f} to {bottom:,.0f}"


def check_annotation(path: Path, l0_size: Size | None = None) -> None:
    """Raise DataError if an annotation cannot be read, or is a mask of other proportions than an image of `l0_size`.

    A mask is not decoded.
    """
    if path.suffix.lower() != PNG_SUFFIX:
        read_regions(path)
        return
    try:
        check_png(path, l0_size)
    except ImageError as error:
        raise DataError(str(error)) from error


@dataclass(frozen=True)
class Outlines:
    """Polygons in level-0 pixels."""

    regions: Sequence[Region]

    def __len__(self) -> int:
        return len(self.regions)

    def covered(self, boxes: ArrayLike) -> NDArray[np.float64]:
        return regions.covered(self.regions, boxes)

    def touching(self, boxes: ArrayLike) -> NDArray[np.bool_]:
        return regions.touching(self.regions, boxes)


@dataclass(frozen=True, eq=False)
class MarkedPixels:
    """A mask (rows, columns) over a whole image of `l0_size`; connected pixels are one area."""

    mask: NDArray[np.bool_]
    l0_size: Size

    def __len__(self) -> int:
        from scipy.ndimage import label

        return int(label(self.mask, np.ones((3, 3)))[1])

    def covered(self, boxes: ArrayLike) -> NDArray[np.float64]:
        x, y, right, bottom = self._edges(boxes)
        inside = self._sum(right, bottom) - self._sum(x, bottom) - self._sum(right, y) + self._sum(x, y)
        _, _, width, height = np.reshape(np.asarray(boxes, np.float64), (-1, 4)).T
        return np.asarray(inside / (width * height * self._scale.prod())).clip(0, 1)

    def touching(self, boxes: ArrayLike) -> NDArray[np.bool_]:
        edges, total = self._edges(boxes), self._total
        left, top = (np.floor(edge).astype(np.int64) for edge in edges[:2])
        right, bottom = (np.ceil(edge).astype(np.int64) for edge in edges[2:])
        return np.asarray(total[bottom, right] - total[bottom, left] - total[top, right] + total[top, left] > 0)

    @property
    def _scale(self) -> NDArray[np.float64]:
        """Cells per level-0 pixel, along x and y."""
        return np.array(self.mask.shape[::-1]) / self.l0_size

    def _edges(self, boxes: ArrayLike) -> tuple[NDArray[np.float64], ...]:
        """Return left, upper, right and lower edge of each box in cells, inside the mask."""
        x, y, width, height = np.reshape(np.asarray(boxes, np.float64), (-1, 4)).T
        (columns, rows), (across, down) = self.mask.shape[::-1], self._scale
        horizontal = ((edge * across).clip(0, columns) for edge in (x, x + width))
        vertical = ((edge * down).clip(0, rows) for edge in (y, y + height))
        (left, right), (top, bottom) = horizontal, vertical
        return left, top, right, bottom

    @cached_property
    def _total(self) -> NDArray[np.int32]:
        """Number of marked cells above and left of each corner of a cell (rows + 1, columns + 1)."""
        total = np.zeros(np.add(self.mask.shape, 1), np.int32)
        np.cumsum(self.mask, axis=0, out=total[1:, 1:])
        np.cumsum(total[1:, 1:], axis=1, out=total[1:, 1:])
        return total

    def _sum(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Marked area above and left of points, in cells: linear between the corners of a cell, hence exact."""
        rows, columns = self.mask.shape
        i, j = np.minimum(y.astype(np.int64), rows - 1), np.minimum(x.astype(np.int64), columns - 1)
        v, u, total = y - i, x - j, self._total
        upper = total[i, j] * (1 - u) + total[i, j + 1] * u
        lower = total[i + 1, j] * (1 - u) + total[i + 1, j + 1] * u
        return np.asarray(upper * (1 - v) + lower * v)
