"""From the values in a file to the (h, w, 1 or 3) uint8 of an `Image`: one rule for all readers.

A camera of 12 bits writes files of 16, which would be nearly black. The bits in use are those that the file states,
else 16 if a value uses the highest bit, else those that the user states. An image is never scaled by its own range.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import BitsUnknown
from keyhole.images.geometry import Box, Size

Pixels = NDArray[np.uint8]

DEEP = 16
"""Bits of a stored value of which fewer may be in use."""
MAX_VALUES_SEARCHED = 64 * 2**20
"""Values that are searched for one that uses the highest bit."""

# EXIF and TIFF orientations 1 ... 8 whose stored pictures are made upright by transposing, then mirroring in x, in y.
_TRANSPOSED, _MIRRORED_X, _MIRRORED_Y = {5, 6, 7, 8}, {2, 3, 6, 7}, {3, 4, 7, 8}


def valid_orientation(value: object) -> int:
    """Return `value` if it is one of the eight orientations, else 1: some writers put other numbers there."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright_size(stored: Size, orientation: int) -> Size:
    return Size(stored.height, stored.width) if orientation in _TRANSPOSED else stored


def stored_box(box: Box, upright: Size, orientation: int) -> Box:
    """Return the place of `box` of the upright picture in the stored one."""
    x = upright.width - box.x - box.width if orientation in _MIRRORED_X else box.x
    y = upright.height - box.y - box.height if orientation in _MIRRORED_Y else box.y
    if orientation in _TRANSPOSED:
        return Box(y, x, box.height, box.width)
    return Box(x, y, box.width, box.height)


def make_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turn stored pixels (h, w, c) upright."""
    if orientation in _TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in _MIRRORED_Y else 1, :: -1 if orientation in _MIRRORED_X else 1]


class ValueTooLarge(ValueError):  # noqa: N818 - names the problem
    """A value that does not fit into the bits in use."""


def eight_bit(values: NDArray[np.unsignedinteger | np.bool_], bits: int) -> Pixels:
    """Scale grey values of `bits` bits to 8, rounded to nearest: white (2**bits - 1) becomes 255.

    Raises ValueTooLarge for a value that `bits` bits cannot hold.
    """
    if bits == 8 and values.dtype == np.uint8:
        return values.astype(np.uint8, copy=False)
    table = _table(bits)
    largest = int(values.max(initial=0))
    if largest >= len(table):
        raise ValueTooLarge(f"holds a value of {largest:,}, but {bits} bits in use end at {len(table) - 1:,}")
    return np.asarray(table[values.astype(np.uint8) if values.dtype == np.bool_ else values])


@functools.cache
def _table(bits: int) -> Pixels:
    white = 2**bits - 1
    table = np.asarray((np.arange(white + 1) * 510 + white) // (2 * white), np.uint8)
    table.flags.writeable = False  # one for all callers
    return table


def on_white(pixels: Pixels, associated: bool = False) -> Pixels:
    """Composite (h, w, c + 1), alpha last, onto white; `associated` colours are already multiplied by alpha."""
    color, alpha = pixels[..., :-1], pixels[..., -1:]
    if alpha.size and alpha.min() == 255:
        return color
    share = color.astype(np.uint16) * 255 if associated else color.astype(np.uint16) * alpha
    # The sum stays below 2**16 for colours <= alpha; damaged associated colours are clipped.
    mixed = (share.astype(np.uint32) + np.uint32(255) * (255 - alpha) + 127) // 255
    return np.asarray(np.minimum(mixed, 255), np.uint8)


def straight(pixels: Pixels, alpha: Pixels) -> Pixels:
    """Divide colours (h, w, c) by alpha (h, w, 1), which multiplied them; 0 where alpha is 0."""
    share = np.maximum(alpha.astype(np.uint32), 1)
    return np.asarray(np.minimum((pixels.astype(np.uint32) * 255 + share // 2) // share, 255), np.uint8)


def bits_of_largest(largest: float | None) -> int | None:
    """Return the bits in use by the largest value that a file states, 12 for 4095; None if no camera has it."""
    if largest is None or largest != int(largest):
        return None
    bits = int(largest).bit_length()
    return bits if 8 <= bits < DEEP and largest == 2**bits - 1 else None


def settled_bits(path: Path, given: int | None, parts: Iterable[NDArray[Any]]) -> int:
    """Return the bits in use of a 16-bit picture that does not state them: those given, else 16 if a value needs them.

    Raises BitsUnknown if no bits are given and no value of `parts` uses the highest bit.
    """
    if given is not None:
        return given
    largest, count = 0, 0
    for values in parts:
        largest, count = max(largest, int(values.max(initial=0))), count + values.size
        if largest >= 2 ** (DEEP - 1):
            return DEEP
        if count > MAX_VALUES_SEARCHED:
            break
    if count == 0:
        return DEEP  # nothing can be decoded, which reading reports
    raise BitsUnknown(path, largest)


def scaled(values: NDArray[Any], bits: int, colors: int, stored: int = DEEP) -> Pixels:
    """Return (h, w, 1 or 3) of (h, w, samples) with `bits` of `stored` in use; a sample beyond `colors` is alpha."""
    pixels = eight_bit(values[..., :colors], bits)
    if values.shape[-1] == colors:
        return pixels
    alpha = values[..., colors : colors + 1]
    return on_white(np.concatenate([pixels, alpha_of(alpha, bits, stored)], axis=-1))


def alpha_of(alpha: NDArray[Any], bits: int, stored: int) -> Pixels:
    """Return alpha with 8 bits, scaled as the colours are, or from all stored bits if it uses them."""
    return eight_bit(alpha, bits if int(alpha.max(initial=0)) < 2**bits else stored)


def place(out: Pixels, pixels: Pixels) -> None:
    """`out[...] = pixels`, (... h w c), quickly in mirrored or turned views (numpy walks those 3 bytes at a time)."""
    if out.shape[-1] != 3 or out.strides[-2] == 3 or not out.strides[-1] == pixels.strides[-1] == 1:
        out[...] = pixels
    elif out.strides[-2] == -3:  # mirrored: 5 times as fast a channel at a time
        for channel in range(3):
            out[..., channel] = pixels[..., channel]
    else:  # turned: twice as fast in whole pixels
        out.view("V3")[...] = pixels.view("V3")
