"""Patches at another resolution than a level's, by Pillow's bicubic filter, and a thumbnail of an image."""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.images.geometry import Box, Size
from keyhole.images.image import Image
from keyhole.images.pixels import Pixels
from keyhole.util.threads import beat

Index = NDArray[np.int64]

SUPPORT = 2.0
"""Pixels that Pillow's bicubic filter reaches to each side, at the coarser of the two scales."""
_BAND_BYTES = 32 * 2**20
_SAMPLE_SIDE = 64  # pixels that stand for a square of a sketch
"""Bytes of an image that `thumbnail` reads at once."""


def spans(start: Index, size: int, ratio: float) -> tuple[Index, Index]:
    """Return the first level pixel that patches of `size` output pixels from `start` need, and the one after the last.

    `ratio` is level pixels per output pixel; the filter is included.
    """
    reach = SUPPORT * max(ratio, 1.0)
    low, high = np.floor(start * ratio - reach) - 1, np.ceil((start + size) * ratio + reach) + 1
    return low.astype(np.int64), high.astype(np.int64)


def inside(low: Index, high: Index, extent: int) -> tuple[Index, Index]:
    """Return the part of the spans inside the level, at least one pixel."""
    low = low.clip(0, extent - 1)
    return low, np.maximum(high.clip(max=extent), low + 1)


def surroundings(region: Pixels, corner: tuple[int, int], needed: Box, lv_size: Size) -> Pixels:
    """Cut the pixels of `needed` from a `region` that begins at `corner`; outside the image its border is repeated."""
    columns = np.arange(needed.x, needed.x + needed.width).clip(0, lv_size.width - 1) - corner[0]
    lines = np.arange(needed.y, needed.y + needed.height).clip(0, lv_size.height - 1) - corner[1]
    crop = region[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1]
    return crop if crop.shape[:2] == (len(lines), len(columns)) else region[lines[:, None], columns]


def resample(pixels: Pixels, corner: tuple[float, float], side: float, size: int) -> Pixels:
    """Resample the square of `side` at `corner` (x, y) of `pixels` to a patch (size, size, c)."""
    picture = PIL.Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    box = (*corner, corner[0] + side, corner[1] + side)
    return np.asarray(picture.resize((size, size), PIL.Image.Resampling.BICUBIC, box=box)).reshape(size, size, -1)


def thumbnail(image: Image, side: int = 512) -> tuple[Pixels, float]:
    """Return the image (h, w, c) with its longest side at most `side` pixels, and level-0 pixels per pixel of it."""
    level = max((i for i, level in enumerate(image.levels) if max(level.size) >= side), default=0)
    lv_width, lv_height = image.levels[level].size
    step = max(1, max(lv_width, lv_height) // (2 * side))  # averaged here, the last factor of two by Pillow
    band = max(1, _BAND_BYTES // (lv_width * image.channels * step)) * step
    bands = []
    for y in range(0, lv_height, band):
        pixels = image.read(Box(0, y, lv_width, min(band, lv_height - y)), level)
        if step > 1:  # means of blocks, which may be smaller at the right and lower border
            rows, columns = np.arange(0, len(pixels), step), np.arange(0, lv_width, step)
            sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.float32), rows, axis=0), columns, axis=1)
            counts = np.diff(np.append(rows, len(pixels)))[:, None] * np.diff(np.append(columns, lv_width))[None, :]
            pixels = np.asarray((sums / counts[:, :, None]).round(), np.uint8)
        bands.append(pixels)
        beat()
    small = np.concatenate(bands)
    factor = min(1.0, side / max(small.shape[:2]))
    width, height = (max(1, round(extent * factor)) for extent in (small.shape[1], small.shape[0]))
    picture = PIL.Image.fromarray(small[:, :, 0] if image.channels == 1 else small)
    resized = np.asarray(picture.resize((width, height), PIL.Image.Resampling.BOX), np.uint8)
    return resized.reshape(height, width, image.channels), image.size.width / width


def sketch(image: Image, level: int, region: tuple[float, float, float, float], size: Size, squares: int) -> Pixels:
    """Return a part of a level that is too large to be read: squares that show the mean of pixels in their middle.

    Args:
        image: an open image.
        level: index into its levels.
        region: left, top, width and height in pixels of the level.
        size: of the result.
        squares: most of them along each side; each is one small read.
    """
    x, y, width, height = region
    columns, rows = min(squares, size.width), min(squares, size.height)
    out = np.empty((rows, columns, image.channels), np.uint8)
    side = min(_SAMPLE_SIDE, max(1, int(width / columns)), max(1, int(height / rows)))
    for row in range(rows):
        for column in range(columns):
            left = int(x + (column + 0.5) * width / columns - side / 2)
            top = int(y + (row + 0.5) * height / rows - side / 2)
            out[row, column] = image.read(Box(left, top, side, side), level).mean(axis=(0, 1)).round()
        beat()
    lines = np.arange(size.height) * rows // size.height
    return out[lines[:, None], np.arange(size.width) * columns // size.width]
