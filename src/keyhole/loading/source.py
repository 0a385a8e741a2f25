"""One image of a batch: an open source that several threads read and that closes behind the last of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from keyhole.errors import ImageError, ImageLost, StalledRead
from keyhole.loading.buffers import Array
from keyhole.loading.chunks import Coded, Opener
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource
from keyhole.util.threads import ReadingThreads, ReadTask, beat, given_up

LeaveOut = Literal["nothing", "damaged", "lost"]
"""Patches that a read may leave out: none, damaged ones, or also those that the disk does not deliver."""

LOST = (ImageLost, StalledRead)
"""Errors that may be over after a while; every other error would come again."""


@dataclass(frozen=True)
class Outcome:
    """What a read left out, as the reason by patch index, and the patches that came as JPEG streams."""

    unreadable: dict[int, str] = field(default_factory=dict)
    coded: dict[int, Coded] = field(default_factory=dict)


class OpenSource:
    """An open source. `close` waits for nobody: the last thread that reads closes it.

    Attributes:
        lost: why the file could not be reached; nobody reads through this source again.
        delivers: True when some of its patches have come as JPEG streams.
    """

    def __init__(self, source: PatchSource) -> None:
        self.source = source
        self.lost: ImageError | None = None
        self.delivers = False
        self._whole = source.whole_bytes > 0
        self._first: ReadTask[Outcome] | None = None  # the reading that decodes the image, where it is decoded whole
        self._lock = threading.RLock()
        self._readers = 0
        self._closing = False

    def submit(self, threads: ReadingThreads, name: str, job: Callable[[], Outcome], urgent: bool) -> ReadTask[Outcome]:
        """Have a thread read from here.

        The first read of an image that is decoded whole decodes it. All others begin when that has ended, so that no
        thread waits for another's decoding: as many images are decoded at once as there are threads.
        """
        with threads.lock:
            first = self._first
            late = first is not None and first.since is None and urgent and not first.urgent  # far back in the queue
            if first is not None and not late:
                return threads.submit(name, job, urgent, after=first)
            task = threads.submit(name, job, urgent)
            if self._whole:
                self._first = task
            return task

    def read(self, index: Index, out: Array, leave_out: LeaveOut = "nothing") -> dict[int, str]:
        """Read into `out`; return why patches were left out, by patch index. Their rows are zeros.

        Raises:
            ImageLost, StalledRead: the file cannot be reached, or could not before, or the source is closed.
            ImageError: something else is wrong with it, and `leave_out` does not allow that.
        """

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
                beat()  # an error is a sign of life too
            return unreadable

    def encoded(self, index: Index, colors: Container[str]) -> dict[int, Coded]:
        """Return the patches that the file stores as JPEG, by patch index; `read` tells what is wrong with others.

        Raises:
            ImageLost, StalledRead: as `read`.
        """
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
            if self.lost is None and self._first is not None and self._first.lost:
                assert isinstance(self._first.error, StalledRead)
                self.lost = self._first.error  # a read here would wait for the same decoding
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
    """One image of a batch.

    Attributes:
        image: its index in the batch.
        opener: opens it, again after it was lost.
        handle: its source; None before it is opened and after it has failed.
        worn_out: True when all retries of a read did not help.
    """

    def __init__(self, image: int, opener: Opener) -> None:
        self.image, self.opener = image, opener
        self.handle: OpenSource | None = None
        self.worn_out = False
