"""One pass over batches: the state that the planning thread, the reading threads and the consumer share."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from keyhole.errors import ConfigError, ImageError
from keyhole.loading.buffers import Allocate, Array, BufferRing, CacheMemory, PixelCache, SpareBuffers, cache_size
from keyhole.loading.chunks import Chunk, Delivery, Opener
from keyhole.loading.source import LeaveOut, OpenSource, Slot
from keyhole.patches.sources import PatchSource
from keyhole.util.threads import ReadingThreads, given_up

T = TypeVar("T")
OnError = Literal["raise", "skip", "mask"]


@dataclass(frozen=True)
class Retry:
    """How often a lost file is read again: `times`, after `first` seconds and then each time four times as long."""

    times: int
    first: float
    told: Callable[[str, str], None] | None

    def seconds(self, tries: int) -> float:
        """Return how long to wait after `tries` further tries."""
        return self.first * 4.0**tries

    def tell(self, name: str, error: ImageError, tries: int) -> None:
        """Report that an image will be read again."""
        if self.told is not None:
            problem = error.problem.rstrip(".")
            self.told(name, f"{problem}; try {tries + 1} of {self.times} in {self.seconds(tries):g} s")


class SharedReading:
    """What all streams of one `Reader` share: threads, spare buffers, retries and counters."""

    def __init__(self, threads: ReadingThreads, ahead: int, allocate: Allocate, retry: Retry) -> None:
        self.threads, self.ahead, self.retry = threads, ahead, retry
        self.spare = SpareBuffers(threads, ahead + 2, allocate)
        self.waited = 0.0
        self.read_patches = self.reread_patches = self.encoded_patches = 0

    def wait(self, blocking: Callable[[], T]) -> T:
        """Call `blocking`, and add the time to `waited`."""
        start = time.perf_counter()
        try:
            return blocking()
        finally:
            self.waited += time.perf_counter() - start


class Stream:
    """One pass.

    Attributes:
        reader: what all passes share.
        chunk: patches of a chunk.
        on_error: as in `Reader.stream`.
        deliver: which patches may come as JPEG streams; None for none.
        shape: shape and type of a patch; None before the first image is open.
        waiting: True while the consumer waits for pixels.
        error: what the planning thread failed with.
        closed: True once nobody consumes any more.
    """

    def __init__(
        self, reader: SharedReading, chunk: int, on_error: OnError, cache_bytes: int, deliver: Delivery | None
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"select.chunk (={chunk}) must be at least 1")
        self.reader, self.threads, self.retry = reader, reader.threads, reader.retry
        self.chunk, self.on_error, self.deliver = chunk, on_error, deliver
        self.leave_out: LeaveOut = "damaged" if on_error == "mask" else "nothing"
        self.shape: tuple[tuple[int, ...], np.dtype[Any]] | None = None
        self.ring = BufferRing(reader.threads, reader.ahead + 2, reader.spare)
        self.waiting = False
        self.error: BaseException | None = None
        self.closed = False
        self._cache_bytes, self._cache_memory = cache_bytes, CacheMemory()
        self._shown: deque[Chunk] = deque()  # with the consumer, oldest first
        self._opened: set[OpenSource] = set()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock inside, then wake all that wait."""
        with self.threads.lock:
            yield
            self.threads.changed.notify_all()
            self.ring.changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Block the consumer until `condition()` is true.

        Raises:
            RuntimeError: the stream was closed.
            BaseException: what the planning thread failed with.
        """
        with self.threads.lock:
            while not condition():
                if self.error is not None:
                    raise self.error
                if self.closed:
                    raise RuntimeError("the stream was closed while it was read from")
                self.threads.changed.wait()

    def open(self, opener: Opener) -> OpenSource | None:
        """Open an image, on a reading thread; return None if nobody wants it any more."""
        if self.closed:
            return None
        handle = OpenSource(opener())
        with self.threads.lock:
            wanted = not (self.closed or given_up())
            if wanted:
                self._opened.add(handle)
        if not wanted:
            handle.close()
            return None
        return handle

    def put(self, slot: Slot, handle: OpenSource) -> None:
        """Give an image its source.

        Raises:
            ConfigError: its patches have another shape than those of the images before.
        """
        slot.handle = handle
        shape = handle.source.patch_shape, handle.source.dtype
        self.shape = self.shape or shape
        if shape != self.shape:
            raise ConfigError(
                f"{handle.source.name}: patches of {shape[1]} {shape[0]}, but those before are "
                f"{self.shape[1]} {self.shape[0]}; all images of a run need the same"
            )

    def reopen(self, slot: Slot) -> BaseException | None:
        """Replace a lost source by a new one; return the error if that fails."""
        old = slot.handle
        assert old is not None
        task = self.threads.submit(slot.opener.name, lambda: self.open(slot.opener), urgent=True)
        self.threads.wait(task)
        if task.error is not None:
            return task.error
        new = task.value()
        if new is None:  # the stream was closed
            return old.lost
        before, now = (_describe(each.source) for each in (old, new))
        if before != now or old.source.dtype != new.source.dtype:
            self.drop(new)
            problem = f"changed while it was read: {before} before, {now} now. Run again when nobody writes to it."
            return ImageError(slot.opener.name, problem)
        slot.handle = new
        self.drop(old)
        return None

    def drop(self, handle: OpenSource) -> None:
        """Close a source of this stream."""
        with self.threads.lock:
            self._opened.discard(handle)
        handle.close()

    def new_cache(self, lengths: Sequence[int], unwanted: Callable[[], bool]) -> PixelCache | None:
        """Return a cache for all pixels of a batch if they fit; wait while batches before it hold too much for that."""
        if self.shape is None or not 0 < (size := cache_size(lengths, *self.shape)) <= self._cache_bytes:
            return None
        with self.threads.lock:
            while not unwanted():
                if (memory := self._cache_memory.take(size, 2 * self._cache_bytes)) is not None:
                    return PixelCache(lengths, *self.shape, memory)
                self.threads.changed.wait()
        return None

    def free_cache(self, cache: PixelCache, written: bool) -> None:
        """Give the memory of a closed batch to the next; `written` says that all its readings have ended."""
        self._cache_memory.give(cache.memory, written and not (cache.spoiled or self.closed))
        cache.clear()

    def show(self, chunk: Chunk) -> None:
        """Remember a chunk that the consumer gets, so that its buffer comes back when it has been used."""
        self._shown.append(chunk)

    def recycle(self, keep: int = 0) -> None:
        """Take back the buffers of all chunks but the newest `keep`."""
        while len(self._shown) > keep:
            chunk = self._shown.popleft()
            self.ring.give(chunk.pixels, chunk.copied)

    def take_buffer(self, unwanted: Callable[[], bool]) -> Array | None:
        """Wait for a buffer for a chunk and return it; None once `unwanted()` is true."""
        assert self.shape is not None
        shape, dtype = self.shape
        return self.ring.take((self.chunk, *shape), dtype, unwanted)

    def close(self) -> None:
        """End the planning and close all sources; those that are being read close afterwards."""
        if sys.is_finalizing():  # a thread may have been stopped while it held the lock, and nothing is left to end
            return
        with self.changing():
            self.closed = True
            opened, self._opened = self._opened, set()
            self.recycle()
            self.ring.close()
            self._cache_memory.clear()
        for handle in opened:
            handle.close()


def _describe(source: PatchSource) -> str:
    return f"{len(source)} patches {source.patch_shape}"
