"""What fills chunks: open sources, and the readings of some of their patches into rows of a buffer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError, ImageLost, StalledRead
from keyhole.loading.chunks import Coded, Delivery
from keyhole.loading.held import Held
from keyhole.loading.ring import Array
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource
from keyhole.util.threads import Pool, Task, beat, given_up

LeaveOut = Literal["nothing", "damaged", "lost"]
"""Patches that a read may go without: none, those that are damaged, or also those that the disk does not give."""

LOST = (ImageLost, StalledRead)
"""What may be over in a while; every other error would come again."""

LOOK_AGAIN = 16
"""Tiles that a thread decodes before it looks again whether the consumer waits. With 64 the consumer often waited for
the rest of a run while the other threads, which had filled the ring with encoded tiles, had nothing to do; with 8 each
tile cost the interpreter 10 us more, with 16 it costs 4 (benchmarks/simulated_gpu.py does not show that)."""


@dataclass(frozen=True)
class Outcome:
    """What became of a reading: reasons of what was left out, and patches that came encoded, by patch index."""

    unreadable: dict[int, str] = field(default_factory=dict)
    coded: dict[int, Coded] = field(default_factory=dict)


class OpenSource:
    """An open source that is closed once nobody reads from it any more.

    Attributes:
        lost: why the file could not be reached. Nobody touches it through this source again.
        delivers: some of its patches have come as JPEG.
    """

    def __init__(self, source: PatchSource) -> None:
        self.source = source
        self._whole = source.whole_bytes > 0
        self._first: Task[Outcome] | None = None  # the reading that decodes the image, where it is decoded whole
        self.lost: ImageError | None = None
        self.delivers = False
        self._lock = threading.RLock()
        self._readers = 0
        self._closing = False

    def submit(self, pool: Pool, name: str, job: Callable[[], Outcome], urgent: bool) -> Task[Outcome]:
        """Have a thread read from here.

        The first read of an image that is decoded whole decodes it. All others begin when that has ended, so that no
        thread waits for another's decoding: as many images are decoded at once as there are threads.
        """
        with pool.lock:
            first = self._first
            late = first is not None and first.since is None and urgent and not first.urgent  # far back in the queue
            if first is not None and not late:
                return pool.submit(name, job, urgent, after=first)
            task = pool.submit(name, job, urgent)
            if self._whole:
                self._first = task
            return task

    def read(self, index: Index, out: Array, leave_out: LeaveOut = "nothing") -> dict[int, str]:
        """Read into `out`.

        Returns:
            What was left out, as allowed: the reason by patch index. Its rows are zeros.

        Raises:
            ImageLost, StalledRead: the file cannot be reached, was not before, or the source is closed.
            ImageError: something else is wrong with it, and "nothing" may be left out.
        """
        with self._reading():
            return self._read(index, out, leave_out)

    def encoded(self, index: Index, colors: Container[str]) -> dict[int, Coded]:
        """Those of the patches that can be had as JPEG; a part that cannot be read is left for `read` to say so.

        Raises:
            ImageLost, StalledRead: as `read`.
        """
        with self._reading():
            try:
                found = self.source.encoded(index, colors)
            except LOST:
                raise
            except ImageError:
                return {}
        rows = zip(index.tolist(), found or [], strict=found is not None)
        coded = {number: Coded(data, self.source.view) for number, data in rows if data is not None}
        self.delivers = self.delivers or bool(coded)
        return coded

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """The source stays open inside."""
        with self._lock:
            if self.lost is None and self._first is not None and self._first.lost:
                assert isinstance(self._first.error, StalledRead)
                self.lost = self._first.error  # a read here would wait for the same decoding
            if self.lost is not None or self._closing:
                problem = "closed" if self.lost is None else self.lost.problem
                raise ImageLost(self.source.name, problem)
            self._readers += 1
        try:
            yield
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


class Need:
    """Whether the consumer of a stream waits for pixels at this moment; readings look when they begin.

    Readings begin in order, so those of the chunk that the consumer waits for have nearly always begun before it waits.
    Those that can still spare it the next wait belong to later chunks: there is one need for the whole stream.
    """

    def __init__(self) -> None:
        self.now = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The consumer waits inside."""
        self.now = True
        try:
            yield
        finally:
            self.now = False


