"""What reading ahead is made of: openers, open sources, chunks, and the ring of buffers that bounds memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError, ImageLost, StalledRead
from keyhole.grid import Index
from keyhole.patches import PatchSource
from keyhole.pool import Pool, Task, beat, given_up

Array = NDArray[Any]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]
LeaveOut = Literal["nothing", "damaged", "lost"]
"""Patches that a read may go without: none, those that are damaged, or also those that the disk does not give."""

LOST = (ImageLost, StalledRead)
"""What may be over in a while; every other error would come again."""


class Opener(Protocol):
    """A patch source that is yet to be opened."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def __call__(self) -> PatchSource: ...


@dataclass(frozen=True)
class FetchOnly:
    """An opener of an image of which the wanted patches are known: it is opened, but its patches are not streamed.

    `Batch.fetch` reads from it as from any other, and `Batch.chunks` does not show it.
    """

    opener: Opener
    fetch_only: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.opener.name

    def __call__(self) -> PatchSource:
        return self.opener()


@dataclass
class Chunk:
    """Patches of the images of one batch, packed to one constant size.

    Attributes:
        pixels: (chunk, *patch_shape); rows from `count` on are zeros. Valid until the next chunk is asked for; not
            overwritten before the one after that is, so that a copy to a device may still be under way.
        count: rows in use; less than the size in the last chunk of a batch and where patches or images were
            unreadable.
        image: position in the batch, int64 (count,).
        index: patch index in that image's source, int64 (count,).
    """

    pixels: Array
    count: int
    image: Index
    index: Index


class OpenSource:
    """An open source that is closed once nobody reads from it any more.

    Attributes:
        lost: why the file could not be reached. Nobody touches it through this source again.
    """

    def __init__(self, source: PatchSource) -> None:
        self.source = source
        self.lost: ImageError | None = None
        self._lock = threading.RLock()
        self._readers = 0
        self._closing = False

    def read(self, index: Index, out: Array, leave_out: LeaveOut = "nothing") -> dict[int, str]:
        """Read into `out`.

        Returns:
            What was left out, as allowed: the reason by patch index. Its rows are zeros.

        Raises:
            ImageLost, StalledRead: the file cannot be reached, was not before, or the source is closed.
            ImageError: something else is wrong with it, and "nothing" may be left out.
        """
        with self._lock:
            if self.lost is not None or self._closing:
                problem = "closed" if self.lost is None else self.lost.problem
                raise ImageLost(self.source.name, problem)
            self._readers += 1
        try:
            return self._read(index, out, leave_out)
        except LOST as error:
            self.lost = self.lost or error
            raise
        finally:
            with self._lock:
                self._readers -= 1
                last = self._closing and self._readers == 0
            if last:
                self.source.close()

    def _read(self, index: Index, out: Array, leave_out: LeaveOut) -> dict[int, str]:
        try:
            self.source.read(index, out=out)
        except ImageError as error:
            if not _may_lack(error, leave_out):
                raise
        else:
            return {}
        unreadable = {}
        for row in range(len(index)):
            if given_up():
                break
            try:
                self.source.read(index[row : row + 1], out=out[row : row + 1])
            except ImageError as error:
                if not _may_lack(error, leave_out):
                    raise
                out[row] = 0
                unreadable[int(index[row])] = error.problem
            beat()  # an error is a sign of life too
        return unreadable

    def close(self) -> None:
        """Close now or, while somebody reads, as soon as they have done so. Does not wait."""
        with self._lock:
            now = not self._closing and self._readers == 0
            self._closing = True
        if now:
            self.source.close()


def _may_lack(error: ImageError, leave_out: LeaveOut) -> bool:
    return leave_out == "lost" or (leave_out == "damaged" and not isinstance(error, LOST))


class Handles(Protocol):
    """The images of a batch, as a reading sees them."""

    names: list[str]
    handles: list[OpenSource | None]
    """None where the image has failed."""


