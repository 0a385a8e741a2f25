"""One pass over batches: its open sources, and what the planning thread, the reading threads and the consumer share."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from keyhole.errors import ConfigError, ImageError, ImageLost, StalledRead
from keyhole.loading.buffers import Array, CacheMemory, Copied, PixelCache, SpareBuffers
from keyhole.loading.chunks import Chunk, Coded, Delivery, Opener
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource
from keyhole.util.threads import ReadingThreads, ReadTask, beat, given_up

OnError = Literal["raise", "skip", "mask"]
LeaveOut = Literal["nothing", "damaged", "lost"]
"""Patches that a read may leave out: none, damaged ones, or also those that the disk does not deliver."""

LOST = (ImageLost, StalledRead)
"""Errors after which trying again may help; every other error would come again."""


class OpenSource:
    """An open source that several threads read. `close` does not wait: the last thread that reads closes it.

    Attributes:
        lost: why the file could not be reached; this source is not read again.
        delivers: some of its patches have come as JPEG streams.
        whole: the read `first` decodes the whole image.
    """

    def __init__(self, source: PatchSource) -> None:
        self.source = source
        self.lost: ImageError | None = None
        self.delivers = False
        self.whole = source.whole_bytes > 0
        self.first: ReadTask[Any] | None = None
        self._lock = threading.RLock()
        self._readers = 0
        self._closing = False

    def read(self, index: Index, out: Array, leave_out: LeaveOut = "nothing") -> dict[int, str]:
        """Read into `out`; return why patches were left out, by patch index. Their rows are zeros."""

        def may_lack(error: ImageError) -> bool:
            return leave_out == "lost" or (leave_out == "damaged" and not isinstance(error, LOST))

        with self._reading():
            try:
                self.source.read(index, out=out)
                return {}
            except ImageError as error:
                if not may_lack(error):
                    raise
            unreadable = {}
            for row in range(len(index)):
                if given_up():
                    break
                try:
                    self.source.read(index[row : row + 1], out=out[row : row + 1])
                except ImageError as error:
                    if not may_lack(error):
                        raise
                    out[row] = 0
                    unreadable[int(index[row])] = error.problem
                beat()  # the disk has answered, if only with an error
            return unreadable

    def encoded(self, index: Index, colors: Container[str]) -> dict[int, Coded]:
        """Return the patches that the file stores as JPEG, by patch index; `read` raises what is wrong with others."""
        with self._reading():
            try:
                found = self.source.encoded(index, colors)
            except LOST:
                raise
            except ImageError:
                return {}
        streams = zip(index.tolist(), found or [], strict=found is not None)
        coded = {patch: Coded(data, self.source.view) for patch, data in streams if data is not None}
        self.delivers = self.delivers or bool(coded)
        return coded

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep the source open inside."""
        with self._lock:
            if self.lost is None and self.first is not None and self.first.lost:
                assert isinstance(self.first.error, StalledRead)
                self.lost = self.first.error  # this read would wait for the decoding that is stuck
            if self.lost is not None or self._closing:
                raise ImageLost(self.source.name, "closed" if self.lost is None else self.lost.problem)
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

    def close(self) -> None:
        """Close now, or as soon as no thread reads. Does not wait."""
        with self._lock:
            now = not self._closing and self._readers == 0
            self._closing = True
        if now:
            self.source.close()


class Slot:
    """One image of a batch: its index, its opener, and its source; None before it is open and after it has failed.

    `worn_out` is True when all retries of a read did not help.
    """

    def __init__(self, image: int, opener: Opener) -> None:
        self.image, self.opener = image, opener
        self.handle: OpenSource | None = None
        self.worn_out = False


@dataclass(eq=False)
class SharedReading:
    """What the streams of one `Reader` share: threads, spare buffers, retries and counters."""

    threads: ReadingThreads
    ahead: int
    spare: SpareBuffers
    retries: int
    retry_wait: float
    on_retry: Callable[[str, str], None] | None
    waited: float = 0.0
    read_patches: int = 0
    reread_patches: int = 0
    encoded_patches: int = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time inside to `waited`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - start

    def retry_in(self, name: str, error: ImageError, tries: int) -> float:
        """Report that an image will be read again after `tries` tries; return the seconds to wait before that."""
        seconds = self.retry_wait * 4.0**tries
        if self.on_retry is not None:
            problem = error.problem.rstrip(".")
            self.on_retry(name, f"{problem}; try {tries + 1} of {self.retries} in {seconds:g} s")
        return seconds


