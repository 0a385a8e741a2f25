"""Where the tiles of a TIFF lie, left in the file: a slide lists 250,000 of them.

tifffile takes every page's tables into tuples of Python integers, some 20 MB for such a slide while it is opened, and
an array of them costs each open handle 4 MB. Here tifffile is shown a file whose long tables are one entry long, and
a `Table` reads the entries that are needed, a block at a time.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONG = 1024
"""Entries from which a table stays in the file. Shorter ones are tifffile's, with all that it knows to repair."""
BLOCK = 1024
"""Entries read at a time for a tile."""
_SCAN = 65536
"""Entries read at a time when a file is opened and all are checked."""
OFFSETS, COUNTS = (324, 273), (325, 279)
"""Tags of tables: of tiles, else of strips."""
_TYPES = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}

Pread = Callable[[int, int], bytes]
"""(count, offset) -> bytes of the file; fewer at its end."""


@dataclass(frozen=True)
class Table:
    """The numbers of one tag, in the file or, if few, in memory.

    Attributes:
        count: how many.
        at: byte of the file where they begin.
        dtype: how they are stored.
        values: int64, instead of those in the file.
    """

    count: int
    at: int = 0
    dtype: str = ""
    values: NDArray[np.int64] | None = None

    def read(self, pread: Pread, start: int, stop: int) -> NDArray[np.int64]:
        """Entries `start` ... `stop` - 1, fewer where the table or the file ends."""
        if self.values is not None:
            return self.values[start:stop]
        kind = np.dtype(self.dtype)
        data = pread((min(stop, self.count) - start) * kind.itemsize, self.at + start * kind.itemsize)
        return np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind).astype(np.int64)

    @property
    def end(self) -> int:
        """The byte of the file behind the table."""
        return self.at + self.count * np.dtype(self.dtype or "u1").itemsize if self.values is None else 0


def scan(pread: Pread, offsets: Table, counts: Table, number: int) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """(offsets, counts) of the first `number` segments, in blocks."""
    for start in range(0, number, _SCAN):
        stop = min(start + _SCAN, number)
        yield offsets.read(pread, start, stop), counts.read(pread, start, stop)


class ShortTables:
    """A TIFF open for reading in which every long table of tiles or strips seems to have one entry.

    Args:
        file: the file; closed by whoever opened it.
        order, big: byte order, and whether it is a BigTIFF.

    Attributes:
        tables: by the offset of the page and the tag, the tables that were shortened.
    """

    def __init__(self, file: io.BufferedReader, order: str, big: bool) -> None:
        self._file = file
        self._count, self._entry = ("Q", "HHQ8s") if big else ("H", "HHI4s")
        self._count, self._entry, self._offset = order + self._count, order + self._entry, order + ("Q" if big else "I")
        self._order = order
        self._shown: dict[int, bytes] = {}
        self.tables: dict[tuple[int, int], Table] = {}

    def shorten(self, page: int) -> None:
        """Shorten the tables of the page that begins at this byte. tifffile reads its entries with one read.

        A page of more than 512 tags is no slide's and stays as it is.
        """
        self._file.seek(page)
        raw = self._file.read(struct.calcsize(self._count))
        (tags,) = struct.unpack(self._count, raw)
        size = struct.calcsize(self._entry)
        if tags > 512:
            return
        first = page + len(raw)
        entries = bytearray(self._file.read(tags * size))
        for at in range(0, len(entries) - size + 1, size):
            code, kind, count, value = struct.unpack_from(self._entry, entries, at)
            if code in (*OFFSETS, *COUNTS) and kind in _TYPES and count > LONG and (page, code) not in self.tables:
                (place,) = struct.unpack(self._offset, value)
                self.tables[page, code] = Table(count, place, self._order + _TYPES[kind])
                struct.pack_into(self._entry, entries, at, code, kind, 1, value)
                self._shown[first] = b""
        if first in self._shown:
            self._shown[first] = bytes(entries)

    def table(self, page: Any, codes: tuple[int, int], read: tuple[int, ...]) -> Table:
        """A page's table of offsets or counts: that left in the file, else what tifffile has `read`."""
        code = next((code for code in codes if code in page.tags), 0)
        found = self.tables.get((page.offset, code))
        if found is not None:
            return found
        values = np.asarray(read, np.int64)
        return Table(len(values), values=values)

    def pread(self, count: int, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(count)

    # What tifffile asks of a file.

    def read(self, size: int | None = -1) -> bytes:
        shown = self._shown.get(self._file.tell())
        if shown is not None and size == len(shown):
            self._file.seek(size, io.SEEK_CUR)
            return shown
        return self._file.read(-1 if size is None else size)

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
