"""When microns per pixel are believed: one rule for all that readers find and for all that users give."""

from __future__ import annotations

import math
from typing import NamedTuple

from keyhole.errors import ConfigError

LOWEST, HIGHEST = 0.02, 100.0
"""Microns per pixel of anything a microscope or slide scanner writes, thumbnails included."""
SAME = 0.01
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
    """Microns per level-0 pixel or None; and where something is stated that is not believed, what it is."""

    mpp: float | None = None
    note: str = ""


def believed(x: object, y: object, source: str = "the file", lowest: float = LOWEST, highest: float = HIGHEST) -> Scale:
    """The one scale that `x` and `y` microns per pixel are, if square and possible; nothing stated is no note.

    Args:
        x, y: numbers or text; None or "" where not stated.
        source: who says so, for the note.
    """
    if x in (None, "") and y in (None, ""):
        return Scale()
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
    """Microns per pixel that a user gives in place of what the file says, by the rule that a file's are held to.

    Raises:
        ConfigError: not a number, or outside what a microscope or slide scanner writes.
    """
    scale = believed(mpp, mpp)
    if scale.mpp is None:
        raise ConfigError(
            f"mpp is {_stated(mpp)!r}. Expected microns per pixel of the full resolution, {LOWEST:g} ... {HIGHEST:g}, "
            "such as 0.25; leave it out where it is not known."
        )
    return scale.mpp


def same_scale(one: float, other: float) -> bool:
    return abs(one / other - 1) <= SAME


def agreed(text: Scale, tag: Scale) -> Scale:
    """Return the first of two statements in one file, unless they contradict each other."""
    if text.mpp is not None and tag.mpp is not None and not same_scale(text.mpp, tag.mpp):
        return Scale(None, f"the file's description says {text.mpp:.4g}, its resolution tag {tag.mpp:.4g} um per pixel")
    return text if text != Scale() else tag


def _stated(value: object) -> str:
    text = " ".join(str(value).split()) if value not in (None, "") else "nothing"
    return text if len(text) <= 20 else text[:17] + "..."
