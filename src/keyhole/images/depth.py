"""How many bits of a stored value are in use. Cameras of 12 bits write files of 16, which would be nearly black.

What a file states is believed where it is fewer bits than its values are stored in. A file of 16 bits that states
nothing may be read as such only where a value shows that the highest bit is in use; else the user has to say. So every
image of a data set is scaled by what holds for all of them, and never by its own range, and a model sees new images as
it saw those that it learned from.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import BitsUnknown
from keyhole.images.pixels import Pixels, eight_bit, on_white

DEEP = 16
"""Bits of a stored value of which fewer may be in use. Other numbers, such as 12, are what somebody stated."""
LOOKED_AT = 64 * 2**20
"""Values looked at in search of one that shows that all bits are in use."""


def of_largest(largest: float | None) -> int | None:
    """Bits in use by the largest value that a file states: 12 for 4095; None where it is not a power of two less one.

    Such a value is a property of the camera; any other is the largest of one picture, and says nothing of the next.
    """
    if largest is None or largest != int(largest):
        return None
    bits = int(largest).bit_length()
    return bits if 8 <= bits < DEEP and largest == 2**bits - 1 else None


def settled(path: Path, given: int | None, parts: Iterable[NDArray[Any]]) -> int:
    """Bits in use of a picture of 16 bits that states nothing.

    Args:
        path: the file, for the error.
        given: as the user says.
        parts: its values, in parts; read until one shows that the highest bit is in use.

    Raises:
        BitsUnknown: nobody says, and the values do not show it.
    """
    if given is not None:
        return given
    largest, count = 0, 0
    for values in parts:
        largest, count = max(largest, int(values.max(initial=0))), count + values.size
        if largest >= 2 ** (DEEP - 1):
            return DEEP
        if count > LOOKED_AT:
            break
    if count == 0:
        return DEEP  # nothing of it can be decoded, and reading it says why
    raise BitsUnknown(path, largest)


def scaled(values: NDArray[Any], bits: int, colors: int, stored: int = DEEP) -> Pixels:
    """(h, w, 1 or 3) of (h, w, samples), composited onto white where there is a sample more than `colors`.

    Args:
        values: of which `bits` of `stored` bits are in use. Alpha may use all of them.
        bits: in use.
        colors: 1 or 3.
        stored: bits of a value.
    """
    pixels = eight_bit(values[..., :colors], bits)
    if values.shape[-1] == colors:
        return pixels
    alpha = values[..., colors : colors + 1]
    return on_white(np.concatenate([pixels, alpha_of(alpha, bits, stored)], axis=-1))


def alpha_of(alpha: NDArray[Any], bits: int, stored: int) -> Pixels:
    """Alpha with 8 bits: scaled as the colours are, or from all the bits that are stored where it uses them."""
    return eight_bit(alpha, bits if int(alpha.max(initial=0)) < 2**bits else stored)
