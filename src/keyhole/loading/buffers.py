"""The memory of a stream: buffers for chunks, and a cache for the pixels of a batch.

Pinned memory is slow to allocate and fresh memory slow to touch, so both are used again, by the next batch and by the
next stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.patches.grid import Index
from keyhole.util.rows import take_rows
from keyhole.util.threads import ReadingThreads

Array = NDArray[Any]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]
Copied = Callable[[], None]
"""Returns when a buffer has been copied to a device."""


class SpareBuffers:
    """Up to `count` free buffers for the chunks of the next batch or stream."""

    def __init__(self, threads: ReadingThreads, count: int, allocate: Allocate) -> None:
        self._lock, self._count, self._allocate = threads.lock, count, allocate
        self._free: deque[tuple[Array, Copied | None]] = deque()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return the buffer of this shape that has been free for longest, or a new one; drop those of other shapes."""
        with self._lock:
            self._free = deque(each for each in self._free if (each[0].shape, each[0].dtype) == (shape, dtype))
            found = self._free.popleft() if self._free else None
        if found is None:
            return self._allocate(shape, dtype)
        buffer, copied = found
        if copied is not None:  # wait here, on the planning thread, so that the consumer never has to
            copied()
        return buffer

    def give(self, buffer: Array, copied: Copied | None = None) -> None:
        with self._lock:
            if len(self._free) < self._count:
                self._free.append((buffer, copied))

    def close(self) -> None:
        """Free all buffers, and those that are given back later."""
        with self._lock:
            self._count = 0
            self._free.clear()


class CacheMemory:
    """Memory in which the batches of a stream cache pixels, at most `limit` bytes. The caller holds the lock.

    Attributes:
        taken: bytes that batches use.
        free: blocks that no batch uses.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0
        self.free: list[Array] = []

    def take(self, size: int) -> Array | None:
        """Return at least `size` bytes; None if other batches use too much for that."""
        fitting = [at for at, memory in enumerate(self.free) if memory.nbytes >= size]
        if fitting:
            memory = self.free.pop(min(fitting, key=lambda at: self.free[at].nbytes))
        elif self.taken + size > self.limit:
            return None
        else:
            # A block that is too small makes way for a larger one, or blocks would pile up where batches grow.
            del self.free[-1:]
            while self.free and self.taken + sum(each.nbytes for each in self.free) + size > self.limit:
                self.free.pop()
            memory = np.empty(size, np.uint8)
        self.taken += memory.nbytes
        return memory

    def give(self, memory: Array, reusable: bool) -> None:
        """Take memory back from a batch; it is `reusable` if no thread can write to it any more."""
        self.taken -= memory.nbytes
        if reusable:
            self.free.append(memory)


class PixelCache:
    """Pixels of one batch, so that `Batch.fetch` does not read them again.

    Reading threads write pixels as they arrive. `take` returns those that the consumer has confirmed.

    Args:
        lengths: patches of each image; 0 where an image is not cached.
        rows: (sum of lengths, *patch_shape), a part of `memory`.
        memory: as `CacheMemory.take` returned it.

    Attributes:
        spoiled: a stuck thread may still write into the memory.
    """

    def __init__(self, lengths: Sequence[int], rows: Array, memory: Array) -> None:
        self.memory, self.spoiled = memory, False
        ends = np.cumsum(lengths)
        self._pixels: list[Array | None] = [rows[end - length : end] for length, end in zip(lengths, ends, strict=True)]
        self._confirmed: list[NDArray[np.bool_]] = [np.zeros(length, np.bool_) for length in lengths]

    def put(self, image: int, index: Index, pixels: Array) -> None:
        """Store patches; called on reading threads, each with its own patches."""
        rows = self._pixels[image]
        if rows is not None:
            rows[index] = pixels

    def confirm(self, image: int, index: Index) -> None:
        """Let `take` return these patches from now on."""
        if self._pixels[image] is not None:
            self._confirmed[image][index] = True

    def drop(self, image: int) -> None:
        """Forget an image that failed, or whose pixels a stuck thread may still write."""
        self.spoiled = True
        self._pixels[image] = None
        self._confirmed[image] = np.zeros(0, np.bool_)

    def take(self, image: int, index: Index, out: Array) -> NDArray[np.bool_]:
        """Write the cached ones of the patches `index` into `out`; return which these are, bool (k,)."""
        rows, confirmed = self._pixels[image], self._confirmed[image]
        if rows is None or not index.size or index.min() < 0 or index.max() >= len(confirmed):
            return np.zeros(len(index), np.bool_)
        found: NDArray[np.bool_] = confirmed[index]
        if found.all():
            take_rows(rows, index, out)
        else:
            out[found] = rows[index[found]]
        return found

    def clear(self) -> None:
        """Free all pixels, even where this object is still referenced."""
        self._pixels = [None] * len(self._pixels)
        self._confirmed = [np.zeros(0, np.bool_)] * len(self._confirmed)
        self.memory = np.empty(0, np.uint8)
