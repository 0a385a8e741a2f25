"""JPEG tiles of a TIFF as whole JPEG streams, for a decoder that is not the host's.

A tile of a TIFF is a JPEG without its tables, which the page keeps once for all, and often without a word on whether it
stores RGB or YCbCr, which the page says. Here the tables are put back and an Adobe marker says the colours, so that
every decoder makes of a tile what this package's own does.
"""

from __future__ import annotations

import weakref
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.images.faults import faults_of
from keyhole.images.geometry import Size
from keyhole.images.image import Image
from keyhole.images.tiff import TiffImage
from keyhole.images.tiff_checks import open_pages, page_size, tables_of
from keyhole.images.tiff_jpeg import Coded
from keyhole.images.tiff_tables import ShortTables
from keyhole.util.threads import beat

Colors = Literal["grey", "rgb", "ycbcr"]
COLORS: frozenset[Colors] = frozenset(("grey", "rgb", "ycbcr"))

_RGB = 2
_APP0, _APP14, _SOF0, _SOS, _EOI = 0xE0, 0xEE, 0xC0, 0xDA, b"\xff\xd9"
_PADDING = 16
"""Bytes that may follow the end of a JPEG in its tile."""


@dataclass(frozen=True)
class Head:
    """A JPEG up to its data, put together anew.

    Attributes:
        stored: how many bytes of the tile it takes the place of.
        data: the bytes to put there.
        color: what its samples mean.
    """

    stored: bytes
    data: bytes
    color: Colors


class EncodedTiles:
    """The tiles of one level of an open TIFF as JPEG.

    Args:
        image: open; its tiles are read through it.
        level: number of the level.
        page: what tifffile says of the level.

    Attributes:
        size: of a tile.
    """

    def __init__(self, image: TiffImage, level: int, page: Any) -> None:
        self._image, self._level = weakref.proxy(image), level
        stored = image._stored[level]
        self.size, self._columns = stored.segment, stored.grid[0]
        self._whole = Size(stored.size.width // self.size.width, stored.size.height // self.size.height)
        self._tables: bytes = page.jpegtables or b""
        self._forced = int(page.photometric) == _RGB and not page.is_jfif  # Aperio: colours are what the TIFF says
        self._samples = stored.channels
        self._head: Head | None = None

    def tiles(self, cells: NDArray[np.int64], colors: Container[str]) -> list[bytes | None]:
        """Tiles as JPEG streams; None for one that is missing, reaches over the image, or is not plain and whole.

        Args:
            cells: (k, 2) column and row of each tile, in any order. Those that lie side by side are read together.
            colors: what samples may mean; None for all others.

        Raises:
            ImageError, ImageLost: they cannot be read.
        """
        found: list[bytes | None] = [None] * len(cells)
        inside = np.flatnonzero(((cells >= 0) & (cells < self._whole)).all(axis=1))
        if not len(inside):
            return found
        columns, rows = cells[inside].T
        numbers = rows * self._columns + columns
        order = numbers.argsort(kind="stable")
        image, ends = self._image, [tuple(cells[inside[end]].tolist()) for end in order[[0, -1]]]
        with faults_of(image.path, f"damaged at tiles {ends[0]} to {ends[1]} of level {self._level}"):
            places = image._places(image._stored[self._level], self._level, numbers[order])
            for place, data in zip(inside[order].tolist(), image._many_bytes(places), strict=True):
                found[place] = self._stream(data, colors)
                beat()
        return found

    def _stream(self, data: Coded, colors: Container[str]) -> bytes | None:
        """A tile as it is stored -> with its tables and the marker of its colours."""
        if bytes(data[-_PADDING:]).rfind(_EOI) < 0:
            return None
        head = self._head
        # nearly always, all tiles of a file have one head
        if head is None or bytes(data[: len(head.stored)]) != head.stored:
            head = self._merged(bytes(data))
            if head is None:
                return None
            self._head = head
        return b"".join((head.data, data[len(head.stored) :])) if head.color in colors else None

    def _merged(self, data: bytes) -> Head | None:
        tables, own = segments(self._tables), segments(data)
        if own is None or (self._tables and tables is None):
            return None
        pieces = [*(tables or []), *own]
        frames = [body for marker, body in pieces if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)]
        if len(frames) != 1 or frames[0][1] != _SOF0:
            return None
        frame = frames[0][4:]  # behind the marker and its length: bits, height, width, samples, three bytes for each
        size = Size(int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big"))
        if frame[0] != 8 or size != self.size or frame[5] != self._samples or len(frame) < 6 + 3 * self._samples:
            return None
        color: Colors = "grey" if self._samples == 1 else "rgb" if self._forced else stored_colors(pieces)
        if color == "rgb" and len({frame[7 + 3 * sample] for sample in range(3)}) > 1:
            return None  # red, green and blue of different resolution: not every decoder has that
        kept = b"".join(body for marker, body in pieces if marker not in (_APP0, _APP14))
        stored = data[: 2 + sum(len(body) for _, body in own)]
        return Head(stored, b"\xff\xd8" + adobe_marker(color) + kept, color)


def adobe_marker(color: Colors) -> bytes:
    """The APP14 segment that names the colours of a JPEG; none for grey."""
    if color == "grey":
        return b""
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if color == "rgb" else b"\x01")


