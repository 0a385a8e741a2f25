"""The pixels of a batch that stay in memory until the batch is closed, so that what is kept of it is not read twice.

Reading threads put pixels here as they arrive; nothing is taken before the consumer has said that it was read well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Index = NDArray[np.int64]


def held_bytes(lengths: Sequence[int], shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """What the patches of a batch take."""
    return sum(lengths) * math.prod(shape) * dtype.itemsize


class Held:
    """Patches of the images of one batch by position and index.

    Args:
        lengths: patches of each image; 0 for an image of which nothing is to be held.
        shape, dtype: of a patch.
    """

    def __init__(self, lengths: Sequence[int], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.bytes = held_bytes(lengths, shape, dtype)
        self._pixels: list[Array | None] = [np.empty((length, *shape), dtype) if length else None for length in lengths]
        self._known: list[NDArray[np.bool_]] = [np.zeros(length, np.bool_) for length in lengths]

    def put(self, position: int, index: Index, pixels: Array) -> None:
        """Store patches that follow each other; called on reading threads, each with patches of its own."""
        rows = self._pixels[position]
        if rows is not None and len(index):
            rows[int(index[0]) : int(index[0]) + len(index)] = pixels

    def confirm(self, position: int, index: Index) -> None:
        """These patches have been stored, and may be taken from now on."""
        if self._pixels[position] is not None:
            self._known[position][index] = True

    def drop(self, position: int) -> None:
        """Hold nothing of an image any more: it failed, or a stuck thread may still write here."""
        self._pixels[position] = None
        self._known[position] = np.zeros(0, np.bool_)

    def take(self, position: int, index: Index, out: Array) -> NDArray[np.bool_]:
        """Write into `out` what is held of the patches `index`; bool (k,), which of them these were."""
        rows, known = self._pixels[position], self._known[position]
        if rows is None or not index.size or index.min() < 0 or index.max() >= len(known):
            return np.zeros(len(index), np.bool_)
        found: NDArray[np.bool_] = known[index]
        if found.all():
            np.take(rows, index, axis=0, out=out)
        else:
            out[found] = rows[index[found]]
        return found

    def clear(self) -> None:
        """Let go of all pixels; who still holds this object keeps none of them alive."""
        for position in range(len(self._pixels)):
            self.drop(position)
