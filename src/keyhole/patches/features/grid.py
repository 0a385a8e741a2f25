"""Where stored features are on the slide, by their coordinates: the counterpart of `PatchGrid`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.images.geometry import Size
from keyhole.patches.grid import Grid, Index
from keyhole.util.rows import checked_index

MAX_SPACING_ROWS = 2**16
"""Rows from which the step between patches is estimated."""
MAX_MAP_CELLS = 2**24
"""Cells of a map of scores; coordinates that spread over more are not on a grid of this step."""


class FeatureGrid(Grid):
    """Places of the features of one file; `attributes` as CLAM, TRIDENT and keyhole write them.

    The side of a patch at level 0 is the first of these that the file states: `patch_size_level0`; `patch_size` times
    `downsample` (and `custom_downsample`), or `patch_size` alone at `patch_level` 0, or `patch_size` times
    `level0_magnification` / `target_magnification`; else the step between neighbours, with `known` False.

    Patches of several contours need not be on one grid: each is in the cell of its corner. Files of keyhole state their
    exact step as `stride` times `downsample`: cells are those of the grid, also for patches that the edge rule `shift`
    moved inwards. Without coordinates all patches are in one row.

    `size` and `stride` are in pixels of the resolution read, `scale` is level-0 pixels per such pixel.
    """

    what = "feature"

    def __init__(self, n: int, coords: NDArray[np.int32] | None, attributes: Mapping[str, Any]) -> None:
        super().__init__(n)
        self._coords = coords
        l0_side, self.scale = _side(attributes)
        self.known = l0_side is not None and coords is not None
        stride, downsample = number(attributes, "stride"), number(attributes, "downsample")
        exact = None  # the step of one regular grid, as keyhole writes it; it need not be a whole number
        if stride is not None and downsample is not None and "edge" in attributes:
            exact, self.scale = stride * downsample, downsample
        overlap = number(attributes, "overlap", zero=True)
        step = exact
        if step is None and l0_side is not None and overlap is not None and overlap * self.scale < l0_side:
            step = l0_side - overlap * self.scale
        step = None if coords is None else step or _spacing(coords)
        self._l0_side = 0 if coords is None else round(l0_side or step or 0)
        self._l0_step = max(1, round(step or l0_side or 1))
        self.size, self.stride = (max(1, round(side / self.scale)) for side in (self._l0_side, self._l0_step))
        level, self.mpp = number(attributes, "patch_level", zero=True), number(attributes, "mpp")
        self.level = None if level is None else int(level)
        sides = [number(attributes, f"level0_{side}") for side in ("width", "height")]
        if None in sides and level == 0:
            sides = [number(attributes, "level_dim", place=place) for place in (0, 1)]
        self.l0_size = None if None in sides else Size(*(round(side or 0) for side in sides))
        x, y = (number(attributes, "qupath_origin", zero=True, place=place) for place in (0, 1))
        self.qupath_origin = None if x is None or y is None else (round(x), round(y))
        self._g_origin: NDArray[np.int64] | None = None
        self._exact_step = exact
        if coords is not None:
            low, high = coords.min(axis=0).astype(np.int64), coords.max(axis=0).astype(np.int64)
            self.extent = Size(*(high + self._l0_side).clip(0).tolist())
            origin = np.zeros(2, np.int64) if exact else np.where(low < 0, low, low % self._l0_step)
            columns, rows = (self._steps(high - origin) + 1).tolist()
            if rows * columns <= MAX_MAP_CELLS:
                self.rows, self.columns, self._g_origin = rows, columns, origin

    def corners(self, index: ArrayLike | slice) -> Index:
        chosen = checked_index(index, self.n, self.what)
        return np.zeros((len(chosen), 2), np.int64) if self._coords is None else self._coords[chosen].astype(np.int64)

    def cells(self, index: ArrayLike | slice) -> Index:
        if self._g_origin is None:
            return super().cells(index)
        return self._steps(self.corners(index) - self._g_origin)[:, ::-1]

    def _steps(self, l0_distance: Index) -> Index:
        """Return the steps from the origin to the cell of a corner."""
        if self._exact_step is None:
            return l0_distance // self._l0_step
        # 0.5 because corners are rounded; up because a patch may have been moved inwards by less than a step
        return np.asarray(np.ceil((l0_distance - 0.5) / self._exact_step), np.int64)

    def boxes(self, index: ArrayLike | slice) -> Index:
        corners = self.corners(index)
        return np.concatenate([corners, np.full_like(corners, self._l0_side)], axis=1)

    def centers(self, index: ArrayLike | slice) -> NDArray[np.float64]:
        return self.corners(index).astype(np.float64) + self._l0_side / 2


def in_pixels(attributes: Mapping[str, Any], mpp: float) -> dict[str, Any]:
    """Return STAMP's tile size as attributes of `FeatureGrid`, for a slide of `mpp` microns per level-0 pixel."""
    microns = number(attributes, "tile_size_um") or number(attributes, "tile_size")
    pixels = number(attributes, "tile_size_px")
    if microns is None:
        return {}
    found = {"patch_size_level0": microns / mpp}
    return found if pixels is None else found | {"patch_size": pixels, "mpp": microns / pixels}


def _side(attributes: Mapping[str, Any]) -> tuple[float | None, float]:
    """Return the side of a patch at level 0, or None if it is not stated, and level-0 pixels per pixel read."""
    l0_side, size = number(attributes, "patch_size_level0"), number(attributes, "patch_size")
    if l0_side is not None:
        return l0_side, l0_side / size if size else 1.0
    if size is None:
        return None, 1.0
    downsample, level = number(attributes, "downsample"), number(attributes, "patch_level", zero=True)
    source, target = number(attributes, "level0_magnification"), number(attributes, "target_magnification")
    if downsample is None and level == 0:
        downsample = 1.0
    if downsample is not None:
        downsample *= number(attributes, "custom_downsample") or 1.0
    elif source is not None and target is not None:
        downsample = source / target
    return (None, 1.0) if downsample is None else (size * downsample, downsample)


def _spacing(coords: NDArray[np.int32]) -> float | None:
    """Return the most common step between neighbours of one row or column, else the smallest between any two."""
    some = coords[:MAX_SPACING_ROWS].astype(np.int64)
    across = np.abs(np.diff(some, axis=0))
    steps = across[(across == 0).any(axis=1)].max(axis=1, initial=0)
    steps = steps[steps > 0]
    if len(steps):
        values, counts = np.unique(steps, return_counts=True)
        return float(values[np.argmax(counts)])
    gaps = np.concatenate([np.diff(np.unique(axis)) for axis in some.T])
    return float(gaps.min()) if len(gaps) else None


def number(attributes: Mapping[str, Any], name: str, *, zero: bool = False, place: int = 0) -> float | None:
    """Return an attribute as a number above 0, else None; of several, such as CLAM's (x, y), the one at `place`."""
    try:
        value = float(np.asarray(attributes[name]).ravel()[place])
    except (KeyError, IndexError, TypeError, ValueError):  # TRIDENT writes 'None' for unknown values
        return None
    return value if math.isfinite(value) and (value > 0 or (zero and value == 0)) else None
