"""Which parts of an image are worth looking at: a small mask over the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ConfigError
from keyhole.images import Box, Image
from keyhole.pool import beat

ONE_COLOR = 10
"""Grey values by which pixels of one colour may differ: the noise of JPEG, not the contrast of a faint line."""
NEARLY_BLACK = 50
"""Below this brightness the saturation is noise: pen, slide edges, unscanned areas."""
LEAST_SATURATION = 13
"""Otsu's threshold splits even an empty slide in two; glass stays below 5 % of 255, stained tissue above."""
_BLOCK = 8
_BAND_BYTES = 32 * 2**20


def foreground(image: Image, kind: Literal["non-empty", "tissue"], downsample_to: int = 2048) -> NDArray[np.bool_]:
    """Mask (rows, cols) over the whole image, from the smallest level that is large enough.

    `non-empty`: pixels that differ within a block, or from the block beside or below it, by more than 10 grey values.
    Computed from the least and greatest value, so that a thin stroke is not averaged away. A patch of one colour, be it
    white or not, is empty; noise of a scanner's glass above 10 grey values is not told from content.

    `tissue`: blocks whose mean saturation (max - min over RGB, of 255) passes Otsu's threshold over the image, or 13 if
    that is higher; nearly black ones are left out. Made for stained sections on bright glass: coloured pen counts as
    tissue, unstained fat as glass, and where tissue covers all of the image Otsu splits the tissue itself.

    Args:
        image: read in bands, so that memory stays bounded where only level 0 exists.
        kind: what counts as foreground.
        downsample_to: longest side of the mask; at least 8 pixels of the level make one of the mask.

    Raises:
        ConfigError: `tissue` asked of a grey image.
        ImageError: the file is damaged.
    """
    if kind == "tissue" and image.channels != 3:
        raise ConfigError(f"{image.path}: foreground 'tissue' needs a colour image, this one is grey. Use 'non-empty'.")
    level = max((i for i, level in enumerate(image.levels) if max(level.size) >= downsample_to), default=0)
    block = max(_BLOCK, -(-max(image.levels[level].size) // downsample_to))
    return _not_one_color(image, level, block) if kind == "non-empty" else _saturated(image, level, block)


def _not_one_color(image: Image, level: int, block: int) -> NDArray[np.bool_]:
    extremes = _reduce(
        image, level, block, lambda pixels: np.concatenate([pixels.min(axis=(1, 3)), pixels.max(axis=(1, 3))], axis=-1)
    )
    low, high = np.split(extremes, 2, axis=-1)
    for axis in (0, 1):  # an edge may run exactly between two blocks
        low, high = np.minimum(low, _next(low, axis)), np.maximum(high, _next(high, axis))
    spread: NDArray[np.int16] = (high.astype(np.int16) - low).max(axis=-1)
    return spread > ONE_COLOR


def _next(grid: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
    """Each cell's neighbour beside or below it; the last has itself."""
    neighbour: NDArray[np.uint8] = np.take(
        grid, np.minimum(np.arange(grid.shape[axis]) + 1, grid.shape[axis] - 1), axis
    )
    return neighbour


def _saturated(image: Image, level: int, block: int) -> NDArray[np.bool_]:
    mean = _reduce(image, level, block, lambda pixels: pixels.mean(axis=(1, 3), dtype=np.float32).astype(np.uint8))
    brightest = mean.max(axis=-1)
    saturation = brightest - mean.min(axis=-1)
    colored = brightest >= NEARLY_BLACK
    threshold = max(otsu(saturation[colored]), LEAST_SATURATION)
    mask: NDArray[np.bool_] = colored & (saturation > threshold)
    return mask


def otsu(values: NDArray[np.uint8]) -> int:
    """The t that best splits `values` into <= t and > t: greatest variance between the two (Otsu 1979)."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = counts.cumsum()
    moment = (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return int(np.nanargmax(between)) if np.isfinite(between).any() else 255


def _reduce(
    image: Image, level: int, block: int, reduction: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """(rows, cols, k): `reduction` of (rows, block, cols, block, c) over each block, the image's edge repeated."""
    width, height = image.levels[level].size
    rows, columns = -(-height // block), -(-width // block)
    out: NDArray[np.uint8] | None = None
    wide = min(columns, max(1, _BAND_BYTES // (block * block * image.channels)))
    high = max(1, _BAND_BYTES // (wide * block * block * image.channels))
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            box = Box(left * block, top * block, min(wide * block, width - left * block), 0)
            box = box._replace(height=min(high * block, height - top * block))
            pixels = image.read(box, level)
            beat()
            edge = (0, -box.height % block), (0, -box.width % block), (0, 0)
            pixels = np.pad(pixels, edge, mode="edge")
            shape = (pixels.shape[0] // block, block, pixels.shape[1] // block, block, image.channels)
            part = reduction(pixels.reshape(shape))
            if out is None:
                out = np.empty((rows, columns, part.shape[-1]), np.uint8)
            out[top : top + part.shape[0], left : left + part.shape[1]] = part
    assert out is not None
    return out
