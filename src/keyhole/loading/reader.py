"""Chunks of patches, read ahead in parallel and in order, packed across the images of a batch.

    with Reader(threads=2) as reader:
        for batch in reader.stream(lists_of_openers, chunk=64):
            for chunk in batch.chunks():          # every patch once, without gradient
                ...
            kept = batch.fetch(indices)           # the kept patches of each image; the next batch is being read

A planning thread opens the sources of a batch, cuts their patches into chunks and hands the reading to the pool.
A ring of buffers is what bounds it: host memory is (ahead + 2) chunks and what the tasks in flight hold, and twice
`hold` where a stream holds pixels for `Batch.fetch`. The next stream of the same chunks uses the same buffers. A batch
is opened when the last chunk of the one before it has a buffer, so that of images of many chunks the sources of two
batches are open at most, and of images of few chunks those of at most ahead + 3.

A file that cannot be reached is tried again with a new handle. The waiting for that is done by who would wait for its
patches anyway (the consumer, or the planning thread for an image that is yet to be opened); reading threads go on.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from keyhole.loading.batch import Batch
from keyhole.loading.chunks import Chunk, Delivery, FetchOnly, Opener
from keyhole.loading.ring import Allocate, Stock
from keyhole.loading.stream import OnError, Retry, Stream
from keyhole.util.threads import Pool

__all__ = ["Batch", "Chunk", "Delivery", "FetchOnly", "OnError", "Opener", "Reader"]

T = TypeVar("T")


class Reader:
    """Reads patches on daemon threads, ahead of who consumes them.

    Args:
        threads: that read and decode; default one per core, at most 16.
        ahead: chunks that are being read or ready, over the borders of batches.
        stall: seconds without a sign of life after which a read is given up with `StalledRead`.
        allocate: makes the buffers of chunks (pinned memory for a GPU).
        retries: times that a streamed image is opened and read again after `ImageLost` or `StalledRead`.
        retry_wait: seconds before the first of them; before each further one four times as long (1, 4, 16).
        on_retry: called before each wait with the image's name and the reason, on the consumer's thread or, for an
            image that is being opened, on the planning thread. What it raises ends the stream.

    Attributes:
        waited: seconds that the consumer has spent waiting for reading.
        read_patches: patches handed to the consumer.
        reread_patches: those of them that `Batch.fetch` read from their files.
        encoded_patches: those of them that came as JPEG.
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
        self.ahead = ahead
        self.waited = 0.0
        self.read_patches = self.reread_patches = self.encoded_patches = 0
        self.pool = Pool(threads, stall)
        self.stock = Stock(self.pool, ahead + 2, allocate)
        self._retry = Retry(retries, retry_wait, on_retry)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    def stream(
        self,
        batches: Iterable[Sequence[Opener]],
        chunk: int,
        on_error: OnError = "raise",
        hold: int = 0,
        deliver: Delivery | None = None,
    ) -> Iterator[Batch]:
        """The batches in order, each with its sources open; leaving the loop in any way closes everything.

        A file that is lost is tried again first (`retries`). What then stays wrong
          "raise" ends the stream;
          "skip" leaves the whole image out of its batch;
          "mask" leaves out the patches that are unreadable, and notes them in `Batch.unreadable`. The whole image is
            left out only where it cannot be opened (any more), stalls, has changed, or no patch of it is readable.
            With `retries=0` a lost file fails at once, though other parts of it may be readable.

        Args:
            batches: openers of each batch, `FetchOnly` for images that are not to be streamed; iterated ahead of the
                consumer, on another thread.
            chunk: patches of a chunk.
            on_error: what becomes of images or patches that cannot be read.
            hold: bytes of decoded pixels up to which a batch keeps all that it streams, so that `Batch.fetch` reads no
                file again; larger batches keep nothing. Two batches may hold that much: the consumer's and the next.
            deliver: which patches may come as JPEG, in `Chunk.encoded`; by default none. `staging.Stager` decodes them.

        Raises:
            KeyholeError: an image failed and `on_error` is "raise".
            ConfigError: patches of different shapes.
        """
        stream = Stream(self, batches, chunk, on_error, self._retry, hold, deliver)
        self._streams.add(stream)
        try:
            while (batch := stream.next_batch()) is not None:
                yield batch
                batch.close()
        finally:
            stream.close()

    def run(self, name: str, function: Callable[[], T]) -> T:
        """The result of a function, on the pool and under the stall limit, without another try.

        Args:
            name: the file, for the message.
            function: what to do.
        """
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
        self.stock.close()
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
