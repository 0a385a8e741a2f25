"""A task for a reading thread: some patches of one image, on their way into rows of a buffer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from keyhole.loading.buffers import Array, PixelCache
from keyhole.loading.chunks import Delivery
from keyhole.loading.source import LOST, LeaveOut, OpenSource, Outcome, Slot
from keyhole.loading.stream import Stream
from keyhole.patches.grid import Index
from keyhole.util.threads import ReadTask, given_up

PATCHES_BETWEEN_LOOKS = 16
"""Patches that a thread decodes before it looks again whether the consumer waits. With 64 the consumer often waited for
one thread while the others, which had filled the ring with JPEG streams, were idle; with 8 each tile cost 10 us more of
the interpreter, with 16 it costs 4."""


class Reading:
    """Some patches of one image that are being read.

    Args:
        stream: whose threads read.
        slot: the image.
        index: patches, int64 (k,).
        out: (k, *patch_shape) rows of a buffer.
        cache: also gets the pixels; None for none.
        urgent: read before everything that is read ahead, and as pixels. Else patches may come as JPEG streams.

    Attributes:
        out: as given or, once a stuck thread may still write there, other memory.
        task: the last try.
        spoiled: True when a stuck thread may still write into the buffer.
    """

    def __init__(
        self,
        stream: Stream,
        slot: Slot,
        index: Index,
        out: Array,
        cache: PixelCache | None = None,
        urgent: bool = False,
    ) -> None:
        self.stream, self.slot, self.index, self.out = stream, slot, index, out
        self.spoiled = False
        self._cache = cache
        self.task = self._submit(stream.leave_out, urgent)

    def _submit(self, leave_out: LeaveOut, urgent: bool) -> ReadTask[Outcome]:
        self._used: list[OpenSource] = []
        job = partial(self._read, self.out, self._used, leave_out, None if urgent else self.stream.deliver)
        threads, name, handle = self.stream.threads, self.slot.opener.name, self.slot.handle
        if handle is None:  # the image has failed meanwhile
            return threads.submit(name, job, urgent)
        return handle.submit(threads, name, job, urgent)

    def _read(self, out: Array, used: list[OpenSource], leave_out: LeaveOut, deliver: Delivery | None) -> Outcome:
        """Read on a thread: pixels, or JPEG streams as soon as the consumer waits for them."""
        handle = self.slot.handle
        if handle is None:  # the image has failed meanwhile
            return Outcome()
        used.append(handle)

        def pixels(rows: slice) -> dict[int, str]:
            missing = handle.read(self.index[rows], out[rows], leave_out)
            if self._cache is not None:
                self._cache.put(self.slot.image, self.index[rows], out[rows])
            return missing

        unreadable: dict[int, str] = {}
        row, count = 0, len(self.index)
        while row < count and not given_up():
            if deliver is not None and (deliver.always or self.stream.waiting):
                if coded := handle.encoded(self.index[row:], deliver.colors):
                    for other in (row + np.flatnonzero(~np.isin(self.index[row:], list(coded)))).tolist():
                        unreadable |= pixels(slice(other, other + 1))
                    return Outcome(unreadable, coded)
                deliver = None
            stop = min(count, row + PATCHES_BETWEEN_LOOKS) if deliver is not None and handle.delivers else count
            unreadable |= pixels(slice(row, stop))
            row = stop
        return Outcome(unreadable)

    def complete(self) -> BaseException | None:
        """Wait until all is read; while the file is lost, open it and read again, as often as is allowed.

        Under "mask", a file that opens at the last try but of which some parts stay lost has lost only these parts.

        Returns:
            The error that remains.
        """
        stream, slot, retry = self.stream, self.slot, self.stream.retry
        stream.threads.wait(self.task)
        error, tries = self.task.error, 0
        while isinstance(error, LOST) and not stream.closed:
            leave_out = stream.leave_out
            if not self._used or self._used[-1] is slot.handle:  # else another reading has opened the image again
                if tries == retry.times:
                    break
                assert slot.handle is not None
                slot.handle.lost = slot.handle.lost or error  # no other thread gets stuck in the same source
                if tries or not slot.worn_out:  # where waiting has not helped, opening again may
                    retry.tell(slot.opener.name, error, tries)
                    stream.threads.pause(retry.seconds(tries), lambda: stream.closed)
                    if stream.closed:
                        break
                tries += 1
                error = stream.reopen(slot)
                if error is not None:
                    continue
                if stream.on_error == "mask" and (tries == retry.times or slot.worn_out):
                    leave_out = "lost"
            self._again(leave_out)
            stream.threads.wait(self.task)
            error = self.task.error
            if leave_out == "lost" and error is None and self.task.value().unreadable:
                slot.worn_out = True
        return error

    def _again(self, leave_out: LeaveOut) -> None:
        """Read once more, before everything that is read ahead, from the source that is open by now."""
        if self.task.lost:
            self.out, self.spoiled = np.empty_like(self.out), True
            if self._cache is not None:
                self._cache.drop(self.slot.image)
        self.task = self._submit(leave_out, urgent=True)

    def readable(self) -> NDArray[np.bool_]:
        """Return which patches were read, as pixels or as JPEG streams, bool (k,)."""
        return ~np.isin(self.index, list(self.task.value().unreadable))

    def as_pixels(self) -> Index:
        """Return the patches that were read as pixels, int64."""
        coded = self.task.value().coded
        return self.index[~np.isin(self.index, list(coded))] if coded else self.index

    def finished(self) -> bool:
        """Return whether no thread can write into the buffer any more."""
        return self.task.done and not (self.spoiled or self.task.lost)


@dataclass
class Planned:
    """A chunk that is being read: its buffer, how many rows of it are used, and the tasks that fill them, in order."""

    buffer: Array
    rows: int
    readings: list[Reading]

    def finished(self) -> bool:
        """Return whether no thread can write into the buffer any more."""
        return all(reading.finished() for reading in self.readings)
