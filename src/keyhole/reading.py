"""Chunks of patches, read ahead in parallel and in order, packed across the images of a batch.

    with Reader(threads=2) as reader:
        for batch in reader.stream(lists_of_openers, chunk=64):
            for chunk in batch.chunks():          # every patch once, without gradient
                ...
            kept = batch.fetch(indices)           # the kept patches of each image; the next batch is being read

A planning thread opens the sources of a batch, cuts their patches into chunks and hands the reading to the pool.
A ring of buffers is what bounds it: host memory is (ahead + 2) chunks and what the tasks in flight hold.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from keyhole.chunks import Allocate, Array, Chunk, Opener, OpenSource, Planned, Ring, Runs, pack
from keyhole.errors import ConfigError, KeyholeError
from keyhole.patches import PatchSource
from keyhole.pool import Pool, Task

__all__ = ["Batch", "Chunk", "Opener", "Reader"]

T = TypeVar("T")

RUN = 32
"""Patches of one task: some tens, so that neighbours share tiles and handing over costs little (PAPER: 32)."""
SHORT_RUN = 8
"""Patches of one task where there are many threads to feed, and of kept patches, which share few tiles."""


class Reader:
    """Reads patches on daemon threads, ahead of who consumes them.

    Args:
        threads: that read and decode; default one per core, at most 16.
        ahead: chunks that are being read or ready, over the borders of batches.
        stall: seconds without a sign of life after which a read is given up with `StalledRead`.
        allocate: makes the buffers of chunks (pinned memory for a GPU).

    Attributes:
        waited: seconds that the consumer has spent waiting for reading.
        read_patches: patches handed to the consumer.
    """

    def __init__(
        self,
        threads: int | None = None,
        ahead: int = 4,
        stall: float = 120.0,
        allocate: Allocate = np.empty,
    ) -> None:
        self.ahead = ahead
        self.allocate = allocate
        self.waited = 0.0
        self.read_patches = 0
        self.pool = Pool(threads, stall)
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()

    def stream(
        self, batches: Iterable[Sequence[Opener]], chunk: int, on_error: Literal["raise", "skip"] = "raise"
    ) -> Iterator[Batch]:
        """The batches in order, each with its sources open; leaving the loop in any way closes everything.

        Args:
            batches: openers of each batch; iterated ahead of the consumer, on another thread.
            chunk: patches of a chunk.
            on_error: an image that cannot be opened or read ends the stream, or is left out of its batch.

        Raises:
            KeyholeError: an image failed and `on_error` is "raise".
            ConfigError: patches of different shapes.
        """
        stream = _Stream(self, batches, chunk, skip=on_error == "skip")
        self._streams.add(stream)
        try:
            while (batch := stream.next_batch()) is not None:
                yield batch
                batch.close()
        finally:
            stream.close()

    def run(self, name: str, function: Callable[[], T]) -> T:
        """The result of a function, on the pool and under the stall limit. `name` is the file, for the message."""
        task = self.pool.submit(name, function, urgent=True)
        self.wait(partial(self.pool.wait, task))
        return task.value()

    def wait(self, blocking: Callable[[], T]) -> T:
        """Call, and count the time as the consumer's waiting."""
        start = time.perf_counter()
        try:
            return blocking()
        finally:
            self.waited += time.perf_counter() - start

    def close(self) -> None:
        """Close all streams and let the threads end. Never waits: sources still being read close afterwards."""
        for stream in list(self._streams):
            stream.close()
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Batch:
    """The images of one step.

    Attributes:
        names: of all images asked for.
        sources: open until the next batch is asked for; None where an image failed and failures are skipped.
        failed: what went wrong, by position; grows during `chunks` and `fetch`. Patches of such an image that
            came in earlier chunks are the consumer's to drop.
    """

    def __init__(self, stream: _Stream, names: list[str]) -> None:
        self.names = names
        self.sources: list[PatchSource | None] = [None] * len(names)
        self.failed: dict[int, KeyholeError] = {}
        self._stream = stream
        self.handles: list[OpenSource | None] = [None] * len(names)
        self.planned: deque[Planned] = deque()
        self.complete = False
        self.closed = False

    def chunks(self) -> Iterator[Chunk]:
        """All patches of all images in order, once.

        Raises:
            KeyholeError: an image failed and failures are not skipped.
        """
        while (planned := self._stream.next_planned(self)) is not None:
            chunk = self._stream.finish(self, planned)
            if chunk.count:
                yield chunk

    def fetch(self, indices: Sequence[ArrayLike | None]) -> list[Array | None]:
        """Some patches of each image, read in parallel before anything that is read ahead.

        Args:
            indices: as many as `sources`, each (m,) integers in any order, of any number; ignored where failed.

        Returns:
            (m, *patch_shape) for each image, None where failed.

        Raises:
            KeyholeError: an image failed and failures are not skipped.
        """
        if len(indices) != len(self.names):
            raise ValueError(f"{len(indices)} index arrays for {len(self.names)} images")
        if self.closed:
            raise RuntimeError("the batch is closed; fetch before the next batch is asked for")
        pool = self._stream.reader.pool
        out: list[Array | None] = [None] * len(indices)
        tasks: Runs = []
        for position, (handle, wanted) in enumerate(zip(self.handles, indices, strict=True)):
            if handle is None:
                continue
            index = np.asarray(wanted)
            index = index.astype(np.int64) if index.size else np.empty(0, np.int64)
            rows = out[position] = np.empty((len(index), *handle.source.patch_shape), handle.source.dtype)
            for start in range(0, len(index), SHORT_RUN):
                run = slice(start, start + SHORT_RUN)
                job = partial(handle.read, index[run], rows[run])
                tasks.append((position, pool.submit(self.names[position], job, urgent=True)))
        self._stream.reader.wait(lambda: self.finish(tasks))
        for position in self.failed:
            out[position] = None
        self._stream.reader.read_patches += sum(len(rows) for rows in out if rows is not None)
        return out

    def close(self) -> None:
        """Close the sources; what is still being read is dropped."""
        with self._stream.changing():
            self.closed = True
            while self.planned:
                self._stream.recycle(self.planned.popleft())
        for handle in self.handles:
            if handle is not None:
                self._stream.drop(handle)

    def finish(self, tasks: Runs) -> None:
        """Wait for tasks; those of an image that has failed may go on without us."""
        for position, task in tasks:
            if position not in self.failed:
                self._stream.reader.pool.wait(task)
                self.settle(position, task)
        if self._stream.closed:
            raise RuntimeError("the reader was closed while it was read from")

    def settle(self, position: int, task: Task[Any]) -> None:
        """Note a task's failure, or raise it."""
        error = task.error
        if error is None:
            return
        if not (self._stream.skip and isinstance(error, KeyholeError)):
            raise error
        self.failed[position] = error
        self.sources[position] = None
        handle, self.handles[position] = self.handles[position], None
        if handle is not None:
            self._stream.drop(handle)


