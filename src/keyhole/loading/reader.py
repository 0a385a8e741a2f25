"""Chunks of patches, read ahead in parallel and in order, packed across the images of a batch.

A planning thread opens the sources of a batch, cuts their patches into chunks and hands the reading to the threads.
Host memory is bounded by the ring of buffers, (ahead + 2) chunks and what the tasks in progress hold, and by twice
`cache_bytes` where a stream caches pixels for `Batch.fetch`. A batch is opened when the last chunk of the one before it
has a buffer. A lost file is opened and read again by the thread that needs it; reading threads go on.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from keyhole.loading.batch import MIN_TASK_PATCHES, Batch
from keyhole.loading.buffers import Allocate, Array
from keyhole.loading.chunks import Delivery, Opener, Segment, pack
from keyhole.loading.reading import Planned, Reading
from keyhole.loading.stream import LOST, OnError, SharedReading, Stream
from keyhole.util.threads import ReadingThreads

T = TypeVar("T")
MAX_TASK_PATCHES = 64
"""Patches of one task: enough that neighbours share tiles and handing over costs little."""


class Reader(SharedReading):
    """Reads patches on daemon threads, ahead of the consumer.

    Args:
        threads: that read and decode; default one per core, at most 16.
        ahead: chunks that are being read or ready, across batches.
        stall: seconds without a sign of life after which a read is given up with `StalledRead`.
        allocate: makes the buffers of chunks, such as pinned memory for a GPU.
        retries: times that an image is opened and read again after `ImageLost` or `StalledRead`.
        retry_wait: seconds before the first of them; before each further one four times as long (1, 4, 16).
        on_retry: called before each wait with the image's name and the reason, on the consumer's thread or, for an
            image that is being opened, on the planning thread. What it raises ends the stream.

    Attributes:
        waited: seconds that the consumer has waited for pixels.
        read_patches: patches handed to the consumer.
        reread_patches: those of them that `Batch.fetch` read from their files.
        encoded_patches: those of them that came as JPEG streams.

    >>> from keyhole.patches.sources import TensorPatches
    >>> def opener():
    ...     return TensorPatches(np.arange(12).reshape(6, 2), "six features")
    >>> opener.name = "six features"
    >>> with Reader(threads=1) as reader:
    ...     for batch in reader.stream([[opener]], chunk=4):
    ...         for chunk in batch.chunks():
    ...             print(chunk.index, chunk.pixels[: chunk.count].sum())
    ...         print(batch.fetch([[5, 0]])[0].tolist())
    [0 1 2 3] 28
    [4 5] 38
    [[10, 11], [0, 1]]
    """

    def __init__(
        self,
        threads: int | None = None,
        ahead: int = 4,
        stall: float = 120.0,
        allocate: Allocate = np.empty,
        retries: int = 3,
        retry_wait: float = 1.0,
        on_retry: Callable[[str, str], None] | None = None,
    ) -> None:
        super().__init__(ReadingThreads(threads, stall), ahead, allocate, retries, retry_wait, on_retry)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    def stream(
        self,
        batches: Iterable[Sequence[Opener]],
        chunk: int,
        on_error: OnError = "raise",
        cache_bytes: int = 0,
        deliver: Delivery | None = None,
    ) -> Iterator[Batch]:
        """Yield the batches in order, each with its sources open; leaving the loop in any way closes everything.

        A file that is lost is tried again first (`retries`). If an error remains,
          "raise" ends the stream;
          "skip" leaves the whole image out of its batch;
          "mask" leaves out the patches that are unreadable, and notes them in `Batch.unreadable`. The whole image is
            left out only if it cannot be opened (any more), stalls, has changed, or no patch of it is readable.
            With `retries=0` a lost file fails at once, though other parts of it may be readable.

        Args:
            batches: openers of each batch, `FetchOnly` for images that are not to be streamed; iterated ahead of the
                consumer, on another thread.
            chunk: patches of a chunk.
            on_error: what an image or patches that cannot be read do.
            cache_bytes: decoded pixels up to which a batch keeps all that it streams, so that `Batch.fetch` does not
                read them again; larger batches keep nothing. Two batches are cached at a time: the consumer's and the
                next.
            deliver: which patches may come as JPEG streams, in `Chunk.encoded`; by default none.

        Raises:
            KeyholeError: an image failed and `on_error` is "raise".
            ConfigError: patches of different shapes.
        """
        stream = Stream(self, chunk, on_error, cache_bytes, deliver)
        self._streams.add(stream)
        planner = _Planner(stream, batches)
        try:
            while (batch := planner.next_batch()) is not None:
                yield batch
                batch.close()
        finally:
            stream.close()

    def run(self, name: str, function: Callable[[], T]) -> T:
        """Return the result of a function that reads the file `name`, under the stall limit, without retries."""
        task = self.threads.submit(name, function, urgent=True)
        with self.waiting():
            self.threads.wait(task)
        return task.value()

    def close(self) -> None:
        """Close all streams and end the threads. Does not wait: sources that are being read close afterwards."""
        for stream in list(self._streams):
            stream.close()
        self.spare.close()
        self.threads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Planner:
    """A thread that opens batches in order and has their chunks read, as far ahead as the ring has buffers."""

    def __init__(self, stream: Stream, batches: Iterable[Sequence[Opener]]) -> None:
        self._stream, self._threads, self._batches = stream, stream.threads, batches
        ahead = stream.reader.ahead
        self._run = int(np.clip(stream.chunk * ahead // (2 * self._threads.count), MIN_TASK_PATCHES, MAX_TASK_PATCHES))
        self._ready: deque[Batch | None] = deque()  # None: no more
        threading.Thread(target=self._plan, name="keyhole-plan", daemon=True).start()

    def next_batch(self) -> Batch | None:
        """Wait for the next batch and return it, on the consumer's thread; None at the end."""
        stream = self._stream
        with stream.changing():
            stream.wait_for(lambda: bool(self._ready) and not stream.closed)
            return self._ready.popleft()

    def _plan(self) -> None:
        stream = self._stream
        try:
            for openers in self._batches:
                if stream.closed:
                    return
                batch = self._opened(openers)
                with stream.changing():
                    self._ready.append(batch)
                self._plan_chunks(batch)
                with stream.changing():
                    batch.complete = True
                    # The ring does not hold back batches that need no buffers.
                    while len(self._ready) > stream.reader.ahead and not stream.closed:
                        self._threads.changed.wait()
            with stream.changing():
                self._ready.append(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer, when it gets there
            with stream.changing():
                stream.error = error

    def _opened(self, openers: Sequence[Opener]) -> Batch:
        """Open all images at once, and those that are lost again together."""
        stream = self._stream
        batch = Batch(stream, openers)
        waiting, tries, seconds = batch.slots, 0, 0.0
        while waiting and not stream.closed:
            tasks = [self._threads.submit(slot.opener.name, partial(stream.open, slot.opener)) for slot in waiting]
            lost = []
            for slot, task in zip(waiting, tasks, strict=True):
                self._threads.wait(task, stop=lambda: stream.closed)
                if stream.closed:
                    return batch
                if isinstance(task.error, LOST) and tries < stream.reader.retries:
                    lost.append(slot)
                    seconds = stream.reader.retry_in(slot.opener.name, task.error, tries)
                elif task.error is not None:
                    batch.fail(slot.image, task.error)
                elif (handle := task.value()) is not None:
                    stream.put(slot, handle)
            if lost:
                self._threads.pause(seconds, lambda: stream.closed)
                tries += 1
            waiting = lost
        return batch

    def _plan_chunks(self, batch: Batch) -> None:
        stream, streamed = self._stream, batch.lengths()

        def unwanted() -> bool:
            return stream.closed or batch.closed

        with self._threads.lock:
            batch.cache = stream.new_cache(streamed, unwanted)
        lengths = [0 if source is None else len(source) for source in batch.sources]
        for packed in pack(lengths, stream.chunk):
            # Chunks are cut as if all images were streamed, so that one that is not changes no other's.
            segments = [segment for segment in packed if streamed[segment.image]]
            if not segments:
                continue
            assert stream.shape is not None
            shape, dtype = stream.shape
            buffer = stream.ring.take((stream.chunk, *shape), dtype, unwanted)
            if buffer is None:
                return
            planned = self._submit(batch, segments, buffer)
            with stream.changing():
                if batch.closed:
                    batch.drop(planned)
                else:
                    batch.planned.append(planned)

    def _submit(self, batch: Batch, segments: list[Segment], buffer: Array) -> Planned:
        """Hand the patches of a chunk to the reading threads."""
        planned, row = Planned(buffer, sum(stop - start for _, start, stop in segments), []), 0
        buffer[planned.rows :] = 0
        for image, start, stop in segments:
            slot = batch.slots[image]
            for first in range(start, stop, self._run):
                index = np.arange(first, min(first + self._run, stop), dtype=np.int64)
                if slot.handle is not None:  # else it has failed meanwhile
                    rows = buffer[row : row + len(index)]
                    planned.readings.append(Reading(self._stream, slot, index, rows, batch.cache))
                row += len(index)
        return planned
