"""JPEG tiles of a TIFF page, decoded straight into the target's memory or passed on as JPEG streams.

A tile of a TIFF is a JPEG without its tables, which the page stores once for all tiles. Often only the page states
whether the tile stores RGB or YCbCr. A stream for another decoder gets the tables and an Adobe marker for the colours,
so that every decoder gives the same pixels as this package's own.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from keyhole.images.faults import FAULTS
from keyhole.images.geometry import Size
from keyhole.images.jpeg import Coded, Frame, Head, frame_of, merged_head
from keyhole.images.pixels import Pixels

_RGB, _YCBCR = 2, 6
_PADDING = 16
"""Bytes that may follow the end of a JPEG in its tile."""


class JpegTiles:
    """How JPEG tiles of `size` on a tifffile page are decoded and streamed; tifffile decodes where not `plain`."""

    def __init__(self, page: Any, size: Size, samples: int) -> None:
        photometric = int(page.photometric)
        eight = page.bitspersample == 8 and page.jpegheader is None and page.samplesperpixel == samples
        one = page.planarconfig == 1 or samples == 1
        known = photometric in (_RGB, _YCBCR) or samples == 1
        self.plain = eight and one and known and not page.extrasamples
        self._size, self._samples = size, samples
        self._tables: bytes = page.jpegtables or b""
        self._rgb = samples == 3 and photometric == _RGB and not page.is_jfif  # Aperio: colours are what the TIFF says
        self._options: dict[str, Any] = {"tables": page.jpegtables}
        if samples == 3:
            self._options |= {"outcolorspace": _RGB} | ({"colorspace": _RGB} if self._rgb else {})
        self._good = b""  # nearly always, all tiles of a file have one header
        self._head: Head | None = None

    def decode_into(self, data: Coded, out: Pixels) -> bool:
        """Decode a tile into C-contiguous (h, w, c); False where it is not a sound picture of just the tile's size."""
        from imagecodecs import jpeg8_decode

        # A JPEG may declare another size and cost as much memory.
        if not self._good or bytes(data[: len(self._good)]) != self._good:  # a view would be compared byte by byte
            end, frame = frame_of(data)
            if frame != Frame(8, self._size.height, self._size.width, self._samples):
                return False
            self._good = bytes(data[:end])
        try:
            jpeg8_decode(data, out=out, **self._options)  # type: ignore[arg-type] # takes any buffer, its stub does not
        except FAULTS:
            return False  # tifffile's decoder is tried next, and reports what is wrong
        return True

    def stream(self, data: Coded, colors: Container[str]) -> bytes | None:
        """A tile as a JPEG of its own; None where it is not plain and whole, or its samples are not of `colors`."""
        if bytes(data[-_PADDING:]).rfind(b"\xff\xd9") < 0:
            return None
        head = self._head
        if head is None or bytes(data[: len(head.stored)]) != head.stored:
            head = merged_head(self._tables, bytes(data), self._size, self._samples, self._rgb)
            if head is None:
                return None
            self._head = head
        return b"".join((head.data, data[len(head.stored) :])) if head.color in colors else None
