"""Which microns per pixel are plausible: one rule for values in files and values from users."""

from __future__ import annotations

import math
from typing import NamedTuple

from keyhole.errors import ConfigError

MIN_MPP, MAX_MPP = 0.02, 100.0
"""Microns per pixel of anything a microscope or slide scanner writes, thumbnails included."""
TOLERANCE = 0.01
"""Values that differ by less than this share are the same: pixels are square, two statements agree."""
TO_MICRONS = {
    **dict.fromkeys(("µm", "μm", "um", "micrometer", "micrometre", "micron"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("m", "meter", "metre"), 1e6),
    **dict.fromkeys(("Å", "angstrom"), 1e-4),
}
"""Units of length by the names that OME-XML and OME-Zarr give them."""


class Scale(NamedTuple):
    """Microns per level-0 pixel or None, and a note on a value that is stated but not plausible."""

    mpp: float | None = None
    note: str = ""


def plausible_scale(
    x: object, y: object, source: str = "the file", limits: tuple[float, float] = (MIN_MPP, MAX_MPP)
) -> Scale:
    """Return the scale of `x` and `y` microns per pixel, if they are plausible and equal.

    Args:
        x, y: numbers or text; None or "" where not stated.
        source: of the statement, for the note.
        limits: lowest and highest plausible value.
    """
    if x in (None, "") and y in (None, ""):
        return Scale()
    lowest, highest = limits
    try:
        um_x, um_y = float(str(x)), float(str(y))
    except ValueError:
        return Scale(None, f"{source} says {_stated(x)} x {_stated(y)} um per pixel, which are not two numbers")
    said = f"{source} says {um_x:.4g}" + ("" if um_x == um_y else f" x {um_y:.4g}") + " um per pixel"
    if not all(math.isfinite(um) and lowest <= um <= highest for um in (um_x, um_y)):
        return Scale(None, f"{said}, outside {lowest:g} ... {highest:g}")
    if not same_scale(um_x, um_y):
        return Scale(None, f"{said}: pixels that are not square")
    return Scale(um_x)


def given_scale(mpp: object) -> float:
    """Return microns per pixel that a user gives instead of the file's; ConfigError if they are not plausible."""
    scale = plausible_scale(mpp, mpp)
    if scale.mpp is None:
        raise ConfigError(
            f"mpp is {_stated(mpp)!r}. Expected microns per pixel of the full resolution, {MIN_MPP:g} ... {MAX_MPP:g}, "
            f"such as 0.25{' (with a point)' if ',' in str(mpp) else ''}; leave it out if it is not known."
        )
    return scale.mpp


def same_scale(one: float, other: float) -> bool:
    return abs(one / other - 1) <= TOLERANCE


def agreed(text: Scale, tag: Scale) -> Scale:
    """Return the first of two statements in one file, unless they contradict each other."""
    if text.mpp is not None and tag.mpp is not None and not same_scale(text.mpp, tag.mpp):
        return Scale(None, f"the file's description says {text.mpp:.4g}, its resolution tag {tag.mpp:.4g} um per pixel")
    return text if text != Scale() else tag


def _stated(value: object) -> str:
    text = " ".join(str(value).split()) if value not in (None, "") else "nothing"
    return text if len(text) <= 20 else text[:17] + "..."