class Reading:
    """Some patches of one image on their way into rows of a buffer.

    Attributes:
        position: of the image in its batch.
        index: patches, int64 (k,).
        out: (k, *patch_shape) that they are read into: rows of a buffer or, once a thread is stuck that may still
            write there, memory of their own.
        task: of the last try; its value says what could not be read.
        spoiled: a stuck thread may still write into the buffer.
    """

    def __init__(
        self,
        batch: Handles,
        position: int,
        index: Index,
        out: Array,
        pool: Pool,
        leave_out: LeaveOut,
        urgent: bool = False,
    ) -> None:
        self.position, self.index, self.out = position, index, out
        self.spoiled = False
        self._batch, self._pool = batch, pool
        self.task = self._submit(leave_out, urgent)

    def _submit(self, leave_out: LeaveOut, urgent: bool) -> Task[dict[int, str]]:
        self._used: list[OpenSource] = []
        job = partial(self._read, self.out, self._used, leave_out)
        return self._pool.submit(self._batch.names[self.position], job, urgent)

    def again(self, leave_out: LeaveOut) -> None:
        """Have it read once more, before all that is read ahead, from the source of the image that is open by then."""
        if self.task.lost:
            self.out, self.spoiled = np.empty_like(self.out), True
        self.task = self._submit(leave_out, urgent=True)

    def _read(self, out: Array, used: list[OpenSource], leave_out: LeaveOut) -> dict[int, str]:
        handle = self._batch.handles[self.position]
        if handle is None:  # the image has failed meanwhile
            return {}
        used.append(handle)
        return handle.read(self.index, out, leave_out)

    def is_stale(self) -> bool:
        """Whether the image has been opened anew since this was read."""
        return bool(self._used) and self._used[-1] is not self._batch.handles[self.position]

    def readable(self) -> NDArray[np.bool_]:
        """Which of the patches were read, bool (k,)."""
        return ~np.isin(self.index, list(self.task.value()))

    def finished(self) -> bool:
        """Whether no thread can write into the buffer any more."""
        return self.task.done and not (self.spoiled or self.task.lost)


@dataclass
class Planned:
    """A chunk that is being read: its buffer, how many rows of it are used, and what fills them, in order."""

    buffer: Array
    rows: int
    readings: list[Reading]

    def finished(self) -> bool:
        """Whether no thread can write into the buffer any more."""
        return all(reading.finished() for reading in self.readings)


class Ring:
    """At most `count` buffers, handed out again and again. Its waiting and waking go through the pool's lock."""

    def __init__(self, pool: Pool, count: int, make: Callable[[], Array]) -> None:
        self._pool = pool
        self._left = count  # that may still be made
        self._make = make
        self._free: list[Array] = []
        self._closed = False

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
            elif not self._closed:
                self._free.append(buffer)
            self._pool.changed.notify_all()

    def close(self) -> None:
        """Lets go of the buffers now: a stream that has ended waits in a cycle of references for the collector."""
        with self._pool.lock:
            self._closed = True
            self._free.clear()


ALONE = 16
"""Chunks from which an image shares none with others: it costs at most a 16th more, and makes its chunks, and with them
the last bits of what is computed, independent of the other images of the batch."""


def is_alone(length: int, chunk: int) -> bool:
    """Whether an image of so many patches shares no chunk with another."""
    return length >= ALONE * chunk


def pack(lengths: Sequence[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts sequences of patches, one after the other, into chunks: lists of (which, start, stop)."""
    segments: list[tuple[int, int, int]] = []
    room = chunk
    for position, length in enumerate(lengths):
        start = 0
        if segments and (is_alone(length, chunk) or is_alone(lengths[segments[-1][0]], chunk)):
            yield segments
            segments, room = [], chunk
        while start < length:
            count = min(room, length - start)
            segments.append((position, start, start + count))
            start, room = start + count, room - count
            if room == 0:
                yield segments
                segments, room = [], chunk
    if segments:
        yield segments
