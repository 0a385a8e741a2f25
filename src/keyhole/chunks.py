"""What reading ahead is made of: openers, open sources, chunks, and the ring of buffers that bounds memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from keyhole.grid import Index
from keyhole.patches import PatchSource
from keyhole.pool import Pool, Task

Array = NDArray[Any]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]
Runs = list[tuple[int, Task[None]]]
"""Reading tasks, each with the position of its image in the batch."""


class Opener(Protocol):
    """A patch source that is yet to be opened."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def __call__(self) -> PatchSource: ...


@dataclass
class Chunk:
    """Patches of the images of one batch, packed to one constant size.

    Attributes:
        pixels: (chunk, *patch_shape); rows from `count` on are zeros. Valid until the next chunk is asked for; not
            overwritten before the one after that is, so that a copy to a device may still be under way.
        count: rows in use; less than the size only in the last chunk of a batch (or after a failed image).
        image: position in the batch, int64 (count,).
        index: patch index in that image's source, int64 (count,).
    """

    pixels: Array
    count: int
    image: Index
    index: Index


class OpenSource:
    """An open source that is closed once nobody reads from it any more."""

    def __init__(self, source: PatchSource) -> None:
        self.source = source
        self._lock = threading.RLock()
        self._readers = 0
        self._closing = False

    def read(self, index: Index, out: Array) -> None:
        """Read into `out`; nothing at all once closing, because nobody wants it then."""
        with self._lock:
            if self._closing:
                return
            self._readers += 1
        try:
            self.source.read(index, out=out)
        finally:
            with self._lock:
                self._readers -= 1
                last = self._closing and self._readers == 0
            if last:
                self.source.close()

    def close(self) -> None:
        """Close now or, while somebody reads, as soon as they have done so. Does not wait."""
        with self._lock:
            now = not self._closing and self._readers == 0
            self._closing = True
        if now:
            self.source.close()


@dataclass
class Planned:
    """A chunk that is being read: its buffer, whose rows they are, and the tasks that fill them."""

    buffer: Array
    image: Index
    index: Index
    tasks: Runs

    def finished(self) -> bool:
        """Whether no thread can write into the buffer any more."""
        return all(task.done and not task.lost for _, task in self.tasks)


class Ring:
    """At most `count` buffers, handed out again and again. Its waiting and waking go through the pool's lock."""

    def __init__(self, pool: Pool, count: int, make: Callable[[], Array]) -> None:
        self._pool = pool
        self._left = count  # that may still be made
        self._make = make
        self._free: list[Array] = []

    def take(self, unwanted: Callable[[], bool]) -> Array | None:
        """A buffer, once there is one; None when `unwanted()` becomes true."""
        with self._pool.lock:
            while not (self._free or self._left or unwanted()):
                self._pool.changed.wait()
            if unwanted():
                return None
            if self._free:
                return self._free.pop()
            self._left -= 1
        return self._make()

    def give(self, buffer: Array | None) -> None:
        """Back for the next; None in place of one that a stuck thread may still write to."""
        with self._pool.lock:
            if buffer is None:
                self._left += 1
            else:
                self._free.append(buffer)
            self._pool.changed.notify_all()


def pack(lengths: Sequence[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts sequences of patches, one after the other, into chunks: lists of (which, start, stop)."""
    segments: list[tuple[int, int, int]] = []
    room = chunk
    for position, length in enumerate(lengths):
        start = 0
        while start < length:
            count = min(room, length - start)
            segments.append((position, start, start + count))
            start, room = start + count, room - count
            if room == 0:
                yield segments
                segments, room = [], chunk
    if segments:
        yield segments
