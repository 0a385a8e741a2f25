"""One cache of decoded tiles for all open images, so that memory does not grow with their number."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from numpy.typing import NDArray

from keyhole.images.pixels import Pixels

MAX_RECENT_BYTES = 32 * 2**20
"""Bytes that are kept in the whole process: a row of strips of two wide images."""
MAX_SHARED_BYTES = 96 * 2**20
"""Bytes of tiles that are kept for the next row of patches: a row of 500 tiles of 256 pixels in RGB."""
MIN_KEPT_BYTES = 2**20
"""Decoded bytes from which every tile is kept."""
MIN_ALONE_BYTES = 2**24
"""Decoded bytes from which tiles are decoded one after the other in the whole process."""

_SPARED = 8
"""One of this many tiles beyond the limit replaces the oldest; a row that does not fit would replace all others."""
_MAX_COUNTED_TILES = 4096
"""Tiles whose remaining uses are counted although they are not kept."""
_PATIENCE = 20.0
"""Seconds that a thread waits while another decodes a tile, whose file may be on a stalled share."""
_ENTRY_BYTES = 1000
"""Bytes that an entry takes beside its array."""

_Place = tuple[int, Hashable]


class TileCache:
    """Arrays by owner and key. Thread-safe.

    The least recently used of the recent arrays is dropped first; shared arrays are dropped after their last use.
    """

    def __init__(self, limit: int = MAX_RECENT_BYTES, shared_limit: int = MAX_SHARED_BYTES) -> None:
        self.limit, self.shared_limit = limit, shared_limit
        self.bytes = 0
        self._recent: OrderedDict[_Place, NDArray[Any]] = OrderedDict()
        self._shared: OrderedDict[_Place, NDArray[Any]] = OrderedDict()
        self._uses_left: dict[_Place, int] = {}
        self._shared_bytes = 0
        self._spared = 0
        self._decoding: set[_Place] = set()
        self._lock = threading.Lock()
        self._decoded = threading.Condition(self._lock)
        self._numbers = itertools.count()
        self._owners: set[int] = set()
        self._alone = threading.Lock()

    def owner(self) -> int:
        """Return a new number for an open image; Python reuses the ids of objects."""
        owner = next(self._numbers)
        self._owners.add(owner)
        return owner

    def get(self, owner: int, key: Hashable) -> NDArray[Any] | None:
        with self._lock:
            return self._find((owner, key))

    def put(self, owner: int, key: Hashable, array: NDArray[Any]) -> None:
        """Keep a recent array, which must not be a view of a larger one."""
        with self._lock:
            self._put((owner, key), array)

    def has(self, owner: int, keys: Sequence[Hashable]) -> list[bool]:
        with self._lock:
            return [(owner, key) in self._recent or (owner, key) in self._shared for key in keys]

    def is_decoding(self, owner: int, key: Hashable) -> bool:
        with self._lock:
            return (owner, key) in self._decoding

    def fetch(
        self,
        owner: int,
        key: Hashable,
        decode: Callable[[], Pixels | None],
        size: int = 0,
        uses: int = 0,
        total: int = 0,
    ) -> Pixels | None:
        """Return the array in the cache, else decode and keep it. Other threads that need it meanwhile wait.

        `size` is about its bytes. It is dropped after `total` uses, `uses` of them by this call; 0 keeps it as recent.
        """
        place = owner, key
        with self._decoded:
            while (found := self._find(place)) is None and place in self._decoding:
                if not self._decoded.wait(_PATIENCE):
                    break
            if found is not None:
                if place in self._shared:
                    self._uses_left[place] -= uses
                    if self._uses_left[place] <= 0:
                        self._forget(place)
                        del self._uses_left[place]
                return found
            self._decoding.add(place)
        pixels, alone = None, False
        try:
            alone = size >= MIN_ALONE_BYTES and self._alone.acquire(timeout=_PATIENCE)
            pixels = decode()
        finally:
            if alone:
                self._alone.release()
            with self._decoded:
                self._decoding.discard(place)
                if pixels is not None and owner in self._owners:
                    if total:
                        self._share(place, pixels, self._uses_left.pop(place, total) - uses)
                    else:
                        self._put(place, pixels)
                self._decoded.notify_all()
        return pixels

    def drop(self, owner: int) -> None:
        with self._lock:
            self._owners.discard(owner)
            for place in [place for place in self._recent if place[0] == owner]:
                self.bytes -= self._recent.pop(place).nbytes + _ENTRY_BYTES
            for place in [place for place in self._shared if place[0] == owner]:
                self._forget(place)
            self._uses_left = {place: left for place, left in self._uses_left.items() if place[0] != owner}

    def _find(self, place: _Place) -> NDArray[Any] | None:
        found = self._recent.get(place)
        if found is None:
            return self._shared.get(place)
        self._recent.move_to_end(place)
        return found

    def _put(self, place: _Place, array: NDArray[Any]) -> None:
        if place in self._recent:
            return
        self._recent[place] = array
        self.bytes += array.nbytes + _ENTRY_BYTES
        while self.bytes - self._shared_bytes > self.limit and len(self._recent) > 1:
            self.bytes -= self._recent.popitem(last=False)[1].nbytes + _ENTRY_BYTES

    def _share(self, place: _Place, pixels: Pixels, left: int) -> None:
        size = pixels.nbytes + _ENTRY_BYTES
        if left <= 0 or place in self._shared:
            return
        self._uses_left[place] = left
        if len(self._uses_left) > len(self._shared) + _MAX_COUNTED_TILES:
            self._uses_left = {kept: self._uses_left[kept] for kept in self._shared}
            return
        if self._shared_bytes + size > self.shared_limit:
            self._spared += 1
            if self._spared % _SPARED or size > self.shared_limit:
                return
            while self._shared_bytes + size > self.shared_limit:
                self._forget(next(iter(self._shared)))
        self._shared[place] = pixels
        self._shared_bytes += size
        self.bytes += size

    def _forget(self, place: _Place) -> None:
        size = self._shared.pop(place).nbytes + _ENTRY_BYTES
        self._shared_bytes -= size
        self.bytes -= size


TILE_CACHE = TileCache()
