"""Square tiles of an image at zooms that differ by a factor of two, from the levels that its file has.

Zoom 0 is the whole image in one tile; at the highest zoom a pixel of a tile is a pixel of level 0, or `l0_` pixel.
`lv_` are pixels of a level.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image as Picture

from keyhole.images.geometry import Box, Size
from keyhole.images.image import Image
from keyhole.images.pixels import Pixels
from keyhole.images.resample import sketch

TILE = 256
"""Side of a tile in pixels."""
PATCH = 128
"""Least side of the picture of a kept patch that is as large in the image."""
MAX_READ_PIXELS = 2**26
"""Pixels of a level that one tile reads; beyond that, as of a gigapixel image without levels, it is made of samples."""
_HELD = 16
"""Pixels that are in memory already are this many times cheaper."""
_BAND_BYTES = 32 * 2**20
"""Bytes of a level that are read at once."""
_SAMPLES = 32
"""A tile of samples has this many in each direction."""
_QUALITY = 90


def zooms(size: Size) -> int:
    """Return the highest zoom of an image; there are that many and one.

    >>> zooms(Size(256, 100)), zooms(Size(257, 100)), zooms(Size(128_000, 128_000))
    (0, 1, 9)
    """
    return max(0, math.ceil(math.log2(max(size) / TILE)))


def tile_box(size: Size, zoom: int, column: int, row: int) -> tuple[Box, int] | None:
    """Return the level-0 box of a tile, cut at the border, and level-0 pixels per pixel of it; None if none is there.

    >>> tile_box(Size(1000, 300), 2, 3, 1)
    (Box(x=768, y=256, width=232, height=44), 1)
    """
    if not 0 <= zoom <= zooms(size):
        return None
    scale = 2 ** (zooms(size) - zoom)
    x, y = column * TILE * scale, row * TILE * scale
    if not (0 <= x < size.width and 0 <= y < size.height):
        return None
    return Box(x, y, min(TILE * scale, size.width - x), min(TILE * scale, size.height - y)), scale


def read_tile(image: Image, zoom: int, column: int, row: int) -> Pixels | None:
    """Return the pixels (h, w, c) of a tile, at most TILE each way; None if there is no such tile."""
    found = tile_box(image.size, zoom, column, row)
    if found is None:
        return None
    box, scale = found
    return _scaled(image, box, Size(max(1, round(box.width / scale)), max(1, round(box.height / scale))))


def read_patch(image: Image, box: Box) -> Pixels:
    """Return the pixels (h, w, c) of a level-0 box with a longer side of at most PATCH pixels."""
    shrink = max(1.0, max(box.width, box.height) / PATCH)
    return _scaled(image, box, Size(max(1, round(box.width / shrink)), max(1, round(box.height / shrink))))


def encoded(pixels: Pixels) -> tuple[bytes, str]:
    """Return a picture in a file and the type of it: JPEG of what fills a tile, else PNG, clear beside the pixels."""
    picture = Picture.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    out = io.BytesIO()
    if picture.size == (TILE, TILE) and picture.mode != "RGBA":
        picture.save(out, "JPEG", quality=_QUALITY, subsampling=0)
        return out.getvalue(), "image/jpeg"
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue(), "image/png"


def filled(pixels: Pixels) -> Pixels:
    """Return pixels of a whole tile: those of one at the border, with others that are clear (alpha 0)."""
    height, width = pixels.shape[:2]
    if (height, width) == (TILE, TILE):
        return pixels
    out = np.zeros((TILE, TILE, 4), np.uint8)
    out[:height, :width, :3] = pixels
    out[:height, :width, 3] = 255
    return out


def _scaled(image: Image, box: Box, size: Size) -> Pixels:
    """Return a level-0 box as `size` pixels, the mean of those that each covers, from the coarsest level that has them.

    Parts of the box outside the image have its background.
    """
    scale = max(box.width / size.width, 1.0)
    level = max(i for i, lv in enumerate(image.levels) if i == 0 or lv.downsample <= scale * 1.001)
    down = image.levels[level].downsample
    lv_x, lv_y, lv_width, lv_height = (side / down for side in box)
    most = MAX_READ_PIXELS * (_HELD if image.held_pixels else 1)
    if lv_width * lv_height > most:
        return sketch(image, level, (lv_x, lv_y, lv_width, lv_height), size, _SAMPLES)
    step = lv_height / size.height
    rows = max(1, int(_BAND_BYTES / (lv_width * image.channels * step)))
    bands = []
    for first in range(0, size.height, rows):
        count = min(rows, size.height - first)
        top, bottom = lv_y + first * step, lv_y + (first + count) * step
        bands.append(_resized(image, level, (lv_x, top, lv_x + lv_width, bottom), Size(size.width, count)))
    return bands[0] if len(bands) == 1 else np.concatenate(bands)


def _resized(image: Image, level: int, edges: tuple[float, float, float, float], size: Size) -> Pixels:
    """Return the part of a level between `edges` (left, top, right, bottom) as `size` pixels."""
    left, top, right, bottom = math.floor(edges[0]), math.floor(edges[1]), math.ceil(edges[2]), math.ceil(edges[3])
    pixels = image.read(Box(left, top, right - left, bottom - top), level)
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    picture = Picture.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    inner = (edges[0] - left, edges[1] - top, edges[2] - left, edges[3] - top)
    resized = picture.resize(size, Picture.Resampling.BOX, box=inner)
    return np.asarray(resized).reshape(size.height, size.width, -1)
