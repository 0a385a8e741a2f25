"""Sizes and boxes. Prefixes in names: `l0_` level-0 pixels, `lv_` pixels of a level, `g_` grid cells."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class Box(NamedTuple):
    """Left, top, width and height in pixels of a stated level; may reach over the border."""

    x: int
    y: int
    width: int
    height: int


class Level(NamedTuple):
    """One resolution of an image: its size in its own pixels, and level-0 pixels per pixel of it."""

    size: Size
    downsample: float