class _Stream:
    """One pass: the planning thread, the ring of buffers and what has been planned but not yet consumed."""

    def __init__(self, reader: Reader, batches: Iterable[Sequence[Opener]], chunk: int, skip: bool) -> None:
        if chunk < 1:
            raise ConfigError(f"select.chunk (={chunk}) must be at least 1")
        self.reader = reader
        self.chunk = chunk
        self.skip = skip
        self._pool = reader.pool
        self._batches = batches
        self._run = int(np.clip(chunk * reader.ahead // (2 * self._pool.threads), SHORT_RUN, RUN))
        self._shape: tuple[tuple[int, ...], np.dtype[Any]] | None = None
        self._ring = Ring(reader.pool, reader.ahead + 2, self._allocate)
        self._shown: deque[Array] = deque()  # with the consumer, oldest first
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
                with self.changing():
                    self._ready.append(batch)
                self._plan_batch(batch)
                with self.changing():
                    batch.complete = True
            with self.changing():
                self._ready.append(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer, when it gets there
            with self.changing():
                self._error = error

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What is done inside wakes whoever waits."""
        with self._pool.lock:
            yield
            self._pool.changed.notify_all()

    def _open_batch(self, openers: Sequence[Opener]) -> Batch:
        batch = Batch(self, [opener.name for opener in openers])
        tasks = [self._pool.submit(opener.name, partial(self._open, opener)) for opener in openers]
        for position, task in enumerate(tasks):
            self._pool.wait(task, stop=lambda: self.closed)
            if self.closed:
                break
            batch.settle(position, task)
            if position in batch.failed:
                continue
            handle = batch.handles[position] = task.value()
            assert handle is not None
            batch.sources[position] = handle.source
            shape = handle.source.patch_shape, handle.source.dtype
            self._shape = self._shape or shape
            if shape != self._shape:
                raise ConfigError(
                    f"{handle.source.name}: patches of {shape[1]} {shape[0]}, but those before are "
                    f"{self._shape[1]} {self._shape[0]}; all images of a run need the same"
                )
        return batch

    def _open(self, opener: Opener) -> OpenSource | None:
        if self.closed:
            return None
        handle = OpenSource(opener())
        with self._pool.lock:
            closed = self.closed
            if not closed:
                self._opened.add(handle)
        if closed:
            handle.close()
        return handle

    def _plan_batch(self, batch: Batch) -> None:
        lengths = [0 if source is None else len(source) for source in batch.sources]
        for segments in pack(lengths, self.chunk):
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
        return self.reader.allocate((self.chunk, *shape), dtype)

    def _submit(self, batch: Batch, segments: list[tuple[int, int, int]], buffer: Array) -> Planned:
        image = np.concatenate([np.full(stop - start, position, np.int64) for position, start, stop in segments])
        index = np.concatenate([np.arange(start, stop, dtype=np.int64) for _, start, stop in segments])
        tasks: Runs = []
        row = 0
        for position, start, stop in segments:
            handle = batch.handles[position]
            for first in range(start, stop, self._run):
                count = min(self._run, stop - first)
                if handle is not None:  # else it has failed meanwhile
                    job = partial(handle.read, index[row : row + count], buffer[row : row + count])
                    tasks.append((position, self._pool.submit(batch.names[position], job)))
                row += count
        buffer[row:] = 0
        return Planned(buffer, image, index, tasks)

    # On the consumer's thread

    def next_batch(self) -> Batch | None:
        self.reader.wait(lambda: self._wait_for(lambda: bool(self._ready)))
        return self._ready.popleft()

    def next_planned(self, batch: Batch) -> Planned | None:
        while len(self._shown) > 1:
            self._ring.give(self._shown.popleft())
        self.reader.wait(lambda: self._wait_for(lambda: bool(batch.planned) or batch.complete or batch.closed))
        with self._pool.lock:
            return batch.planned.popleft() if batch.planned else None

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._pool.lock:
            while not condition():
                if self._error is not None:
                    raise self._error
                if self.closed:
                    raise RuntimeError("the stream was closed while it was read from")
                self._pool.changed.wait()

    def finish(self, batch: Batch, planned: Planned) -> Chunk:
        """Wait for a chunk's pixels, and take out what belongs to images that failed."""
        self.reader.wait(lambda: batch.finish(planned.tasks))
        buffer, image, index = planned.buffer, planned.image, planned.index
        if not (good := ~np.isin(image, list(batch.failed))).all():
            # A stuck thread may still write into the old buffer one day, so that is never used again.
            image, index = image[good], index[good]
            buffer = self._allocate()
            buffer[: len(image)] = planned.buffer[: len(good)][good]
            buffer[len(image) :] = 0
        self._shown.append(buffer)
        self.reader.read_patches += len(image)
        return Chunk(buffer, len(image), image, index)

    def recycle(self, planned: Planned) -> None:
        """Give back the buffer of a chunk that nobody will see."""
        self._ring.give(planned.buffer if planned.finished() else None)

    def drop(self, handle: OpenSource) -> None:
        with self._pool.lock:
            self._opened.discard(handle)
        handle.close()

    def close(self) -> None:
        """End the planning and close all sources; those being read close when that is done."""
        with self.changing():
            self.closed = True
            opened, self._opened = self._opened, set()
            self._ready.clear()
            self._shown.clear()
        for handle in opened:
            handle.close()
