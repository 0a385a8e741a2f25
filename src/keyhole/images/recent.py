"""What was decoded last, for all open images together: their number must not decide how much memory they take."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from numpy.typing import NDArray

from keyhole.images.pixels import Pixels

LIMIT = 32 * 2**20
"""Bytes that stay, in the whole process: a row of strips of two wide images. A larger array stays alone."""
LARGE = 2**20
"""Decoded bytes from which a tile or chunk is worth keeping, and decoded once for all threads that want it."""
HUGE = 2**24
"""Decoded bytes from which tiles are decoded one after the other in the whole process: memory is for one of them."""
PATIENCE = 20.0
"""Seconds that a huge tile waits for another's decoding."""
ENTRY = 1000
"""Bytes that an entry costs beside its array."""


class Recent:
    """Arrays by owner and key; those not used for longest are dropped first. Thread-safe."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[tuple[int, Hashable], NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._owners = itertools.count()
        self._locks: dict[int, list[threading.Lock]] = {}
        self._one_huge = threading.Lock()

    def owner(self) -> int:
        """A number of its own for each open image; ids of objects are given out again."""
        owner = next(self._owners)
        self._locks[owner] = [threading.Lock() for _ in range(16)]
        return owner

    def get(self, owner: int, key: Hashable) -> NDArray[Any] | None:
        with self._lock:
            found = self._kept.get((owner, key))
            if found is not None:
                self._kept.move_to_end((owner, key))
            return found

    def put(self, owner: int, key: Hashable, array: NDArray[Any]) -> None:
        """Keep an array. A view of a larger one would hold more than is counted."""
        with self._lock:
            if (owner, key) in self._kept:
                return
            self._kept[owner, key] = array
            self.bytes += array.nbytes + ENTRY
            while self.bytes > self.limit and len(self._kept) > 1:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes + ENTRY

    def once(self, owner: int, key: Hashable, size: int, decode: Callable[[], Pixels | None]) -> Pixels | None:
        """The array kept, else what `decode` gives: once for all threads that want it, if it is large.

        Args:
            size: its bytes when decoded, about.
        """
        locks = self._locks.get(owner)
        with nullcontext() if size < LARGE or locks is None else locks[hash(key) % len(locks)]:
            found = self.get(owner, key)
            if found is None:
                with self._alone() if size >= HUGE else nullcontext():
                    found = decode()
                if found is not None:
                    self.put(owner, key, found)
            return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time; but a share that stalls must not hold up who reads from another for ever."""
        mine = self._one_huge.acquire(timeout=PATIENCE)
        try:
            yield
        finally:
            if mine:
                self._one_huge.release()

    def drop(self, owner: int) -> None:
        """Forget everything of one image."""
        with self._lock:
            self._locks.pop(owner, None)
            for place in [place for place in self._kept if place[0] == owner]:
                self.bytes -= self._kept.pop(place).nbytes + ENTRY


RECENT = Recent()
"""The one of this process."""
