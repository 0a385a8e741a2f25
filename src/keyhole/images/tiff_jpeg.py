"""JPEG tiles of a TIFF, decoded straight into the memory where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keyhole.images.faults import FAULTS
from keyhole.images.geometry import Size
from keyhole.images.pixels import Pixels

Coded = bytes | memoryview
DecodeInto = Callable[[Coded, Pixels], bool]
"""(JPEG, C-contiguous (h, w, c) of a whole tile) -> whether the tile was decoded into it."""

_RGB, _YCBCR = 2, 6


def jpeg_decoder(page: Any, size: Size, samples: int) -> DecodeInto | None:
    """A decoder for the JPEG tiles of a tifffile page; None for kinds that tifffile's own is needed for.

    It gives what `page.decode` gives, and declines (False) whatever is not a sound picture of just the tile's size.

    Args:
        page: compressed with JPEG.
        size: of a tile.
        samples: of a pixel.
    """
    from imagecodecs import jpeg8_decode

    photometric = int(page.photometric)
    plain = page.bitspersample == 8 and not page.extrasamples and page.jpegheader is None
    one = page.planarconfig == 1 or page.samplesperpixel == 1
    if not (plain and one and page.samplesperpixel == samples and (photometric in (_RGB, _YCBCR) or samples == 1)):
        return None
    options: dict[str, Any] = {"tables": page.jpegtables}
    if samples == 3:
        options["outcolorspace"] = _RGB
        if photometric == _RGB and not page.is_jfif:
            options["colorspace"] = _RGB  # Aperio: what has no JFIF header is stored as the TIFF says
    expected = (8, size.height, size.width, samples)
    head = b""

    def decode(data: Coded, out: Pixels) -> bool:
        # A JPEG may declare a size of its own and cost what that says. A file's tiles have one header nearly always.
        nonlocal head
        if not head or bytes(data[: len(head)]) != head:  # a view would be compared byte by byte
            end, frame = frame_of(data)
            if frame != expected:
                return False
            head = bytes(data[:end])
        try:
            jpeg8_decode(data, out=out, **options)  # type: ignore[arg-type] # takes any buffer, its stub does not
        except FAULTS:
            return False  # tifffile's way is tried next, and says what is wrong
        return True

    return decode


def frame_of(data: Coded) -> tuple[int, tuple[int, int, int, int] | None]:
    """Bits, height, width and samples from a JPEG's frame header, and the byte where they end; None without one."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            return 0, None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[at + place : at + place + 2], "big") for place in (5, 7))
            return at + 10, (data[at + 4], height, width, data[at + 9])
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, None


_FRAMES = {0xC3: "lossless", 0xC7: "lossless", 0xC9: "arithmetic", 0xCA: "arithmetic", 0xCB: "lossless"}


def why_no_jpeg(head: bytes) -> str:
    """Why a file that starts as a JPEG does is not read, and what to do."""
    end, frame = frame_of(head)
    if frame is None:
        if b"\xff\xf7" in head[:4096]:
            return "it is JPEG-LS, which is not read. Save it as PNG."
        return "its header is cut or damaged. Copy it again."
    bits, height, width, samples = frame
    kind = _FRAMES.get(head[end - 9], "")
    if bits != 8 or kind == "lossless":
        return f"it is {f'a {kind} JPEG' if kind else 'a JPEG'} of {bits} bits, which is not read. Save it as PNG."
    if samples not in (1, 3, 4):
        return f"it has {samples} channels; one, RGB or CMYK is read. Save it as RGB."
    return f"its header, of {width} x {height} pixels, is damaged. Copy it again, or save it as PNG."


def jpeg_size(data: Coded) -> Size | None:
    """Width and height from a JPEG stream's frame header; None where there is none (the decoder then says so)."""
    frame = frame_of(data)[1]
    return None if frame is None else Size(frame[2], frame[1])
