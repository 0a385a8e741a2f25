"""A task for a reading thread: some patches of one image, which are read into rows of a buffer."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from keyhole.loading.buffers import Array, PixelCache
from keyhole.loading.chunks import Coded, Delivery
from keyhole.loading.stream import LOST, LeaveOut, OpenSource, Slot, Stream
from keyhole.patches.grid import Index
from keyhole.util.threads import ReadTask, given_up

PATCHES_BETWEEN_LOOKS = 16
"""Patches that a thread decodes before it checks again whether the consumer waits. With more, it waits for one thread
while others are idle; with fewer, each tile costs the interpreter more."""


class Outcome(NamedTuple):
    """What a read left out, as the reason by patch index, and the patches that came as JPEG streams."""

    unreadable: dict[int, str]
    coded: dict[int, Coded]


class Reading:
    """The patches `index` (k,) of one image that are being read into `out` (k, *patch_shape), and into the cache.

    Urgent ones are read before everything that is read ahead, and as pixels. Others may come as JPEG streams. Those of
    an image in memory may be copied `here`, by the thread that makes the object.

    Attributes:
        out: as given, or other memory if a stuck thread may still write there (`spoiled`).
        task: the last try.
    """

    def __init__(
        self,
        stream: Stream,
        slot: Slot,
        index: Index,
        out: Array,
        cache: PixelCache | None = None,
        urgent: bool = False,
        here: bool = False,
    ) -> None:
        self.stream, self.slot, self.index, self.out = stream, slot, index, out
        self.spoiled = False
        self._cache = cache
        self._used: OpenSource | None = None  # that the last try has read
        leave_out: LeaveOut = "damaged" if stream.on_error == "mask" else "nothing"
        if here:
            self.task = stream.threads.run_here(slot.opener.name, partial(self._read, out, leave_out, None))
        else:
            self.task = self._submit(leave_out, urgent)

    def _submit(self, leave_out: LeaveOut, urgent: bool) -> ReadTask[Outcome]:
        """Have a thread read.

        The first read of an image that is decoded whole decodes it. All others begin when that has ended, so that no
        thread waits for another's decoding: as many images are decoded at once as there are threads.
        """
        self._used = None
        job = partial(self._read, self.out, leave_out, None if urgent else self.stream.deliver)
        threads, name, handle = self.stream.threads, self.slot.opener.name, self.slot.handle
        with threads.lock:
            first = None if handle is None else handle.first  # None: the image has failed meanwhile
            if first is not None and first.since is None and urgent and not first.urgent:  # far back in the queue
                first = None
            task = threads.submit(name, job, urgent, after=first)
            if handle is not None and handle.whole and first is None:
                handle.first = task
        return task

    def _read(self, out: Array, leave_out: LeaveOut, deliver: Delivery | None) -> Outcome:
        """Read on a thread: pixels, or JPEG streams as soon as the consumer waits for them."""
        unreadable: dict[int, str] = {}
        coded: dict[int, Coded] = {}
        self._used = handle = self.slot.handle
        if handle is None:  # the image has failed meanwhile
            return Outcome(unreadable, coded)
        row, count = 0, len(self.index)
        while row < count and not given_up():
            stop = count
            if coded:
                stop = row + 1
            elif deliver is not None and (deliver.always or self.stream.waiting):
                coded = handle.encoded(self.index[row:], deliver.colors)
                deliver = None
                continue
            elif deliver is not None and handle.delivers:
                stop = min(count, row + PATCHES_BETWEEN_LOOKS)
            if int(self.index[row]) not in coded:
                rows = slice(row, stop)
                unreadable |= handle.read(self.index[rows], out[rows], leave_out)
                if self._cache is not None:
                    self._cache.put(self.slot.image, self.index[rows], out[rows])
            row = stop
        return Outcome(unreadable, coded)

    def complete(self) -> BaseException | None:
        """Wait until all is read and return the error that remains; read a lost file again as often as is allowed.

        Under "mask", a file that opens at the last try but of which some parts stay lost has lost only these parts.
        """
        stream, slot, reader = self.stream, self.slot, self.stream.reader
        stream.threads.wait(self.task)
        error, tries = self.task.error, 0
        while isinstance(error, LOST) and not stream.closed:
            leave_out: LeaveOut = "damaged" if stream.on_error == "mask" else "nothing"
            if self._used is None or self._used is slot.handle:  # else another reading has opened the image again
                if tries == reader.retries:
                    break
                assert slot.handle is not None
                slot.handle.lost = slot.handle.lost or error  # no other thread gets stuck in the same source
                if tries or not slot.worn_out:  # where waiting has not helped, opening again may
                    stream.threads.pause(reader.retry_in(slot.opener.name, error, tries), lambda: stream.closed)
                    if stream.closed:
                        break
                tries += 1
                error = stream.reopen(slot)
                if error is not None:
                    continue
                if stream.on_error == "mask" and (tries == reader.retries or slot.worn_out):
                    leave_out = "lost"
            if self.task.lost:
                self.out, self.spoiled = np.empty_like(self.out), True
                if self._cache is not None:
                    self._cache.drop(slot.image)
            self.task = self._submit(leave_out, urgent=True)
            stream.threads.wait(self.task)
            error = self.task.error
            if leave_out == "lost" and error is None and self.task.value().unreadable:
                slot.worn_out = True
        return error


class Planned(NamedTuple):
    """A chunk that is being read: its buffer, how many rows of it are used, and the tasks that fill them, in order."""

    buffer: Array
    rows: int
    readings: list[Reading]

    def finished(self) -> bool:
        """Return whether no thread can write into the buffer any more."""
        return all(each.task.done and not (each.spoiled or each.task.lost) for each in self.readings)