class Stream:
    """One pass; arguments as in `Reader.stream`.

    Attributes:
        shape: shape and type of a patch; None before the first image is open.
        shown: chunks that the consumer has, oldest first.
        waiting: True while the consumer waits for pixels that are being read.
        starved: True while the consumer waits for the thread that plans.
        error: of the planning thread.
        closed: True after the end of the pass.
        buffer_free: notified when a buffer is free, and when `unwanted` of `take_buffer` may have changed.
    """

    def __init__(
        self, reader: SharedReading, chunk: int, on_error: OnError, cache_bytes: int, deliver: Delivery | None
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"select.chunk (={chunk}) must be at least 1")
        self.reader, self.threads = reader, reader.threads
        self.chunk, self.on_error, self.deliver = chunk, on_error, deliver
        self.shape: tuple[tuple[int, ...], np.dtype[Any]] | None = None
        self.buffer_free = threading.Condition(reader.threads.lock)
        self.shown: deque[Chunk] = deque()
        self.waiting = self.starved = False
        self.error: BaseException | None = None
        self.closed = False
        self._cache_bytes, self._cache_memory = cache_bytes, CacheMemory(2 * cache_bytes)
        self._free_buffers = reader.ahead + 2  # this bounds how far a stream reads ahead
        self._opened: set[OpenSource] = set()

    @property
    def hungry(self) -> bool:
        """Whether the consumer waits, so that all threads should read for it."""
        return self.waiting or self.starved

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock inside, then wake all threads that wait."""
        with self.threads.lock:
            yield
            self.threads.changed.notify_all()
            self.buffer_free.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Block the consumer, which holds the lock, until `condition()` is true."""
        with self.reader.waiting():
            while not condition():
                if self.error is not None:
                    raise self.error
                if self.closed:
                    raise RuntimeError("the stream was closed while it was read from")
                self.starved = True
                try:
                    self.threads.changed.wait()
                finally:
                    self.starved = False

    def open(self, opener: Opener) -> OpenSource | None:
        """Open an image, on a reading thread; return None if the stream was closed or the task given up."""
        if self.closed:
            return None
        handle = OpenSource(opener())
        with self.threads.lock:
            if not (self.closed or given_up()):
                self._opened.add(handle)
                return handle
        handle.close()
        return None

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
        before, now = (f"{len(each.source)} patches {each.source.patch_shape}" for each in (old, new))
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
        """Return a cache for all pixels of a batch if they fit; wait while earlier batches cache too much for that.

        The caller holds the lock.
        """
        if self.shape is None:
            return None
        shape, dtype = self.shape
        size = sum(lengths) * math.prod(shape) * dtype.itemsize
        if not 0 < size <= self._cache_bytes:
            return None
        while not unwanted():
            if (memory := self._cache_memory.take(size)) is not None:
                return PixelCache(lengths, memory[:size].view(dtype).reshape(-1, *shape), memory)
            self.threads.changed.wait()
        return None

    def free_cache(self, cache: PixelCache, written: bool) -> None:
        """Let the next batch use the memory of a closed one, if all readings of that have ended (`written`)."""
        self._cache_memory.give(cache.memory, written and not (cache.spoiled or self.closed))
        cache.clear()

    def take_buffer(self, unwanted: Callable[[], bool]) -> Array | None:
        """Wait for a buffer for a chunk, which no copy reads any more; return None once `unwanted()` is true."""
        assert self.shape is not None
        shape, dtype = self.shape
        with self.threads.lock:
            while not (self._free_buffers or unwanted()):
                self.buffer_free.wait()
            if unwanted():
                return None
            self._free_buffers -= 1
        return self.reader.spare.take((self.chunk, *shape), dtype)

    def give_buffer(self, buffer: Array | None, copied: Copied | None = None) -> None:
        """Take a buffer back; None stands for one that a thread may still write to."""
        with self.threads.lock:
            self._free_buffers += 1
            if buffer is not None:
                self.reader.spare.give(buffer, copied)
            self.buffer_free.notify_all()

    def recycle(self, keep: int = 0) -> None:
        """Take back the buffers of all chunks but the newest `keep`."""
        while len(self.shown) > keep:
            chunk = self.shown.popleft()
            self.give_buffer(chunk.pixels, chunk.copied)

    def close(self) -> None:
        """End the planning and close all sources; those that are being read close afterwards."""
        if sys.is_finalizing():  # a thread may have been stopped while it held the lock
            return
        with self.changing():
            self.closed = True
            opened, self._opened = self._opened, set()
            self.recycle()
            self._cache_memory.free.clear()
        for handle in opened:
            handle.close()
