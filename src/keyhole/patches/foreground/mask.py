"""Which parts of an image are worth looking at: a small mask over the whole of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.errors import ConfigError, ImageError, ImageLost
from keyhole.images import Box, Image
from keyhole.images.pixels import Pixels
from keyhole.patches.foreground.tissue import extremes, find_tissue
from keyhole.util.threads import beat

ONE_COLOR = 10
"""Grey values by which pixels of one colour may differ: the noise of JPEG, not the contrast of a faint line."""
LONGEST = 2048
"""Cells along the longest side of a mask at most: a cell is then smaller than a patch on any slide."""
_BLOCK = 8
_BAND_BYTES = 32 * 2**20
_PIECE = 128
"""Pixels of a piece, along each side, in which what is left of a damaged level is read."""
_BAND_ROWS = 1024
"""Rows that a band has at least, by being narrower than the image if need be: tiles that it cuts are decoded twice."""


def foreground(image: Image, kind: Literal["non-empty", "tissue"], downsample_to: int = LONGEST) -> NDArray[np.bool_]:
    """Mask (rows, cols) over the whole image, from the smallest level that is large enough.

    `non-empty`: pixels that differ within a block, or from the block beside or below it, by more than 10 grey values.
    Computed from the least and greatest value, so that a thin stroke is not averaged away. A patch of one colour, be it
    white or not, is empty; noise of a scanner's glass above 10 grey values is not told from content.

    `tissue`: `tissue.find_tissue` on the mean colours of the cells: stained tissue by Otsu's threshold; glass, pen and
    black borders are not.

    Args:
        image: read in bands, so that memory stays bounded where only level 0 exists.
        kind: what counts as foreground.
        downsample_to: longest side of the mask. A cell is at least 8 pixels wide: of the level for `non-empty`, of
            level 0 for `tissue`, whose colours a smaller level has averaged already.

    Raises:
        ConfigError: `tissue` asked of a grey image.
        ImageError: the file is damaged; where a part of it is, that part counts as foreground, so that its patches
            are tried, and listed where they cannot be read.
    """
    if kind == "tissue" and image.channels != 3:
        raise ConfigError(f"{image.path}: foreground 'tissue' needs a colour image, this one is grey. Use 'non-empty'.")
    level = max((i for i, level in enumerate(image.levels) if max(level.size) >= downsample_to), default=0)
    block = max(1, -(-max(image.levels[level].size) // downsample_to))
    if kind == "non-empty":
        return _not_one_color(image, level, max(block, _BLOCK))
    block = max(block, math.ceil(_BLOCK / image.levels[level].downsample - 1e-6))
    found, unseen = _reduce(image, level, block, _color_and_spread)
    return find_tissue(found[..., :3], found[..., 3]) | unseen


def _not_one_color(image: Image, level: int, block: int) -> NDArray[np.bool_]:
    found, unseen = _reduce(image, level, block, _extremes)
    low, high = np.split(found, 2, axis=-1)
    for axis in (0, 1):  # an edge may run exactly between two blocks
        low, high = np.minimum(low, _next(low, axis)), np.maximum(high, _next(high, axis))
    spread: NDArray[np.int16] = (high.astype(np.int16) - low).max(axis=-1)
    return (spread > ONE_COLOR) | unseen


def _next(grid: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
    """Each cell's neighbour beside or below it; the last has itself."""
    neighbour: NDArray[np.uint8] = np.take(
        grid, np.minimum(np.arange(grid.shape[axis]) + 1, grid.shape[axis] - 1), axis
    )
    return neighbour


def _extremes(pixels: Pixels, block: int) -> NDArray[np.uint8]:
    """Least and greatest value of each channel in each block (rows, cols, 2 c)."""
    height, width, channels = pixels.shape
    pixels = np.pad(pixels, ((0, -height % block), (0, -width % block), (0, 0)), mode="edge")
    rows, columns = pixels.shape[0] // block, pixels.shape[1] // block
    # Down, then across: in one step numpy is ten times slower.
    lines = pixels.reshape(rows, block, columns * block * channels)
    low, high = (
        of(of(lines, axis=1).reshape(rows, columns, block, channels), axis=2)
        for of in (np.minimum.reduce, np.maximum.reduce)
    )
    return np.concatenate([low, high], axis=-1)


def _color_and_spread(pixels: Pixels, block: int) -> NDArray[np.uint8]:
    """Mean colour of each block, and mean spread of the channels within a pixel (rows, cols, 4)."""
    brightest, darkest = extremes(pixels)
    means = (
        np.asarray(PIL.Image.fromarray(np.ascontiguousarray(part)).reduce(block))
        for part in (pixels, brightest - darkest)
    )
    return np.dstack(list(means))


def _reduce(
    image: Image, level: int, block: int, reduction: Callable[[Pixels, int], NDArray[np.uint8]]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """`reduction` over each block of pixels, those at the right and lower border may be smaller; and the blocks unseen.

    Returns:
        (rows, cols, k), and (rows, cols) True where a block could not be read.
    """
    width, height = image.levels[level].size
    rows, columns = -(-height // block), -(-width // block)
    out: NDArray[np.uint8] | None = None
    unseen = np.zeros((rows, columns), bool)
    cells = max(1, _BAND_BYTES // (block * block * image.channels))
    wide = min(columns, max(1, cells // max(1, _BAND_ROWS // block)))
    high = max(1, cells // wide)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            box = Box(left * block, top * block, min(wide * block, width - left * block), 0)
            box = box._replace(height=min(high * block, height - top * block))
            pixels, damaged = _read(image, box, level)
            part = reduction(pixels, block)
            for hole in damaged:
                lines = slice(hole.y // block, -(-(hole.y + hole.height) // block))
                unseen[lines, hole.x // block : -(-(hole.x + hole.width) // block)] = True
            beat()
            if out is None:
                out = np.empty((rows, columns, part.shape[-1]), np.uint8)
            out[top : top + part.shape[0], left : left + part.shape[1]] = part
    assert out is not None
    return out, unseen


def _read(image: Image, box: Box, level: int) -> tuple[Pixels, list[Box]]:
    """Pixels of a box, and the pieces of it that are damaged and therefore background.

    Raises:
        ImageError: all of it is damaged, or the file is out of reach.
    """
    try:
        return image.read(box, level), []
    except ImageLost:
        raise
    except ImageError as error:
        first = error
    pixels = np.full((box.height, box.width, image.channels), image.background, np.uint8)
    damaged, seen = [], False
    for y in range(box.y, box.y + box.height, _PIECE):
        for x in range(box.x, box.x + box.width, _PIECE):
            piece = Box(x, y, min(_PIECE, box.x + box.width - x), min(_PIECE, box.y + box.height - y))
            try:
                part = image.read(piece, level)
            except ImageLost:
                raise
            except ImageError:
                damaged.append(piece)
            else:
                seen = True
                pixels[y - box.y : y - box.y + piece.height, x - box.x : x - box.x + piece.width] = part
            beat()
    if not seen:
        raise first
    return pixels, damaged
