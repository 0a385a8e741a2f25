"""Check the structure of a TIFF before anything is decoded, and read the places of its tiles only when needed.

A slide lists 250,000 tiles, and tifffile reads the tables of every page into tuples of some 20 MB. So it gets a file
whose long tables seem to have one entry, and a `TileTable` reads the entries that are needed.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import ends_early, faults_of
from keyhole.images.geometry import Size

# numpy warns about odd numbers of a damaged file with which tifffile computes.
warnings.filterwarnings("ignore", module=r"tifffile\.")

MAX_PAGES = 4096
"""No slide has more pages."""
MAX_SEGMENT_PIXELS = 64 * 2**20
"""Pixels of one tile or strip, which is decoded whole: 200 MB in RGB."""
MAX_LOADED_ENTRIES = 1024
"""Entries of the longest table that tifffile reads and repairs."""
BLOCK = 1024
"""Entries of a table that are read at a time for a tile."""
CONVERT = "Convert it to a tiled pyramid: vips tiffsave IN.tif OUT.tif --tile --pyramid --compression jpeg --bigtiff"

_CHECKED_BLOCK = 65536  # entries that are read at a time while a file is opened and all are checked
TIFF_MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
"""First bytes of TIFF and BigTIFF, and the order of their bytes."""
_JPEG2000_APERIO = (33003, 33005)
_FOCAL_PLANE = 65424  # Hamamatsu's tag for the depth of a page
_OFFSETS, _COUNTS = (324, 273), (325, 279)  # tags of tables: of tiles, else of strips
_TYPES = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_MAX_TAGS = 512  # of a page whose tables are shortened; no slide has more

Pread = Callable[[int, int], bytes]  # (count, offset) -> bytes of the file; fewer at its end


@dataclass(frozen=True)
class TileTable:
    """The numbers of one tag: in the file, `count` of `dtype` from the byte `at`, or, if few, in memory (`values`)."""

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
        """The byte of the file after the table."""
        return self.at + self.count * np.dtype(self.dtype or "u1").itemsize if self.values is None else 0


class ShortTables:
    """A TIFF in which every long table of tiles or strips seems to have one entry; the caller closes `file`.

    Raises ImageError where the chain of pages does not end, leaves the file, or has no page.
    """

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path, self._file = path, file
        self._shown: dict[int, bytes] = {}
        self._tables: dict[tuple[int, int], TileTable] = {}
        head = file.read(16)
        self._order = TIFF_MAGIC.get(head[:4], "")
        if not self._order or len(head) < 8:
            raise ImageError(path, "not a TIFF: its first bytes are damaged. Copy it again.")
        big, ndpi = b"+" in head[2:4], path.suffix.lower() == ".ndpi"
        self._count, self._entry, self._offset = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
        # Hamamatsu: classic entries, but 64-bit offsets of pages, which tifffile puts together
        pages = self._pages(head, "Q" if big or ndpi else "I", 8 if big else 4)
        for page in () if ndpi else pages:
            self.shorten(page)
        file.seek(0)

    def _pages(self, head: bytes, link_format: str, start: int) -> list[int]:
        """Return the bytes at which pages begin, by following their chain without decoding a tag."""
        (offset,) = struct.unpack_from(self._order + link_format, head.ljust(16, b"\0"), start)
        size, seen = self.path.stat().st_size, dict[int, None]()
        while offset:
            if offset in seen:
                raise ImageError(self.path, f"its pages form a loop (page {len(seen)} leads back). Export it again.")
            if len(seen) == MAX_PAGES:
                raise ImageError(self.path, f"more than {MAX_PAGES:,} pages; keyhole reads one picture per file")
            seen[offset] = None
            count = self._number(self._count, offset)
            if count is None:
                raise ends_early(self.path, size, offset + 8)
            link = offset + struct.calcsize(self._count) + count * struct.calcsize("=" + self._entry)
            if link > size:
                raise ends_early(self.path, size, link)
            found = self._number(link_format, link)
            if found is None:
                if any(self.pread(8, link)):
                    raise ends_early(self.path, size, link + struct.calcsize(link_format))
                break  # only the zeros of "no next page" are missing: libtiff, Pillow and OpenCV read such a file
            offset = found
        if not seen:
            raise ImageError(self.path, "a TIFF without a page. Copy or export it again.")
        return list(seen)

    def _number(self, kind: str, offset: int) -> int | None:
        """Read a number; None if the file ends before."""
        data = self.pread(struct.calcsize(kind), offset)
        return None if len(data) < struct.calcsize(kind) else int(struct.unpack(self._order + kind, data)[0])

    def shorten(self, page: int) -> None:
        """Shorten the tables of the page that begins at this byte. tifffile reads all its entries with one read."""
        tags, layout = self._number(self._count, page), self._order + self._entry
        first, size = page + struct.calcsize(self._count), struct.calcsize(layout)
        if tags is None or tags > _MAX_TAGS or first in self._shown:
            return
        entries, changed = bytearray(self.pread(tags * size, first)), False
        for at in range(0, len(entries) - size + 1, size):
            code, kind, count, value = struct.unpack_from(layout, entries, at)
            if code in (*_OFFSETS, *_COUNTS) and kind in _TYPES and count > MAX_LOADED_ENTRIES:
                (place,) = struct.unpack(self._order + self._offset, value)
                self._tables[page, code] = TileTable(count, place, self._order + _TYPES[kind])
                struct.pack_into(layout, entries, at, code, kind, 1, value)
                changed = True
        if changed:
            self._shown[first] = bytes(entries)

    def tables(self, page: Any) -> tuple[TileTable, TileTable]:
        """Return offsets and counts of a page's encoded segments, and check that all of them are in the file."""
        found = []
        for codes, read in ((_OFFSETS, page.dataoffsets), (_COUNTS, page.databytecounts)):
            code = next((code for code in codes if code in page.tags), 0)
            values = np.asarray(read, np.int64)
            found.append(self._tables.get((page.offset, code)) or TileTable(len(values), values=values))
        offsets, counts = found
        size, needed = self.path.stat().st_size, max(offsets.end, counts.end)
        if needed > size:
            raise ends_early(self.path, size, needed)
        for start in range(0, min(offsets.count, counts.count), _CHECKED_BLOCK):
            stop = min(start + _CHECKED_BLOCK, offsets.count, counts.count)
            offset, count = (table.read(self.pread, start, stop) for table in (offsets, counts))
            if offset.min() < 0 or count.min() < 0:
                raise ImageError(self.path, "a tile or strip lies before the file's start. Copy it again.")
            needed = max(needed, int((offset + count)[count > 0].max(initial=0)))
        if needed > size:
            raise ends_early(self.path, size, needed)
        return offsets, counts

    def pread(self, count: int, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(count)

    # The methods of a file that tifffile calls.

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


@contextmanager
def open_pages(path: Path) -> Iterator[tuple[Any, ShortTables]]:
    """Open a tifffile.TiffFile whose chain of pages is sound, and its tables; faults become ImageError."""
    import tifffile

    # Its warnings about odd tags would go to stderr; what matters is checked here.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with faults_of(path, "damaged TIFF structure"), path.open("rb") as file:
        short = ShortTables(path, file)
        with tifffile.TiffFile(short, name=path.name) as tif:
            yield tif, short


def vendor_of(path: Path) -> str | None:
    """Return the maker of a slide that OpenSlide reads although it is a TIFF, else None. Never raises."""
    if path.suffix.lower() in (".ndpi", ".bif", ".scn"):
        return path.suffix.lower()
    try:
        with open_pages(path) as (tif, _):
            page = tif.pages.first
            xmp = page.tags.valueof(700)
            signs = {
                "Hamamatsu": page.is_ndpi,
                "Philips": page.is_philips or page.software.startswith("Philips"),
                "Trestle": page.software.startswith("MedScan"),
                "Leica": "<scn" in page.description[:1000],
                "Ventana": isinstance(xmp, bytes) and b"<iScan" in xmp,
                "Aperio JPEG 2000": page.is_svs and any(page.compression in _JPEG2000_APERIO for page in tif.pages),
            }
            return next((maker for maker, sign in signs.items() if sign), None)
    except ImageError:
        return None  # damaged, which opening it reports


def check_segment(path: Path, segment: Size) -> None:
    """Refuse a tile or strip that is too large to be decoded whole."""
    if segment.width * segment.height > MAX_SEGMENT_PIXELS:
        problem = f"one tile or strip has {segment.width:,} x {segment.height:,} pixels"
        raise ImageError(path, f"{problem}, more than the {MAX_SEGMENT_PIXELS:,} that are decoded at once. {CONVERT}")


def check_tiles(path: Path) -> int:
    """Refuse a TIFF with which OpenSlide would end the process: tiles of gigabytes, loops, a cut end.

    Returns the number of planes in depth (z) of a Hamamatsu slide, of which OpenSlide reads the one at 0; else 1.
    """
    planes = {0}
    with open_pages(path) as (tif, short):
        for page in tif.pages:
            planes |= {page.tags.valueof(_FOCAL_PLANE, 0)} if page.is_ndpi else set()
            bits = page.bitspersample
            if page.is_tiled and isinstance(bits, int) and bits > 8:
                raise ImageError(path, f"a slide of {bits} bits a value is not read. Export it with 8 bits.")
            if page.is_tiled:
                check_segment(path, Size(page.tilewidth, page.tilelength))
            elif not page.is_ndpi:  # a Hamamatsu page is one strip with restart marks inside
                check_segment(path, Size(page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength)))
            short.tables(page)
    return len(planes)
