"""Chunks of patches, read ahead in parallel and in order, packed across the images of a batch.

A planning thread opens the sources of a batch, cuts their patches into chunks, and submits the reading of these to the
reading threads. Host memory is bounded by (ahead + 2) buffers of one chunk and what the tasks in progress hold, and by
twice `cache_bytes` where a stream caches pixels for `Batch.fetch`. A batch is opened when the last chunk of the batch
before has a buffer. The thread that needs a lost file opens and reads it again; reading threads go on.

Images in memory are opened and copied by the planning thread itself as long as that keeps ahead of the consumer: many
threads with little to do each would take the interpreter from the one that launches a GPU's work.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from keyhole.errors import ConfigError
from keyhole.loading.batch import COPIED_BYTES, MIN_TASK_PATCHES, Batch
from keyhole.loading.buffers import Allocate, SpareBuffers
from keyhole.loading.chunks import Delivery, Opener, Shuffled, at_hand, pack
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
        stall: seconds without new data after which a read fails with `StalledRead`.
        allocate: makes the buffers of chunks, such as pinned memory for a GPU.
        retries: times that an image is opened and read again after `ImageLost` or `StalledRead`.
        retry_wait: seconds before the first retry; each further wait is four times as long (1, 4, 16).
        on_retry: called before each wait with the image's name and the reason, on the consumer's thread or, for an
            image that is being opened, on the planning thread. An exception in it ends the stream.

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
        reading = ReadingThreads(threads, stall)
        super().__init__(reading, ahead, SpareBuffers(reading, ahead + 2, allocate), retries, retry_wait, on_retry)
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

        A lost file is tried again first (`retries`). If an error remains,
          "raise" ends the stream;
          "skip" leaves the whole image out of its batch;
          "mask" leaves out the unreadable patches, and lists them in `Batch.unreadable`. The whole image is left out
            only if it cannot be opened (again), stalls, has changed, or none of its patches is readable. With
            `retries=0` a lost file fails at once, though other parts of it may be readable.

        Args:
            batches: openers of each batch, `FetchOnly` for images that are not streamed; iterated ahead of the
                consumer, on another thread.
            chunk: patches of a chunk.
            on_error: what happens to images and patches that cannot be read.
            cache_bytes: bytes of pixels up to which a batch keeps all that it streams, so that `Batch.fetch` does not
                read them again; larger batches keep nothing. Two batches are cached at a time: the consumer's and the
                next.
            deliver: which patches may come as JPEG streams, in `Chunk.encoded`; by default none.

        Raises:
            KeyholeError: an image failed and `on_error` is "raise".
            ConfigError: patches of different shapes.
        """
        stream = Stream(self, chunk, on_error, cache_bytes, deliver)
        self._streams.add(stream)
        ready: deque[Batch | None] = deque()  # None: no more
        threading.Thread(target=_plan, args=(stream, batches, ready), name="keyhole-plan", daemon=True).start()
        try:
            while True:
                with stream.changing():
                    stream.wait_for(lambda: bool(ready) and not stream.closed)
                    batch = ready.popleft()
                if batch is None:
                    break
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


def _plan(stream: Stream, batches: Iterable[Sequence[Opener]], ready: deque[Batch | None]) -> None:
    """Open batches in order and have their chunks read, as far ahead as there are buffers; run on a thread."""
    try:
        for openers in batches:
            if stream.closed:
                return
            batch = Batch(stream, openers)
            _open(stream, batch)
            with stream.changing():
                ready.append(batch)
            _plan_chunks(stream, batch)
            with stream.changing():
                batch.complete = True
                # Buffers do not limit batches that need none.
                while len(ready) > stream.reader.ahead and not stream.closed:
                    stream.threads.changed.wait()
        with stream.changing():
            ready.append(None)
    except BaseException as error:  # noqa: BLE001 - raised again in the consumer, when it gets there
        with stream.changing():
            stream.error = error


def _open(stream: Stream, batch: Batch) -> None:
    """Open all images of a batch at once, then those that are lost again together."""
    threads, slots, tries, seconds = stream.threads, batch.slots, 0, 0.0
    while slots and not stream.closed:
        tasks = []
        for slot in slots:
            here = at_hand(slot.opener) and not stream.hungry
            begin = threads.run_here if here else threads.submit
            tasks.append(begin(slot.opener.name, partial(stream.open, slot.opener)))
        lost = []
        for slot, task in zip(slots, tasks, strict=True):
            threads.wait(task, stop=lambda: stream.closed)
            if stream.closed:
                return
            if isinstance(task.error, LOST) and tries < stream.reader.retries:
                lost.append(slot)
                seconds = stream.reader.retry_in(slot.opener.name, task.error, tries)
            elif task.error is not None:
                batch.fail(slot.image, task.error)
            elif (handle := task.value()) is not None:
                slot.handle = handle
                shape = handle.source.patch_shape, handle.source.dtype
                stream.shape = stream.shape or shape
                if shape != stream.shape:
                    raise ConfigError(
                        f"{handle.source.name}: patches of {shape[1]} {shape[0]}, but those before are "
                        f"{stream.shape[1]} {stream.shape[0]}; all images of a run need the same"
                    )
        if lost:
            threads.pause(seconds, lambda: stream.closed)
            tries += 1
        slots = lost


def _plan_chunks(stream: Stream, batch: Batch) -> None:
    """Submit the patches of each chunk to the reading threads once there is a buffer for it."""
    streamed = batch.lengths()
    run = stream.chunk * stream.reader.ahead // (2 * stream.threads.count)  # patches of a task
    run = min(max(run, MIN_TASK_PATCHES), MAX_TASK_PATCHES)
    copied = 0 if stream.shape is None else COPIED_BYTES // (math.prod(stream.shape[0]) * stream.shape[1].itemsize)

    def unwanted() -> bool:
        return stream.closed or batch.closed

    with stream.threads.lock:
        batch.cache = stream.new_cache(streamed, unwanted)
    lengths = [0 if source is None else len(source) for source in batch.sources]
    orders = {
        slot.image: slot.opener.order(lengths[slot.image]) for slot in batch.slots if isinstance(slot.opener, Shuffled)
    }
    for packed in pack(lengths, stream.chunk):
        # Chunks are cut as if all images were streamed, so that an image that is not streamed changes no other's.
        segments = [segment for segment in packed if streamed[segment.image]]
        if not segments:
            continue
        buffer = stream.take_buffer(unwanted)
        if buffer is None:
            return
        planned, row = Planned(buffer, sum(stop - start for _, start, stop in segments), []), 0
        buffer[planned.rows :] = 0
        for image, start, stop in segments:
            slot = batch.slots[image]
            source = None if slot.handle is None else slot.handle.source
            held = source is not None and source.in_memory
            length = max(run, copied) if held else run
            for first in range(start, stop, length):
                index = np.arange(first, min(first + length, stop), dtype=np.int64)
                index = orders[image][index] if image in orders else index
                if slot.handle is not None:  # else it has failed meanwhile
                    rows = buffer[row : row + len(index)]
                    here = held and not stream.hungry
                    planned.readings.append(Reading(stream, slot, index, rows, batch.cache, here=here))
                row += len(index)
        with stream.changing():
            if batch.closed:
                stream.give_buffer(buffer if planned.finished() else None)
            else:
                batch.planned.append(planned)