def segments(data: bytes) -> list[tuple[int, bytes]] | None:
    """The marker segments of a JPEG before its data (SOS), as (marker, all bytes); None where it is not sound."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (_SOS, _EOI[1]):
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8 or end > len(data):
            return None
        found.append((marker, data[at:end]))
        at = end
    return found if data[:2] == b"\xff\xd8" and data[at : at + 2] in (_EOI, b"\xff\xda") else None


def stored_colors(pieces: list[tuple[int, bytes]]) -> Colors:
    """What three samples mean where nobody outside says so: by libjpeg's rule."""
    for marker, body in pieces:
        if marker == _APP0 and body[4:9] == b"JFIF\0":
            return "ycbcr"
    for marker, body in pieces:
        if marker == _APP14 and body[4:9] == b"Adobe" and len(body) >= 16:
            return "rgb" if body[15] == 0 else "ycbcr"
    frame = next(body for marker, body in pieces if marker == _SOF0)
    return "rgb" if bytes(frame[10:19:3]) == b"RGB" else "ycbcr"


_known: weakref.WeakKeyDictionary[Image, dict[int, EncodedTiles | None]] = weakref.WeakKeyDictionary()


def encoded_tiles(image: Image, level: int) -> EncodedTiles | None:
    """The JPEG tiles of a level; None where it has none that a decoder takes as they are.

    Raises:
        ImageError, ImageLost: the file is damaged or gone.
    """
    if not isinstance(image, TiffImage) or image._orientation != 1:
        return None
    known = _known.setdefault(image, {})
    if level not in known:
        known[level] = _find(image, level)
    return known[level]


def _find(image: TiffImage, level: int) -> EncodedTiles | None:
    stored = image._stored[level]
    plain = stored.color in ("grey", "rgb") and stored.samples == stored.channels and stored.planes == 1
    if not (stored.tiled and stored.coded == "JPEG" and stored.bits == 8 and plain):
        return None
    first = stored.offsets.read(image._pread, 0, 1).tolist()
    with open_pages(image.path) as (tif, short):
        for page in _pages(tif, short):
            same = page_size(page) == stored.size and page.is_tiled and int(page.compression) == 7
            if same and tables_of(page, short)[0].read(short.pread, 0, 1).tolist() == first:
                simple = page.samplesperpixel == stored.channels and page.jpegheader is None
                return EncodedTiles(image, level, page) if simple else None
    return None


def _pages(tif: Any, short: ShortTables) -> list[Any]:
    """All pages of a TIFF, and those below its first."""
    import tifffile

    pages = list(tif.pages)
    for number, offset in enumerate((tif.pages.first.subifds or ())[:64]):
        short.shorten(offset)
        tif.filehandle.seek(offset)
        pages.append(tifffile.TiffPage(tif, (tif.pages.first.index, number)))
    return pages
