"""The memory of a stream: a ring of buffers for chunks, and a cache for the pixels of a batch.

Pinned memory is slow to allocate and fresh memory slow to touch, so both are used again, by the next batch and by the
next stream. All locks are that of the reader's threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.util.rows import take_rows
from keyhole.util.threads import ReadingThreads

Array = NDArray[Any]
Index = NDArray[np.int64]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]
Copied = Callable[[], None]
"""Returns once the copy of a buffer to a device is done."""


class SpareBuffers:
    """Up to `count` buffers of one shape that nobody uses, for the next chunk or the next stream."""

    def __init__(self, threads: ReadingThreads, count: int, allocate: Allocate) -> None:
        self._lock, self._count, self._allocate = threads.lock, count, allocate
        self._free: deque[tuple[Array, Copied | None]] = deque()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return a free buffer, the one whose copy began first; allocate one if none of this shape is left."""
        with self._lock:
            self._drop_others(shape, dtype)
            found = self._free.popleft() if self._free else None
        if found is None:
            return self._allocate(shape, dtype)
        buffer, copied = found
        if copied is not None:  # wait here, on the planning thread, so that the consumer never has to
            copied()
        return buffer

    def give(self, buffer: Array, copied: Copied | None = None) -> None:
        with self._lock:
            self._drop_others(buffer.shape, buffer.dtype)
            if len(self._free) < self._count:
                self._free.append((buffer, copied))

    def _drop_others(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if self._free and (self._free[0][0].shape, self._free[0][0].dtype) != (shape, dtype):
            self._free.clear()

    def close(self) -> None:
        """Free all buffers, and those that are given back later."""
        with self._lock:
            self._count = 0
            self._free.clear()


class BufferRing:
    """Lends a stream at most `count` buffers at a time; this bounds how far it reads ahead.

    `changed` is notified when a buffer comes back, and by the caller that changes what `unwanted` of `take` returns.
    """

    def __init__(self, threads: ReadingThreads, count: int, spare: SpareBuffers) -> None:
        self.changed = threading.Condition(threads.lock)
        self._left, self._spare = count, spare

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any], unwanted: Callable[[], bool]) -> Array | None:
        """Wait for a buffer that no copy reads any more and return it; None once `unwanted()` is true."""
        with self.changed:
            while not (self._left or unwanted()):
                self.changed.wait()
            if unwanted():
                return None
            self._left -= 1
        return self._spare.take(shape, dtype)

    def give(self, buffer: Array | None, copied: Copied | None = None) -> None:
        """Take a buffer back; None stands for one that a stuck thread may still write to."""
        with self.changed:
            self._left += 1
            if buffer is not None:
                self._spare.give(buffer, copied)
            self.changed.notify_all()


class CacheMemory:
    """The memory in which the batches of a stream cache pixels: `taken` bytes now. The caller holds the lock."""

    def __init__(self) -> None:
        self.taken = 0
        self._free: list[Array] = []

    @property
    def left(self) -> int:
        """Bytes that wait for the next batch."""
        return sum(memory.nbytes for memory in self._free)

    def take(self, size: int, limit: int) -> Array | None:
        """Return at least `size` bytes, or None if more than `limit` would be in use and free together.

        Free memory that is too small is dropped, or it would pile up where batches become larger.
        """
        fitting = [memory for memory in self._free if memory.nbytes >= size]
        memory = min(fitting, key=lambda each: each.nbytes, default=None)
        if memory is not None and self.taken + self.left <= limit:
            self._free = [each for each in self._free if each is not memory]
        else:
            if self.taken + size > limit:
                return None
            if self._free:
                self._free.pop()
            while self._free and self.taken + self.left + size > limit:
                self._free.pop()
            memory = np.empty(size, np.uint8)
        self.taken += memory.nbytes
        return memory

    def give(self, memory: Array, reusable: bool) -> None:
        """Take memory back from a batch; `reusable` says that no thread writes there any more."""
        self.taken -= memory.nbytes
        if reusable:
            self._free.append(memory)

    def clear(self) -> None:
        """Drop the free memory."""
        self._free.clear()


class PixelCache:
    """Pixels of one batch, so that `Batch.fetch` does not read them again.

    Reading threads put pixels here as they arrive, into `rows` (sum of lengths, *patch_shape) of `memory`; `take`
    returns only those that the consumer has confirmed. `lengths` are patches of each image, 0 for one that is not
    cached. `spoiled` says that a stuck thread may still write into the memory.
    """

    def __init__(self, lengths: Sequence[int], rows: Array, memory: Array) -> None:
        self.memory, self.spoiled = memory, False
        self._pixels: list[Array | None] = [
            rows[end - length : end] if length else None
            for length, end in zip(lengths, np.cumsum(lengths), strict=True)
        ]
        self._confirmed: list[NDArray[np.bool_]] = [np.zeros(length, np.bool_) for length in lengths]

    def put(self, image: int, index: Index, pixels: Array) -> None:
        """Store consecutive patches; called on reading threads, each with its own patches."""
        rows = self._pixels[image]
        if rows is not None and len(index):
            rows[int(index[0]) : int(index[0]) + len(index)] = pixels

    def confirm(self, image: int, index: Index) -> None:
        """Let `take` return these patches from now on."""
        if self._pixels[image] is not None:
            self._confirmed[image][index] = True

    def drop(self, image: int) -> None:
        """Forget an image: it failed, or a stuck thread may still write its pixels."""
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
