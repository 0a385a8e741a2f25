"""The pixels of a batch that stay in memory until the batch is closed, so that what is kept of it is not read twice.

Reading threads put pixels here as they arrive; nothing is taken before the consumer has said that it was read well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.util.rows import take_rows

Array = NDArray[Any]
Index = NDArray[np.int64]


def held_bytes(lengths: Sequence[int], shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """What the patches of a batch take."""
    return sum(lengths) * math.prod(shape) * dtype.itemsize


class HeldMemory:
    """The memory in which batches hold pixels: what a batch gives back is used by the next, for fresh memory is slow to
    touch. The caller has the lock.

    Attributes:
        taken: bytes that batches have.
        left: bytes that wait for the next batch.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._left: list[Array] = []

    @property
    def left(self) -> int:
        return sum(memory.nbytes for memory in self._left)

    def take(self, size: int, most: int) -> Array | None:
        """Memory of at least `size` bytes, if all that is taken and left is then `most` at most; else None.

        What is left and too small makes room for what is new, or it would pile up where batches become larger.
        """
        fitting = [place for place, memory in enumerate(self._left) if memory.nbytes >= size]
        best = min(fitting, key=lambda place: self._left[place].nbytes, default=None)
        if best is not None and self.taken + self.left <= most:
            memory = self._left.pop(best)
        else:
            if self.taken + size > most:
                return None
            if self._left:
                self._left.pop()
            while self._left and self.taken + self.left + size > most:
                self._left.pop()
            memory = np.empty(size, np.uint8)
        self.taken += memory.nbytes
        return memory

    def give(self, memory: Array, reusable: bool) -> None:
        """Memory back from a batch; `reusable` says that no thread writes there any more."""
        self.taken -= memory.nbytes
        if reusable:
            self._left.append(memory)

    def clear(self) -> None:
        """Free what waits for the next batch."""
        self._left.clear()


class Held:
    """Patches of the images of one batch by position and index.

    Args:
        lengths: patches of each image; 0 for an image of which nothing is to be held.
        shape, dtype: of a patch.
        memory: (`held_bytes` or more) uint8, where they are put.

    Attributes:
        memory: as given.
        spoiled: a thread that nobody waits for may still write there.
    """

    def __init__(self, lengths: Sequence[int], shape: tuple[int, ...], dtype: np.dtype[Any], memory: Array) -> None:
        self.memory, self.spoiled = memory, False
        rows = memory[: held_bytes(lengths, shape, dtype)].view(dtype).reshape(-1, *shape)
        ends = np.cumsum(lengths)
        self._pixels: list[Array | None] = [
            rows[end - length : end] if length else None for length, end in zip(lengths, ends, strict=True)
        ]
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
        self.spoiled = True
        self._pixels[position] = None
        self._known[position] = np.zeros(0, np.bool_)

    def take(self, position: int, index: Index, out: Array) -> NDArray[np.bool_]:
        """Write into `out` what is held of the patches `index`; bool (k,), which of them these were."""
        rows, known = self._pixels[position], self._known[position]
        if rows is None or not index.size or index.min() < 0 or index.max() >= len(known):
            return np.zeros(len(index), np.bool_)
        found: NDArray[np.bool_] = known[index]
        if found.all():
            take_rows(rows, index, out)
        else:
            out[found] = rows[index[found]]
        return found

    def clear(self) -> None:
        """Let go of all pixels; who still holds this object keeps none of them alive."""
        self._pixels = [None] * len(self._pixels)
        self._known = [np.zeros(0, np.bool_)] * len(self._known)
        self.memory = np.empty(0, np.uint8)
