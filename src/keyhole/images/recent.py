"""What was decoded last, for all open images together: their number must not decide how much memory they take."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
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
"""Seconds that a thread waits for another's decoding before it decodes by itself."""
ENTRY = 1000
"""Bytes that an entry costs beside its array."""


class Recent:
    """Arrays by owner and key; those not used for longest are dropped first. Thread-safe."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.bytes = 0
        self._kept: OrderedDict[tuple[int, Hashable], NDArray[Any]] = OrderedDict()
        self._left: dict[tuple[int, Hashable], int] = {}  # uses to come of what is dropped after the last
        self._decoding: set[tuple[int, Hashable]] = set()
        self._lock = threading.Lock()
        self._decoded = threading.Condition(self._lock)
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
            self._put((owner, key), array)

    def _put(self, place: tuple[int, Hashable], array: NDArray[Any]) -> None:
        if place in self._kept:
            return
        self._kept[place] = array
        self.bytes += array.nbytes + ENTRY
        while self.bytes > self.limit and len(self._kept) > 1:
            self._forget(next(iter(self._kept)))

    def _forget(self, place: tuple[int, Hashable]) -> None:
        self.bytes -= self._kept.pop(place).nbytes + ENTRY
        self._left.pop(place, None)

    def which(self, owner: int, keys: Sequence[Hashable]) -> list[bool]:
        """Which of the keys are kept."""
        with self._lock:
            return [(owner, key) in self._kept for key in keys]

    def shared(
        self, owner: int, key: Hashable, uses: int, total: int, decode: Callable[[], Pixels | None]
    ) -> Pixels | None:
        """The array kept, else what `decode` gives; kept until `total` uses of it were made. Who wants what another
        thread is decoding waits for it.

        Args:
            uses: made of it by this call.
        """
        place = owner, key
        with self._decoded:
            while (found := self._kept.get(place)) is None and place in self._decoding:
                if not self._decoded.wait(PATIENCE):
                    break  # the other's share may stall
            if found is not None:
                self._kept.move_to_end(place)
                self._use(place, uses)
                return found
            self._decoding.add(place)
        pixels = None
        try:
            pixels = decode()
        finally:
            with self._decoded:
                self._decoding.discard(place)
                if pixels is not None and owner in self._locks and place not in self._kept:
                    self._left[place] = total
                    self._put(place, pixels)
                    self._use(place, uses)
                self._decoded.notify_all()
        return pixels

    def _use(self, place: tuple[int, Hashable], uses: int) -> None:
        if place in self._left:
            self._left[place] -= uses
            if self._left[place] <= 0:
                self._forget(place)

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
                self._forget(place)


RECENT = Recent()
"""The one of this process."""
