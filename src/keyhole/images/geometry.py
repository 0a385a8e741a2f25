"""Sizes and boxes, and which boxes are read together. `l0_` level-0 pixels, `lv_` pixels of a level."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class Box(NamedTuple):
    """Left, top, width and height in pixels of a level; may reach over the border."""

    x: int
    y: int
    width: int
    height: int


class Level(NamedTuple):
    """One resolution of an image: its size in its own pixels, and level-0 pixels per pixel of it."""

    size: Size
    downsample: float


def downsample_of(l0_size: Size, lv_size: Size) -> float:
    """Level-0 pixels per pixel of a level: the whole number where rounding of the sizes explains the difference."""
    quotient = (l0_size.width / lv_size.width + l0_size.height / lv_size.height) / 2
    whole = round(quotient)
    if whole >= 1 and all(abs(l0 / whole - lv) < 1 for l0, lv in zip(l0_size, lv_size, strict=True)):
        return float(whole)
    return quotient


def same_shape(l0_size: Size, lv_size: Size) -> bool:
    """Whether the second can be a level of the first: smaller, by one factor in both directions.

    Each side may be off by less than a pixel, however the writer rounded.
    """
    if lv_size.width >= l0_size.width or lv_size.height > l0_size.height or min(lv_size) < 1:
        return False
    lowest = max(l0 / (lv + 1) for l0, lv in zip(l0_size, lv_size, strict=True))
    highest = min(l0 / (lv - 1) if lv > 1 else float("inf") for l0, lv in zip(l0_size, lv_size, strict=True))
    return lowest < highest
