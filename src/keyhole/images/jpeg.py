"""The structure of a JPEG stream, and the JPEG tiles of a TIFF page: decoded in place, or passed on as streams.

A tile is a JPEG without its tables, which the page stores once; often only the page states whether it is RGB or YCbCr.
A stream gets the tables and an Adobe marker for the colours, so that every decoder returns the same pixels.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal, NamedTuple

from keyhole.images.faults import FAULTS
from keyhole.images.geometry import Size
from keyhole.images.pixels import Pixels

Coded = bytes | memoryview
Colors = Literal["grey", "rgb", "ycbcr"]
COLORS: frozenset[Colors] = frozenset(("grey", "rgb", "ycbcr"))
"""Meanings of the samples of a JPEG."""

APP0, APP14, SOF0, SOS, EOI = 0xE0, 0xEE, 0xC0, 0xDA, 0xD9
_RGB, _YCBCR = 2, 6  # as TIFF numbers colours
_PADDING = 16
"""Bytes that may follow the end of a JPEG in its tile."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers
_FRAME_KINDS = {0xC3: "lossless", 0xC7: "lossless", 0xC9: "arithmetic", 0xCA: "arithmetic", 0xCB: "lossless"}


class Frame(NamedTuple):
    bits: int
    height: int
    width: int
    samples: int


def frame_of(data: Coded) -> tuple[int, Frame | None]:
    """Return the byte after the frame header of a JPEG, and the header; 0 and None if there is none."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            return 0, None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
        elif marker in _FRAMES:
            height, width = (int.from_bytes(data[at + place : at + place + 2], "big") for place in (5, 7))
            return at + 10, Frame(data[at + 4], height, width, data[at + 9])
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, None


def why_no_jpeg(head: bytes) -> str:
    """Say why a file that starts as a JPEG is not read, and what to do."""
    end, frame = frame_of(head)
    if frame is None:
        if b"\xff\xf7" in head[:4096]:
            return "it is JPEG-LS, which is not read. Save it as PNG."
        return "its header is cut or damaged. Copy it again."
    kind = _FRAME_KINDS.get(head[end - 9], "")
    if frame.bits != 8 or kind == "lossless":
        return f"it is a {f'{kind} ' if kind else ''}JPEG of {frame.bits} bits, which is not read. Save it as PNG."
    if frame.samples not in (1, 3, 4):
        return f"it has {frame.samples} channels; one, RGB or CMYK is read. Save it as RGB."
    return f"its header, of {frame.width} x {frame.height} pixels, is damaged. Copy it again, or save it as PNG."


def segments(data: bytes) -> list[tuple[int, bytes]] | None:
    """Return the marker segments of a JPEG before its data (SOS) as (marker, all bytes); None if it is damaged."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (SOS, EOI):
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8 or end > len(data):
            return None
        found.append((marker, data[at:end]))
        at = end
    return found if data[:2] == b"\xff\xd8" and data[at : at + 2] in (b"\xff\xd9", b"\xff\xda") else None


def adobe_marker(color: Colors) -> bytes:
    """Return the APP14 segment that names the colours of a JPEG; empty for grey."""
    if color == "grey":
        return b""
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (b"\x00" if color == "rgb" else b"\x01")


def stored_colors(pieces: list[tuple[int, bytes]]) -> Colors:
    """Return the meaning of three samples by the segments of the JPEG alone, as libjpeg decides it."""
    bodies = dict(reversed(pieces))  # the first of each marker
    if bodies.get(APP0, b"")[4:9] == b"JFIF\0":
        return "ycbcr"
    if (adobe := bodies.get(APP14, b""))[4:9] == b"Adobe" and len(adobe) >= 16:
        return "rgb" if adobe[15] == 0 else "ycbcr"
    return "rgb" if bytes(bodies[SOF0][10:19:3]) == b"RGB" else "ycbcr"


