"""The buffers of chunks: a ring that bounds memory within a stream, and a stock from which the next stream takes them.

Pinned memory is slow to allocate and fresh memory slow to touch, so the buffers of a stream that has ended wait for the
next one with chunks of the same shape. A copy to a device may still read a buffer that comes back; whoever is given it
next waits for that first, on the planning thread, so that the consumer never does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.util.threads import Pool

Array = NDArray[Any]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]
Copied = Callable[[], None]
"""Returns once the copy of a buffer to a device is done."""


class Stock:
    """Buffers that no stream uses, of one shape, at most `most`. Its lock is the pool's."""

    def __init__(self, pool: Pool, most: int, allocate: Allocate) -> None:
        self._pool, self._most, self._allocate = pool, most, allocate
        self._left: deque[tuple[Array, Copied | None]] = deque()
        self._closed = False

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A buffer that nobody uses, a new one where none of this shape is left."""
        with self._pool.lock:
            if self._left and (self._left[0][0].shape, self._left[0][0].dtype) != (shape, dtype):
                self._left.clear()
            found = self._left.popleft() if self._left else None
        if found is None:
            return self._allocate(shape, dtype)
        buffer, copied = found
        if copied is not None:
            copied()
        return buffer

    def give(self, buffer: Array, copied: Copied | None) -> None:
        """For the next stream; dropped where there is enough."""
        with self._pool.lock:
            if self._left and (self._left[0][0].shape, self._left[0][0].dtype) != (buffer.shape, buffer.dtype):
                self._left.clear()
            if not self._closed and len(self._left) < self._most:
                self._left.append((buffer, copied))

    def close(self) -> None:
        """Let go of all; what is given back later goes too."""
        with self._pool.lock:
            self._closed = True
            self._left.clear()


class Ring:
    """At most `count` buffers, handed out again and again. Its lock is the pool's.

    Args:
        make: takes a buffer out of the stock.

    Attributes:
        changed: notified when a buffer comes back, and by whoever changes what `unwanted` of `take` looks at.
    """

    def __init__(self, pool: Pool, count: int, stock: Stock, make: Callable[[], Array]) -> None:
        self._pool, self._stock, self._make = pool, stock, make
        self.changed = threading.Condition(pool.lock)
        self._left = count  # that may still be made
        self._free: deque[tuple[Array, Copied | None]] = deque()
        self._closed = False

    def take(self, unwanted: Callable[[], bool]) -> Array | None:
        """A buffer, once there is one that no copy reads any more; None when `unwanted()` becomes true."""
        with self._pool.lock:
            while not (self._free or self._left or unwanted()):
                self.changed.wait()
            if unwanted():
                return None
            found = self._free.popleft() if self._free else None  # the one whose copy began first
            self._left -= found is None
        if found is None:
            return self._make()
        buffer, copied = found
        if copied is not None:
            copied()
        return buffer

    def give(self, buffer: Array | None, copied: Copied | None = None) -> None:
        """Back for the next; None in place of one that a stuck thread may still write to."""
        with self._pool.lock:
            if buffer is None:
                self._left += 1
            elif self._closed:
                self._stock.give(buffer, copied)
            else:
                self._free.append((buffer, copied))
            self.changed.notify_all()

    def close(self) -> None:
        """All buffers go to the stock now: a stream that has ended waits in a cycle of references for the collector."""
        with self._pool.lock:
            self._closed = True
            while self._free:
                self._stock.give(*self._free.popleft())
