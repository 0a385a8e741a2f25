"""A small picture of a whole image, in bounded memory."""

from __future__ import annotations

import numpy as np
from PIL import Image as Picture

from keyhole.images.geometry import Box
from keyhole.images.image import Image, Pixels
from keyhole.util.threads import beat

_BAND_BYTES = 32 * 2**20


def thumbnail(image: Image, side: int = 512) -> tuple[Pixels, float]:
    """The image with its longest side at most `side` pixels, from the smallest level that is large enough.

    Args:
        image: read in bands, so that memory stays bounded where only level 0 exists.
        side: pixels.

    Returns:
        (h, w, c) uint8, and level-0 pixels per pixel of it.

    Raises:
        ImageError: the file is damaged.
    """
    level = max((i for i, level in enumerate(image.levels) if max(level.size) >= side), default=0)
    lv_width, lv_height = image.levels[level].size
    step = max(1, max(lv_width, lv_height) // (2 * side))  # averaged here, the last factor of two by Pillow
    band = max(1, _BAND_BYTES // (lv_width * image.channels * step)) * step
    bands = []
    for y in range(0, lv_height, band):
        pixels = image.read(Box(0, y, lv_width, min(band, lv_height - y)), level)
        bands.append(_averaged(pixels, step))
        beat()
    small = np.concatenate(bands)
    factor = min(1.0, side / max(small.shape[:2]))
    width, height = (max(1, round(extent * factor)) for extent in (small.shape[1], small.shape[0]))
    picture = Picture.fromarray(small[:, :, 0] if image.channels == 1 else small)
    resized = np.asarray(picture.resize((width, height), Picture.Resampling.BOX), np.uint8)
    return resized.reshape(height, width, image.channels), image.size.width / width


def _averaged(pixels: Pixels, step: int) -> Pixels:
    """Means of step x step blocks; the blocks at the right and lower border are what is left of them."""
    if step == 1:
        return pixels
    height, width, _ = pixels.shape
    rows, columns = np.arange(0, height, step), np.arange(0, width, step)
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(np.float32), rows, axis=0), columns, axis=1)
    counts = np.diff(np.append(rows, height))[:, None] * np.diff(np.append(columns, width))[None, :]
    means: Pixels = (sums / counts[:, :, None]).round().astype(np.uint8)
    return means