class Head(NamedTuple):
    """A JPEG up to its data: `data` replaces the `stored` bytes of a tile; `color` is the meaning of the samples."""

    stored: bytes
    data: bytes
    color: Colors


def merged_head(tables: bytes, tile: bytes, size: Size, samples: int, rgb: bool) -> Head | None:
    """Return the header of a tile with the tables of its page and an Adobe marker; None if not plain and of this size.

    `rgb` tells whether the page states that the samples are red, green and blue.
    """
    shared, own = segments(tables), segments(tile)
    if own is None or (tables and shared is None):
        return None
    pieces = [*(shared or []), *own]
    frames = [body for marker, body in pieces if marker in _FRAMES]
    if len(frames) != 1 or frames[0][1] != SOF0:
        return None
    body = frames[0]  # marker, length, bits, height, width, samples (10 bytes), and three bytes for each
    plain = Frame(8, size.height, size.width, samples)
    if frame_of(b"\xff\xd8" + body)[1] != plain or len(body) < 10 + 3 * samples:
        return None
    color: Colors = "grey" if samples == 1 else "rgb" if rgb else stored_colors(pieces)
    if color == "rgb" and len({body[11 + 3 * sample] for sample in range(3)}) > 1:
        return None  # not every decoder reads red, green and blue of different resolutions
    kept = b"".join(body for marker, body in pieces if marker not in (APP0, APP14))
    stored = tile[: 2 + sum(len(body) for _, body in own)]
    return Head(stored, b"\xff\xd8" + adobe_marker(color) + kept, color)


class JpegTiles:
    """Decodes and streams JPEG tiles of `size` on a tifffile page; tifffile decodes those that are not `plain`."""

    def __init__(self, page: Any, size: Size, samples: int) -> None:
        photometric = int(page.photometric)
        eight = page.bitspersample == 8 and page.jpegheader is None and page.samplesperpixel == samples
        one = page.planarconfig == 1 or samples == 1
        known = photometric in (_RGB, _YCBCR) or samples == 1
        self.plain = eight and one and known and not page.extrasamples
        self._size, self._samples = size, samples
        self._tables: bytes = page.jpegtables or b""
        self._rgb = samples == 3 and photometric == _RGB and not page.is_jfif  # in Aperio's files the TIFF states it
        self._options: dict[str, Any] = {"tables": page.jpegtables}
        if samples == 3:
            self._options |= {"outcolorspace": _RGB} | ({"colorspace": _RGB} if self._rgb else {})
        self._good = b""  # nearly always, all tiles of a file have one header
        self._head: Head | None = None

    def decode_into(self, data: Coded, out: Pixels) -> bool:
        """Decode a tile into C-contiguous (h, w, c); False if it is damaged or has another size."""
        from imagecodecs import jpeg8_decode

        # A JPEG may declare a huge size and take as much memory.
        if not self._good or bytes(data[: len(self._good)]) != self._good:  # a view would be compared byte by byte
            end, frame = frame_of(data)
            if frame != Frame(8, self._size.height, self._size.width, self._samples):
                return False
            self._good = bytes(data[:end])
        try:
            jpeg8_decode(data, out=out, **self._options)  # type: ignore[arg-type] # takes any buffer, its stub does not
        except FAULTS:
            return False  # tifffile decodes next, and reports what is wrong
        return True

    def stream(self, data: Coded, colors: Container[str]) -> bytes | None:
        """Return a tile as a complete JPEG; None if it is not plain and whole, or its samples are not of `colors`."""
        if bytes(data[-_PADDING:]).rfind(b"\xff\xd9") < 0:
            return None
        head = self._head
        if head is None or bytes(data[: len(head.stored)]) != head.stored:
            head = merged_head(self._tables, bytes(data), self._size, self._samples, self._rgb)
            if head is None:
                return None
            self._head = head
        return b"".join((head.data, data[len(head.stored) :])) if head.color in colors else None
