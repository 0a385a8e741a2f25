"""Pictures of other than 8 bits a value, which Pillow cuts or shifts to 8: their values as they are stored.

Pillow decodes a JPEG 2000 of 12 bits in colour as black and one of 4 bits with a white of 240, and drops the lower bits
of a PNG of 16 bits in colour; so these are decoded here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyhole.images.pixels import DEEP

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_HEAD_BYTES = {"PNG": 32, "PPM": 2**12, "JPEG2000": 2**20}
"""Bytes in which the header is searched; a colour profile may come before."""
_SIZ = b"\xff\x4f\xff\x51"


class Stored(NamedTuple):
    """How a picture's values are stored: `bits` of a value, of 1 or 3 `colors` (alpha may follow)."""

    bits: int
    colors: int
    says_bits: bool = True


def stored_as(path: Path, picture: Picture) -> Stored | None:
    """How a picture is stored that `values_of` has to decode; None where Pillow is right, ValueError if not read."""
    if picture.format not in _HEAD_BYTES:
        return None
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES[picture.format])
    if picture.format == "PNG":
        depth, kind = head[24], head[25]
        odd = depth < 8 and kind == 0 and "transparency" in picture.info  # Pillow scales the grey and not its key
        return Stored(max(depth, 8), 1 if kind in (0, 4) else 3, depth != DEEP) if depth == DEEP or odd else None
    if picture.format == "JPEG2000":
        return _jpeg2000(head, picture.mode)
    says_bits = _maxval(head) != 2**DEEP - 1
    if picture.mode == "I":
        return Stored(DEEP, 1, says_bits)
    if picture.mode == "RGB" and not says_bits:
        if not head.startswith(b"P6"):
            raise ValueError("a PPM of 16 bits as text is not read; save it as PNG or TIFF")
        return Stored(DEEP, 3, says_bits)
    return None  # Pillow scales by the white that the header states


def values_of(path: Path, picture: Picture, stored: Stored) -> NDArray[Any]:
    """Values (h, w, samples) as they are stored, alpha last where there is one."""
    import imagecodecs

    if picture.format == "PPM" and stored.colors == 3:
        data = path.read_bytes()  # the values are the end of the file
        values = np.frombuffer(data[len(data) - picture.height * picture.width * 6 :], ">u2").astype(np.uint16)
    elif picture.format == "PPM":
        values = np.asarray(picture).astype(np.uint16)
    else:
        decode = imagecodecs.png_decode if picture.format == "PNG" else imagecodecs.jpeg2k_decode
        values = np.asarray(decode(path.read_bytes()))
    values = values.reshape(picture.height, picture.width, -1)
    if values.dtype.kind != "u" or values.shape[2] - stored.colors not in (0, 1):
        raise ValueError(f"decodes to {values.dtype} of {values.shape[2]} samples")
    return values


def _jpeg2000(head: bytes, mode: str) -> Stored | None:
    at = head.find(_SIZ)
    samples = int.from_bytes(head[at + 40 : at + 42], "big")
    depth_bytes = head[at + 42 : at + 42 + 3 * samples : 3]
    if at < 0 or not depth_bytes or len(depth_bytes) < samples or mode in ("P", "PA", "CMYK"):
        return None
    if any(byte & 0x80 for byte in depth_bytes):
        raise ValueError("a JPEG 2000 of signed values is not read; save it with 8 bits")
    depths = sorted({byte + 1 for byte in depth_bytes})
    if depths == [8]:
        return None
    if len(depths) > 1 or depths[0] > DEEP:
        raise ValueError(f"a JPEG 2000 of {' and '.join(map(str, depths))} bits is not read; save it with 8 bits")
    return Stored(depths[0], 1 if samples < 3 else 3, depths[0] != DEEP)


def _maxval(head: bytes) -> int:
    """The largest value that the header of a PGM or PPM states; its fields may stand between comments."""
    fields: list[bytes] = []
    for line in head.split(b"\n"):
        fields += line.partition(b"#")[0].split()
        if len(fields) > 3:
            break
    return int(fields[3]) if len(fields) > 3 and fields[3].isdigit() else 0
