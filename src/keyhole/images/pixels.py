"""From whatever a file stores to the (h, w, 1 or 3) uint8 of an `Image`: one rule for all readers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.images.geometry import Box, Size

Pixels = NDArray[np.uint8]

_TURNS = {
    # EXIF and TIFF orientation -> what makes the stored picture upright: transpose, then mirror in x, in y.
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


def valid_orientation(value: object) -> int:
    """`value` if it is one of the eight orientations, else 1: writers put 0 and worse there."""
    return value if isinstance(value, int) and value in _TURNS else 1


def upright_size(stored: Size, orientation: int) -> Size:
    """Size of the picture as it is to be seen."""
    return Size(stored.height, stored.width) if _TURNS[orientation][0] else stored


def stored_box(box: Box, upright: Size, orientation: int) -> Box:
    """Where `box` of the upright picture lies in the stored one."""
    transpose, mirror_x, mirror_y = _TURNS[orientation]
    x = upright.width - box.x - box.width if mirror_x else box.x
    y = upright.height - box.y - box.height if mirror_y else box.y
    return Box(y, x, box.height, box.width) if transpose else Box(x, y, box.width, box.height)


def make_upright(pixels: Pixels, orientation: int) -> Pixels:
    """(h, w, c) as stored -> as it is to be seen."""
    transpose, mirror_x, mirror_y = _TURNS[orientation]
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    if mirror_y:
        pixels = pixels[::-1]
    if mirror_x:
        pixels = pixels[:, ::-1]
    return pixels


class ValueTooLarge(ValueError):  # noqa: N818 - says what is the matter
    """A value that does not fit into the bits that are said to be in use."""


def eight_bit(values: NDArray[np.unsignedinteger | np.bool_], bits: int) -> Pixels:
    """Scale grey values of `bits` bits to 8, rounded to nearest: 0 stays 0, and white (2**bits - 1) becomes 255.

    Raises:
        ValueTooLarge: a value that `bits` bits cannot hold.
    """
    if bits == 8 and values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    table = _table(bits)
    largest = int(values.max(initial=0))
    if largest >= len(table):
        raise ValueTooLarge(f"holds a value of {largest:,}, but {bits} bits in use end at {len(table) - 1:,}")
    pixels: Pixels = table[values.astype(np.uint8) if values.dtype == np.bool_ else values]
    return pixels


@functools.cache
def _table(bits: int) -> Pixels:
    """The 8-bit value of each value of `bits` bits."""
    white = 2**bits - 1
    table: Pixels = ((np.arange(white + 1) * 510 + white) // (2 * white)).astype(np.uint8)
    table.flags.writeable = False  # one for all callers
    return table


def on_white(pixels: Pixels, associated: bool = False) -> Pixels:
    """(h, w, c + 1) with alpha last -> (h, w, c) composited onto white, rounded to nearest.

    Args:
        associated: the colours are already multiplied by alpha.
    """
    color, alpha = pixels[..., :-1], pixels[..., -1:]
    if alpha.size and alpha.min() == 255:
        return color
    share = color.astype(np.uint16) * 255 if associated else color.astype(np.uint16) * alpha
    # The sum stays below 2**16 for colours <= alpha; damaged associated colours are clipped.
    mixed = (share.astype(np.uint32) + np.uint32(255) * (255 - alpha) + 127) // 255
    composited: Pixels = np.minimum(mixed, 255).astype(np.uint8)
    return composited


def straight(pixels: Pixels, alpha: Pixels) -> Pixels:
    """Colours (h, w, c) that were multiplied by alpha (h, w, 1), as they were before; 0 where alpha is 0."""
    share = np.maximum(alpha.astype(np.uint32), 1)
    divided: Pixels = np.minimum((pixels.astype(np.uint32) * 255 + share // 2) // share, 255).astype(np.uint8)
    return divided


_RGB: np.dtype[Any] = np.dtype("V3")


def place(out: Pixels, pixels: Pixels) -> None:
    """`out[...] = pixels`, quickly where `out` is a mirrored or turned view (numpy walks those 3 bytes at a time)."""
    if out.shape[2] != 3 or out.strides[1] == 3 or not out.strides[2] == pixels.strides[2] == 1:
        out[...] = pixels
    elif out.strides[1] == -3:  # mirrored: 5 times as fast a channel at a time
        for channel in range(3):
            out[:, :, channel] = pixels[:, :, channel]
    else:  # turned: twice as fast in whole pixels
        out.view(_RGB)[...] = pixels.view(_RGB)