class Reading:
    """Some patches of one image on their way into rows of a buffer.

    Args:
        leave_out: what may be left out.
        urgent: to be read before all that is read ahead.
        deliver: which patches may come encoded; None for none.
        need: of the stream that this is a part of.
        held: where pixels are put that stay.

    Attributes:
        position: of the image in its batch.
        index: patches, int64 (k,).
        out: (k, *patch_shape) that they are read into: rows of a buffer or, once a thread is stuck that may still
            write there, memory of their own.
        task: of the last try; its value says what could not be read, and what came encoded.
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
        deliver: Delivery | None = None,
        need: Need | None = None,
        held: Held | None = None,
    ) -> None:
        self.position, self.index, self.out = position, index, out
        self.spoiled = False
        self._batch, self._pool, self._deliver, self._need, self._held = batch, pool, deliver, need, held
        self.task = self._submit(leave_out, urgent)

    def _submit(self, leave_out: LeaveOut, urgent: bool) -> Task[Outcome]:
        self._used: list[OpenSource] = []
        job = partial(self._read, self.out, self._used, leave_out, self._deliver)
        name, handle = self._batch.names[self.position], self._batch.handles[self.position]
        if handle is None:  # the image has failed meanwhile
            return self._pool.submit(name, job, urgent)
        return handle.submit(self._pool, name, job, urgent)

    def again(self, leave_out: LeaveOut) -> None:
        """Have it read once more, before all that is read ahead, from the source of the image that is open by then."""
        if self.task.lost:
            self.out, self.spoiled = np.empty_like(self.out), True
            if self._held is not None:
                self._held.drop(self.position)
        self._deliver = None
        self.task = self._submit(leave_out, urgent=True)

    def _read(self, out: Array, used: list[OpenSource], leave_out: LeaveOut, deliver: Delivery | None) -> Outcome:
        handle = self._batch.handles[self.position]
        if handle is None:  # the image has failed meanwhile
            return Outcome()
        used.append(handle)
        unreadable: dict[int, str] = {}
        row, count = 0, len(self.index)
        while row < count and not given_up():
            if deliver is not None and self._is_wanted_now(deliver):
                coded = handle.encoded(self.index[row:], deliver.colors)
                if coded:
                    odd = row + np.flatnonzero(~np.isin(self.index[row:], list(coded)))
                    for other in odd.tolist():
                        unreadable |= self._pixels(handle, slice(other, other + 1), out, leave_out)
                    return Outcome(unreadable, coded)
                deliver = None
            stop = min(count, row + LOOK_AGAIN) if deliver is not None and handle.delivers else count
            unreadable |= self._pixels(handle, slice(row, stop), out, leave_out)
            row = stop
        return Outcome(unreadable)

    def _is_wanted_now(self, deliver: Delivery) -> bool:
        """Whether patches may come encoded at this moment."""
        return bool(deliver.colors) and (deliver.always or (self._need is not None and self._need.now))

    def _pixels(self, handle: OpenSource, rows: slice, out: Array, leave_out: LeaveOut) -> dict[int, str]:
        unreadable = handle.read(self.index[rows], out[rows], leave_out)
        if self._held is not None:
            self._held.put(self.position, self.index[rows], out[rows])
        return unreadable

    def is_stale(self) -> bool:
        """Whether the image has been opened anew since this was read."""
        return bool(self._used) and self._used[-1] is not self._batch.handles[self.position]

    def readable(self) -> NDArray[np.bool_]:
        """Which of the patches were read, bool (k,); those that came encoded too."""
        unreadable = self.task.value().unreadable
        return ~np.isin(self.index, list(unreadable)) if unreadable else np.ones(len(self.index), np.bool_)

    def as_pixels(self) -> Index:
        """The patches whose pixels were read, int64: not those that came encoded."""
        coded = self.task.value().coded
        return self.index[~np.isin(self.index, list(coded))] if coded else self.index

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
