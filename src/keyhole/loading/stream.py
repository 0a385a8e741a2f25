"""One pass over batches of images: a thread that plans ahead, and the ring of buffers that holds it back."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keyhole.errors import ConfigError, ImageError
from keyhole.loading.assembled import assembled, encoded_rows, fill_in
from keyhole.loading.batch import SHORT_RUN, Batch
from keyhole.loading.chunks import Chunk, Delivery, Opener, pack
from keyhole.loading.held import Held, HeldMemory, held_bytes
from keyhole.loading.readings import (
    LOST,
    LeaveOut,
    Need,
    OpenSource,
    Planned,
    Reading,
)
from keyhole.loading.ring import Array, Ring
from keyhole.util.threads import given_up

if TYPE_CHECKING:
    from keyhole.loading import Reader

OnError = Literal["raise", "skip", "mask"]

RUN = 64
"""Patches of one task: some tens, so that neighbours share tiles and handing over costs little: in a trial with aligned
JPEG on two threads, 64 were a little faster than 32."""


@dataclass(frozen=True)
class Retry:
    """How often a lost file is tried again: `times`, after `first` seconds and then each time four times as long."""

    times: int
    first: float
    told: Callable[[str, str], None] | None

    def seconds(self, tries: int) -> float:
        """To wait after so many tries again."""
        return self.first * 4.0**tries

    def tell(self, name: str, error: ImageError, tries: int) -> None:
        """Say that an image will be tried again."""
        if self.told is not None:
            problem = error.problem.rstrip(".")
            self.told(name, f"{problem}; try {tries + 1} of {self.times} in {self.seconds(tries):g} s")


class Stream:
    """One pass: the planning thread, the ring of buffers and what has been planned but not yet consumed."""

    def __init__(
        self,
        reader: Reader,
        batches: Iterable[Sequence[Opener]],
        chunk: int,
        on_error: OnError,
        retry: Retry,
        hold: int,
        deliver: Delivery | None,
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"select.chunk (={chunk}) must be at least 1")
        self.reader = reader
        self.pool = reader.pool
        self.chunk = chunk
        self.on_error = on_error
        self.leave_out: LeaveOut = "damaged" if on_error == "mask" else "nothing"
        self.retry = retry
        self.hold, self.deliver = hold, deliver
        self._need = Need()
        self._held_memory = HeldMemory()
        self._batches = batches
        self._run = int(np.clip(chunk * reader.ahead // (2 * self.pool.threads), SHORT_RUN, RUN))
        self._shape: tuple[tuple[int, ...], np.dtype[Any]] | None = None
        self._ring = Ring(reader.pool, reader.ahead + 2, reader.stock, self._allocate)
        self._shown: deque[Chunk] = deque()  # with the consumer, oldest first
        self._opened: set[OpenSource] = set()
        self._ready: deque[Batch | None] = deque()  # None: no more
        self._error: BaseException | None = None
        self.closed = False
        threading.Thread(target=self._plan, name="keyhole-plan", daemon=True).start()

    # On the planning thread

    def _plan(self) -> None:
        try:
            for openers in self._batches:
                if self.closed:
                    return
                batch = self._open_batch(openers)
                self._hand_over(batch)
                self._plan_batch(batch)
                with self.changing():
                    batch.complete = True
                    # Batches that need no buffers are not held back by the ring.
                    while len(self._ready) > self.reader.ahead and not self.closed:
                        self.pool.changed.wait()
            self._hand_over(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer, when it gets there
            with self.changing():
                self._error = error

    def _hand_over(self, batch: Batch | None) -> None:
        with self.changing():
            if not self.closed:  # else the consumer is to see that, not a batch that is half open
                self._ready.append(batch)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What is done inside wakes whoever waits."""
        with self.pool.lock:
            yield
            self.pool.changed.notify_all()
            self._ring.changed.notify_all()

    def _open_batch(self, openers: Sequence[Opener]) -> Batch:
        """Open all images at once, those that are lost again and again together."""
        batch = Batch(self, openers)
        waiting, tries = list(range(len(openers))), 0
        while waiting and not self.closed:
            tasks = {
                place: self.pool.submit(batch.names[place], partial(self.open, openers[place])) for place in waiting
            }
            waiting = []
            for position, task in tasks.items():
                self.pool.wait(task, stop=lambda: self.closed)
                if self.closed:
                    return batch
                if isinstance(task.error, LOST) and tries < self.retry.times:
                    waiting.append(position)
                    self.retry.tell(batch.names[position], task.error, tries)
                elif task.error is not None:
                    batch.fail(position, task.error)
                else:
                    self._put(batch, position, task.value())
            if waiting:
                self.pool.pause(self.retry.seconds(tries), lambda: self.closed)
                tries += 1
        return batch

    def _put(self, batch: Batch, position: int, handle: OpenSource | None) -> None:
        assert handle is not None
        source = handle.source
        batch.handles[position], batch.sources[position] = handle, source
        shape = source.patch_shape, source.dtype
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ConfigError(
                f"{source.name}: patches of {shape[1]} {shape[0]}, but those before are "
                f"{self._shape[1]} {self._shape[0]}; all images of a run need the same"
            )

    def open(self, opener: Opener) -> OpenSource | None:
        """Open an image, on a reading thread; None where nobody wants it any more."""
        if self.closed:
            return None
        handle = OpenSource(opener())
        with self.pool.lock:
            wanted = not (self.closed or given_up())
            if wanted:
                self._opened.add(handle)
        if not wanted:
            handle.close()
            return None
        return handle

    def _hold(self, batch: Batch, streamed: Sequence[int]) -> None:
        """Make room for all pixels of a batch if they fit; waits while batches before it hold too much for that."""
        if self._shape is None or not 0 < (size := held_bytes(streamed, *self._shape)) <= self.hold:
            return
        with self.pool.lock:
            while not (self.closed or batch.closed):
                if (memory := self._held_memory.take(size, 2 * self.hold)) is not None:
                    batch.held = Held(streamed, *self._shape, memory)
                    return
                self.pool.changed.wait()

    def let_go(self, batch: Batch, written: bool) -> None:
        """Take the pixels that a batch holds from it; the next batch gets their memory.

        Args:
            written: all that was to be read for the batch has been.
        """
        if batch.held is not None:
            self._held_memory.give(batch.held.memory, written and not (batch.held.spoiled or self.closed))
            batch.held.clear()
            batch.held = None

    def _plan_batch(self, batch: Batch) -> None:
        streamed = batch.lengths()
        self._hold(batch, streamed)
        lengths = [0 if source is None else len(source) for source in batch.sources]
        for packed in pack(lengths, self.chunk):
            # Chunks are cut as if all were streamed, so that an image that is not changes no other's.
            segments = [segment for segment in packed if streamed[segment[0]]]
            if not segments:
                continue
            buffer = self._ring.take(lambda: self.closed or batch.closed)
            if buffer is None:
                return
            planned = self._submit(batch, segments, buffer)
            with self.changing():
                if batch.closed:
                    self.recycle(planned)
                else:
                    batch.planned.append(planned)

    def _allocate(self) -> Array:
        assert self._shape is not None
        shape, dtype = self._shape
        return self.reader.stock.take((self.chunk, *shape), dtype)

    def _submit(self, batch: Batch, segments: list[tuple[int, int, int]], buffer: Array) -> Planned:
        readings: list[Reading] = []
        row = 0
        for position, start, stop in segments:
            for first in range(start, stop, self._run):
                index = np.arange(first, min(first + self._run, stop), dtype=np.int64)
                rows = buffer[row : row + len(index)]
                if batch.handles[position] is not None:  # else it has failed meanwhile
                    what = batch, position, index, rows, self.pool, self.leave_out
                    readings.append(Reading(*what, deliver=self.deliver, need=self._need, held=batch.held))
                row += len(index)
        buffer[row:] = 0
        return Planned(buffer, row, readings)

    # On the consumer's thread

    def next_batch(self) -> Batch | None:
        with self.changing():
            self.reader.wait(lambda: self._wait_for(lambda: bool(self._ready)))
            return self._ready.popleft()

    def next_planned(self, batch: Batch) -> Planned | None:
        while len(self._shown) > 1:
            self._give_back(self._shown.popleft())
        self.reader.wait(lambda: self._wait_for(lambda: bool(batch.planned) or batch.complete or batch.closed))
        with self.pool.lock:
            if self.closed and not batch.closed:  # what is planned may not be all
                raise RuntimeError("the stream was closed while it was read from")
            return batch.planned.popleft() if batch.planned else None

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self.pool.lock:
            while not condition():
                if self._error is not None:
                    raise self._error
                if self.closed:
                    raise RuntimeError("the stream was closed while it was read from")
                self.pool.changed.wait()

    def finish(self, batch: Batch, planned: Planned) -> Chunk:
        """Wait for a chunk's pixels, and take out what belongs to images that failed and what is unreadable."""
        with nullcontext() if planned.finished() else self._need.waiting():
            self.reader.wait(lambda: batch.finish(planned.readings))
        chunk = assembled(planned, batch.failed, self._allocate)
        if chunk.encoded:
            chunk.again = partial(self._decode_on_host, batch)
        if batch.held is not None:
            for reading in planned.readings:
                if reading.position not in batch.failed:
                    batch.held.confirm(reading.position, reading.as_pixels())
        self._shown.append(chunk)
        self.reader.read_patches += chunk.count
        self.reader.encoded_patches += len(chunk.encoded)
        return chunk

    def _decode_on_host(self, batch: Batch, chunk: Chunk) -> None:
        before, encoded = chunk.count, len(chunk.encoded)
        pieces = []
        for position, rows in encoded_rows(chunk):
            if batch.handles[position] is not None:
                out = np.empty((len(rows), *chunk.pixels.shape[1:]), chunk.pixels.dtype)
                pieces.append((rows, batch.read_now(position, chunk.index[rows], out)))
        self.reader.wait(lambda: batch.finish([reading for _, part in pieces for reading in part]))
        fill_in(chunk, pieces, batch.failed)
        self.reader.read_patches -= before - chunk.count
        self.reader.encoded_patches -= encoded

    def _give_back(self, chunk: Chunk) -> None:
        self._ring.give(chunk.pixels, chunk.copied)

    def recycle(self, planned: Planned) -> None:
        """Give back the buffer of a chunk that nobody will see."""
        self._ring.give(planned.buffer if planned.finished() else None)

    def drop(self, handle: OpenSource) -> None:
        with self.pool.lock:
            self._opened.discard(handle)
        handle.close()

    def close(self) -> None:
        """End the planning and close all sources; those being read close when that is done."""
        if sys.is_finalizing():  # a thread may have been stopped while it held the lock, and nothing is left to end
            return
        with self.changing():
            self.closed = True
            opened, self._opened = self._opened, set()
            self._ready.clear()
            while self._shown:
                self._give_back(self._shown.popleft())
            self._ring.close()
            self._held_memory.clear()
        for handle in opened:
            handle.close()
