"""Patches at another resolution than a level's: the level pixels that one needs, and the patch made of them."""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.images.geometry import Box, Size
from keyhole.images.pixels import Pixels

Index = NDArray[np.int64]

SUPPORT = 2.0
"""Pixels that Pillow's bicubic filter reaches to each side, at the coarser of the two scales."""


def spans(start: Index, size: int, ratio: float) -> tuple[Index, Index]:
    """Along one axis, the first level pixel that patches of `size` need, filter included, and the one behind the last.

    Args:
        start: where the patches begin, in output pixels (k,).
        size: of a patch, in output pixels.
        ratio: level pixels per output pixel.
    """
    reach = SUPPORT * max(ratio, 1.0)
    low, high = np.floor(start * ratio - reach) - 1, np.ceil((start + size) * ratio + reach) + 1
    return low.astype(np.int64), high.astype(np.int64)


def inside(low: Index, high: Index, extent: int) -> tuple[Index, Index]:
    """The part of the spans that lies inside the level, a pixel at least."""
    low = low.clip(0, extent - 1)
    return low, np.maximum(high.clip(max=extent), low + 1)


def resample(
    region: Pixels,
    left: int,
    top: int,
    needed: Box,
    lv_size: Size,
    corner: tuple[float, float],
    lv_side: float,
    size: int,
) -> Pixels:
    """One patch (size, size, c).

    Args:
        region: pixels of the level around the patch, its first at `left`, `top`.
        left, top: level pixels.
        needed: the level pixels under the patch, filter included; may reach over the border.
        lv_size: of the level.
        corner: x and y of the patch in level pixels.
        lv_side: of the patch, in level pixels.
        size: of the patch, in output pixels.
    """
    # Outside the image its border pixels are repeated, so that no background bleeds into the edge.
    columns = np.arange(needed.x, needed.x + needed.width).clip(0, lv_size.width - 1) - left
    lines = np.arange(needed.y, needed.y + needed.height).clip(0, lv_size.height - 1) - top
    crop = region[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]
    if crop.shape[:2] != (len(lines), len(columns)):
        crop = region[lines[:, None], columns]
    x, y = corner[0] - needed.x, corner[1] - needed.y
    return _resize(crop, (x, y, x + lv_side, y + lv_side), size)


def _resize(pixels: Pixels, box: tuple[float, float, float, float], size: int) -> Pixels:
    picture = PIL.Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    resized = np.asarray(picture.resize((size, size), PIL.Image.Resampling.BICUBIC, box=box))
    return resized[:, :, None] if resized.ndim == 2 else resized
