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
SHARED_LIMIT = 96 * 2**20
"""Bytes of tiles that wait for the next row of patches: a row of 500 tiles of 256 pixels in RGB, so that of a slide of
128,000 pixels. Tiles are dropped after their last use, so that an aligned grid keeps none."""
SPARED = 8
"""Tiles beyond that limit of which one is kept in the place of the oldest, and the others not at all. A row that does
not fit would otherwise push out every tile just before its use."""
COUNTS = 4096
"""Tiles that are not kept of which the uses to come are known all the same."""
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

    def __init__(self, limit: int = LIMIT, shared_limit: int = SHARED_LIMIT) -> None:
        self.limit, self.shared_limit = limit, shared_limit
        self.bytes = 0
        self._kept: OrderedDict[tuple[int, Hashable], NDArray[Any]] = OrderedDict()
        self._shared: OrderedDict[tuple[int, Hashable], NDArray[Any]] = OrderedDict()
        self._left: dict[tuple[int, Hashable], int] = {}  # uses to come of what is shared
        self._shared_bytes = 0
        self._spared = 0
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
            if found is None:
                return self._shared.get((owner, key))
            self._kept.move_to_end((owner, key))
            return found

    def put(self, owner: int, key: Hashable, array: NDArray[Any]) -> None:
        """Keep an array. A view of a larger one would hold more than is counted."""
        with self._lock:
            if (owner, key) in self._kept:
                return
            self._kept[owner, key] = array
            self.bytes += array.nbytes + ENTRY
            while self.bytes - self._shared_bytes > self.limit and len(self._kept) > 1:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes + ENTRY

    def which(self, owner: int, keys: Sequence[Hashable]) -> list[bool]:
        """Which of the keys are kept."""
        with self._lock:
            return [(owner, key) in self._kept or (owner, key) in self._shared for key in keys]

    def decoding(self, owner: int, key: Hashable) -> bool:
        """Whether a thread is decoding it for `shared`, so that who wants it now would wait."""
        with self._lock:
            return (owner, key) in self._decoding

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
            while (found := self._shared.get(place)) is None and place in self._decoding:
                if not self._decoded.wait(PATIENCE):
                    break  # the other's share may stall
            if found is not None:
                self._use(place, uses)
                return found
            self._decoding.add(place)
        pixels = None
        try:
            pixels = decode()
        finally:
            with self._decoded:
                self._decoding.discard(place)
                if pixels is not None and owner in self._locks:
                    self._share(place, pixels, self._left.pop(place, total) - uses)
                self._decoded.notify_all()
        return pixels

    def _share(self, place: tuple[int, Hashable], pixels: Pixels, left: int) -> None:
        size = pixels.nbytes + ENTRY
        if left <= 0:
            return
        self._left[place] = left
        if len(self._left) > len(self._shared) + COUNTS:
            self._left = {kept: self._left[kept] for kept in self._shared}
            return
        if self._shared_bytes + size > self.shared_limit:
            self._spared += 1
            if self._spared % SPARED or size > self.shared_limit:
                return
            while self._shared_bytes + size > self.shared_limit:
                self._forget(next(iter(self._shared)))
        self._shared[place] = pixels
        self._shared_bytes += size
        self.bytes += size

    def _use(self, place: tuple[int, Hashable], uses: int) -> None:
        self._left[place] -= uses
        if self._left[place] <= 0:
            self._forget(place)
            del self._left[place]

    def _forget(self, place: tuple[int, Hashable]) -> None:
        size = self._shared.pop(place).nbytes + ENTRY
        self._shared_bytes -= size
        self.bytes -= size

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
            for place in [place for place in self._shared if place[0] == owner]:
                self._forget(place)
            self._left = {place: left for place, left in self._left.items() if place[0] != owner}


RECENT = Recent()
"""The one of this process."""
