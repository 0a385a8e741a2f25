"""Patches without a file, made from their index, so that any number of them costs neither disk nor memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.patches.grid import Grid
from keyhole.patches.sources import PatchSource
from keyhole.util.rows import checked_index, take_rows

MARKS = 8
"""Bytes of a patch that hold its index; the rest is one of a few patterns."""
COLUMNS = 1000
"""Patches in a row of the grid that they are said to lie in."""


class MadePatches(PatchSource):
    """A patch source of `n` patches.

    Args:
        n: how many.
        shape: of one: (s, s, c) uint8, or (f,) float32 as stored features are.
    """

    def __init__(self, n: int, shape: tuple[int, ...]) -> None:
        self.n, self.name, self.patch_shape = n, f"{n} made patches", shape
        self.grid = Grid(n)
        self.dtype = np.dtype(np.uint8 if len(shape) > 1 else np.float32)
        draw = np.random.default_rng(0)
        if len(shape) > 1:
            self._patterns: NDArray[Any] = draw.integers(0, 256, (16, *shape), np.uint8)
        else:
            self._patterns = draw.normal(size=(16, *shape)).astype(np.float32)

    def read(self, index: ArrayLike | slice, out: NDArray[Any] | None = None) -> NDArray[Any]:
        wanted = checked_index(index, self.n)
        out = np.empty((len(wanted), *self.patch_shape), self.dtype) if out is None else out
        take_rows(self._patterns, wanted % len(self._patterns), out)
        if self.dtype == np.uint8:
            out.reshape(len(wanted), -1)[:, :MARKS] = wanted[:, None].view(np.uint8)
        else:
            out[:, 0] = wanted / self.n
        return out

    def positions_2d(self, index: ArrayLike | slice) -> NDArray[np.float64]:
        rows, columns = np.divmod(checked_index(index, self.n), COLUMNS)
        return np.stack([columns, rows], axis=1) * float(self.patch_shape[0])


@dataclass(frozen=True)
class OpenMade:
    """Opener of made patches."""

    n: int
    shape: tuple[int, ...]
    name: str = "made"

    def __call__(self) -> MadePatches:
        if math.prod(self.shape) * (1 if len(self.shape) > 1 else 4) < MARKS:
            raise ValueError(f"patches of {self.shape} have no room for {MARKS} bytes")
        return MadePatches(self.n, self.shape)
