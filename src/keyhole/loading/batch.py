"""The images of one step: their chunks, their kept patches, and what of them could not be read.

Everything here runs on the consumer's thread, but for the opening, which is done before the consumer has the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from keyhole.errors import ImageError, KeyholeError
from keyhole.loading.chunks import Chunk, Opener
from keyhole.loading.held import Held
from keyhole.loading.readings import LOST, LeaveOut, OpenSource, Planned, Reading
from keyhole.loading.ring import Array
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource

if TYPE_CHECKING:
    from keyhole.loading.stream import Stream

SHORT_RUN = 8
"""Patches of one task where there are many threads to feed, and of kept patches, which share few tiles."""


class Batch:
    """The images of one step.

    Attributes:
        names: of all images asked for.
        sources: open until the next batch is asked for; None where an image failed and failures are not raised. A
            file that was lost and found has another source afterwards, of the same patches.
        failed: what went wrong, by position; grows during `chunks` and `fetch`. Patches of such an image that
            came in earlier chunks are the consumer's to drop.
        unreadable: with "mask", the patches of the other images that could not be read: the reason by patch index,
            by position. Grows during `chunks` and `fetch`; an image that fails is taken out.
        held: the pixels of all streamed images, where they fit what the stream may hold; None where they do not.
    """

    def __init__(self, stream: Stream, openers: Sequence[Opener]) -> None:
        self.names = [opener.name for opener in openers]
        self.sources: list[PatchSource | None] = [None] * len(openers)
        self.failed: dict[int, KeyholeError] = {}
        self.unreadable: dict[int, dict[int, str]] = {}
        self.openers = list(openers)
        self.handles: list[OpenSource | None] = [None] * len(openers)
        self.held: Held | None = None
        self.planned: deque[Planned] = deque()
        self.complete = False
        self.closed = False
        self._stream = stream
        self._pool = stream.pool
        self._worn_out: set[int] = set()  # images that have used up their retries once

    def lengths(self) -> list[int]:
        """Patches of each image that are streamed."""
        return [
            0 if source is None or getattr(opener, "fetch_only", False) else len(source)
            for opener, source in zip(self.openers, self.sources, strict=True)
        ]

    def chunks(self) -> Iterator[Chunk]:
        """All patches of all images in order, once; but those of images that fail and, with "mask", unreadable ones.

        An image of which no patch could be read counts as failed at the end.

        Raises:
            KeyholeError: an image failed and failures are raised.
        """
        while (planned := self._stream.next_planned(self)) is not None:
            chunk = self._stream.finish(self, planned)
            if chunk.count:
                yield chunk
        for position in range(len(self.names)):
            self.settle(position)

    def settle(self, position: int) -> None:
        """Count an image as failed of which no patch could be read; all of them must have been tried."""
        length, missing = self.lengths()[position], self.unreadable.get(position, {})
        if length and len(missing) == length:
            problem = f"none of its {length} patches can be read ({next(iter(missing.values()))})"
            self.fail(position, ImageError(self.names[position], problem))

    def fetch(self, indices: Sequence[ArrayLike | None], block: Array | None = None) -> list[Array | None]:
        """Some patches of each image: those held, and the others read in parallel before all that is read ahead.

        Args:
            indices: as many as `sources`, each (m,) integers in any order, of any number; ignored where failed.
            block: (sum of m, *patch_shape) of images that have not failed, in which the result is put image by image;
                default is memory of its own for each. Where a thread is stuck, the result may lie elsewhere.

        Returns:
            (m, *patch_shape) for each image, None where failed. Rows of patches in `unreadable` are zeros.

        Raises:
            KeyholeError: an image failed and failures are raised.
        """
        if len(indices) != len(self.names):
            raise ValueError(f"{len(indices)} index arrays for {len(self.names)} images")
        if self.closed:
            raise RuntimeError("the batch is closed; fetch before the next batch is asked for")
        out: list[Array | None] = [None] * len(indices)
        parts: list[tuple[int, Index, list[Reading]]] = []
        for position, (handle, wanted) in enumerate(zip(self.handles, indices, strict=True)):
            if handle is None:
                continue
            index = np.asarray(wanted)
            index = index.astype(np.int64) if index.size else np.empty(0, np.int64)
            if block is None:
                rows = np.empty((len(index), *handle.source.patch_shape), handle.source.dtype)
            else:
                rows, block = block[: len(index)], block[len(index) :]
            out[position] = rows
            held = np.zeros(len(index), np.bool_) if self.held is None else self.held.take(position, index, rows)
            absent = np.flatnonzero(~held)
            into = np.empty((len(absent), *rows.shape[1:]), rows.dtype) if held.any() else rows
            parts.append((position, absent, self.read_now(position, index[absent], into)))
        readings = [reading for _, _, part in parts for reading in part]
        if readings:
            self._stream.reader.wait(lambda: self.finish(readings))
        for position, absent, part in parts:
            found = out[position]
            assert found is not None
            if len(absent) < len(found):
                for start, reading in zip(range(0, len(absent), SHORT_RUN), part, strict=True):
                    found[absent[start : start + SHORT_RUN]] = reading.out
            elif any(reading.spoiled for reading in part):
                out[position] = np.concatenate([reading.out for reading in part])
        for position in self.failed:
            out[position] = None
        self._stream.reader.reread_patches += sum(len(reading.index) for reading in readings)
        self._stream.reader.read_patches += sum(len(rows) for rows in out if rows is not None)
        return out

    def read_now(self, position: int, index: Index, out: Array) -> list[Reading]:
        """Have some patches of an image read into `out`, in short runs, before all that is read ahead."""
        runs = [slice(start, start + SHORT_RUN) for start in range(0, len(index), SHORT_RUN)]
        leave_out = self._stream.leave_out
        return [Reading(self, position, index[run], out[run], self._pool, leave_out, urgent=True) for run in runs]

    def close(self) -> None:
        """Close the sources; what is still being read is dropped."""
        with self._stream.changing():
            self.closed = True
            written = self.complete and all(planned.finished() for planned in self.planned)
            while self.planned:
                self._stream.recycle(self.planned.popleft())
            self._stream.let_go(self, written)
        for handle in self.handles:
            if handle is not None:
                self._stream.drop(handle)

    def finish(self, readings: Sequence[Reading]) -> None:
        """Wait until all is read, again where that is worth it; readings of an image that has failed may go on."""
        for reading in readings:
            if reading.position in self.failed:
                continue
            error = self._complete(reading)
            if self._stream.closed:
                break
            if error is not None:
                self.fail(reading.position, error)
                continue
            if missing := reading.task.value().unreadable:
                self.unreadable.setdefault(reading.position, {}).update(missing)
        if self._stream.closed:
            raise RuntimeError("the reader was closed while it was read from")

    def fail(self, position: int, error: BaseException) -> None:
        """Leave an image out, or raise."""
        if self._stream.on_error == "raise" or not isinstance(error, KeyholeError):
            raise error
        self.failed[position] = error
        self.unreadable.pop(position, None)
        self.sources[position] = None
        if self.held is not None:
            self.held.drop(position)
        handle, self.handles[position] = self.handles[position], None
        if handle is not None:
            self._stream.drop(handle)

    def _complete(self, reading: Reading) -> BaseException | None:
        """Wait for a reading; while its file is lost, open that anew and read again, as often as is allowed.

        With "mask", a file that opens the last time, but of which some parts stay lost, has lost these parts.
        """
        stream, retry, position = self._stream, self._stream.retry, reading.position
        self._pool.wait(reading.task)
        error, tries = reading.task.error, 0
        while isinstance(error, LOST) and not stream.closed:
            leave_out: LeaveOut = stream.leave_out
            if not reading.is_stale():
                if tries == retry.times:
                    break
                self._lose(position, error)
                if tries or position not in self._worn_out:  # where waiting has not helped, opening anew may
                    retry.tell(self.names[position], error, tries)
                    self._pool.pause(retry.seconds(tries), lambda: stream.closed)
                    if stream.closed:
                        break
                tries += 1
                error = self._reopen(position)
                if error is not None:
                    continue
                if stream.on_error == "mask" and (tries == retry.times or position in self._worn_out):
                    leave_out = "lost"
            reading.again(leave_out)
            self._pool.wait(reading.task)
            error = reading.task.error
            if leave_out == "lost" and error is None and reading.task.value().unreadable:
                self._worn_out.add(position)
        return error

    def _lose(self, position: int, error: ImageError) -> None:
        """Keep others from getting stuck in the same source."""
        handle = self.handles[position]
        assert handle is not None
        handle.lost = handle.lost or error

    def _reopen(self, position: int) -> BaseException | None:
        """Put a new source in the place of a lost one; what is wrong where that does not work."""
        stream, name, old = self._stream, self.names[position], self.handles[position]
        assert old is not None
        task = self._pool.submit(name, lambda: stream.open(self.openers[position]), urgent=True)
        self._pool.wait(task)
        if task.error is not None:
            return task.error
        new = task.value()
        if new is None:  # the stream was closed
            return old.lost
        before, now = (f"{len(each.source)} patches {each.source.patch_shape}" for each in (old, new))
        if before != now or old.source.dtype != new.source.dtype:
            stream.drop(new)
            problem = f"changed while it was read: {before} before, {now} now. Run again when nobody writes to it."
            return ImageError(name, problem)
        self.handles[position], self.sources[position] = new, new.source
        stream.drop(old)
        return None
