"""Foreground rules: which parts of an image have patches, as a small mask over the whole of it.

A new rule is a subclass of `ForegroundRule` in `FOREGROUND_RULES`, and its name in `config.PatchConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.errors import ConfigError, ImageError, ImageLost
from keyhole.images import Box, Image
from keyhole.images.pixels import Pixels
from keyhole.patches.foreground.mask_file import MAX_MASK_SIDE, read_mask
from keyhole.patches.foreground.tissue import extremes, find_tissue
from keyhole.util.threads import beat
from keyhole.util.wording import must_be_one_of

Rule = Literal["all", "non-empty", "tissue", "mask"]
Mask = NDArray[np.bool_]

ONE_COLOR = 10
"""Grey values by which pixels of one colour may differ: the noise of JPEG, not the contrast of a faint line."""
MIN_CELL_SIDE = 8
"""The side of a cell of tissue, in level-0 pixels."""
MIN_EDGE_SIDE, SOFT_EDGE_SIDE = 2, 8
"""Sides of the cells that are searched for sharp and for soft edges, in pixels of the level. A patch that touches a
cell with an edge may itself have one colour: 13 of 45 patches of 50 px on canvases of digits, if all cells had 8."""
_BAND_BYTES = 32 * 2**20
_MIN_BAND_ROWS = 1024
"""Wide images are cut into narrower bands, not into lower ones: tiles that a band cuts are decoded twice."""
_PIECE_SIDE = 128
"""Side of the pieces in which a damaged level is read."""


class ForegroundRule:
    """`all`: every patch, without a mask.

    `has_mask`: `mask` is to be called. `uses_share`: `patch.min_foreground` applies; otherwise one cell of the mask is
    enough. `from_file`: the user gives the mask.
    """

    has_mask = uses_share = from_file = False

    def mask(self, image: Image, file: Path | None = None, longest: int = MAX_MASK_SIDE) -> Mask:
        """Return the mask (rows, cols) over the whole image, with at most `longest` cells along its longest side."""
        raise NotImplementedError


class _NonEmpty(ForegroundRule):
    """`non-empty`: pixels that differ by over 10 grey values within a cell, or from those of the cell beside or below.

    It is computed from the least and greatest value of a cell, so that a thin stroke is not averaged away. Cells are
    small, since a patch that touches one has to be read; where no small one differs, as in a soft shadow, larger ones
    are compared.
    """

    has_mask = True

    def mask(self, image: Image, file: Path | None = None, longest: int = MAX_MASK_SIDE) -> Mask:
        level, block = _level_and_block(image, longest)
        block = max(block, MIN_EDGE_SIDE)
        found, unread = _reduced(image, level, block, _extremes)
        low, high = np.split(found, 2, axis=-1)
        sharp = _differing(low, high)
        group = -(-SOFT_EDGE_SIDE // block)
        soft = _differing(_grouped(low, group, np.minimum), _grouped(high, group, np.maximum))
        soft &= ~_with_following(_grouped(sharp[..., None], group, np.logical_or)[..., 0], np.logical_or)
        spread = soft.repeat(group, axis=0).repeat(group, axis=1)[: sharp.shape[0], : sharp.shape[1]]
        return sharp | spread | unread


class _Tissue(ForegroundRule):
    """`tissue`: `tissue.find_tissue` on the mean colours of cells of at least 8 x 8 level-0 pixels."""

    has_mask = uses_share = True

    def mask(self, image: Image, file: Path | None = None, longest: int = MAX_MASK_SIDE) -> Mask:
        if image.channels != 3:
            raise ConfigError(
                f"{image.path}: foreground 'tissue' needs a colour image, this one is grey. Use 'non-empty'."
            )
        level, block = _level_and_block(image, longest)
        # a smaller level has averaged the colours already
        block = max(block, math.ceil(MIN_CELL_SIDE / image.levels[level].downsample - 1e-6))
        found, unread = _reduced(image, level, block, _color_and_spread)
        return find_tissue(found[..., :3], found[..., 3]) | unread


class _MaskFile(ForegroundRule):
    """`mask`: a PNG or GeoJSON of the user, see `read_mask`."""

    has_mask = uses_share = from_file = True

    def mask(self, image: Image, file: Path | None = None, longest: int = MAX_MASK_SIDE) -> Mask:
        assert file is not None
        return read_mask(file, image.size, longest, image.qupath_origin)


FOREGROUND_RULES: dict[Rule, ForegroundRule] = {
    "all": ForegroundRule(),
    "non-empty": _NonEmpty(),
    "tissue": _Tissue(),
    "mask": _MaskFile(),
}


def foreground(image: Image, rule: Literal["non-empty", "tissue"], longest: int = MAX_MASK_SIDE) -> Mask:
    """Return the foreground mask of an image, from its smallest level that is large enough.

    Args:
        image: read in bands, so that memory stays bounded where only level 0 exists.
        rule: `non-empty` for everything that is not of one colour; `tissue` for stained tissue without glass, pen
            and black borders.
        longest: cells along the longest side of the mask, at most. A cell is at least 2 pixels of the level wide for
            `non-empty`, and 8 of level 0 for `tissue`.

    Returns:
        Mask, bool (rows, cols), over the whole image.

    Raises:
        ConfigError: `tissue` for a grey image, or another rule.
        ImageError: the file is damaged. If only a part is, that part counts as foreground, so that its patches are
            tried, and listed if they cannot be read.

    >>> from keyhole.images import ArrayImage
    >>> pixels = np.full((64, 64, 3), 255, np.uint8)
    >>> pixels[:7, :7] = 90
    >>> foreground(ArrayImage(pixels), "non-empty")[:5, :5].astype(int)  # the border of the grey square
    array([[0, 0, 1, 1, 0],
           [0, 0, 1, 1, 0],
           [1, 1, 1, 1, 0],
           [1, 1, 1, 1, 0],
           [0, 0, 0, 0, 0]])
    """
    in_image = [name for name, each in FOREGROUND_RULES.items() if each.has_mask and not each.from_file]
    if rule not in in_image:
        raise ConfigError(must_be_one_of("rule", rule, in_image))
    return FOREGROUND_RULES[rule].mask(image, longest=longest)


def _level_and_block(image: Image, longest: int) -> tuple[int, int]:
    """Return the smallest level with at least `longest` pixels, and its pixels per cell."""
    level = max((i for i, level in enumerate(image.levels) if max(level.size) >= longest), default=0)
    return level, max(1, -(-max(image.levels[level].size) // longest))


def _grouped(cells: NDArray[np.generic], group: int, of: np.ufunc) -> NDArray[Any]:
    """Reduce squares of `group` x `group` cells (rows, cols, k); at the right and lower border those are smaller."""
    planes = np.moveaxis(cells, -1, 0)
    planes = np.pad(planes, [(0, 0), *((0, -side % group) for side in planes.shape[1:])], mode="edge")
    k, rows, columns = planes.shape[0], planes.shape[1] // group, planes.shape[2] // group
    squares = np.ascontiguousarray(planes).reshape(k, rows, group, columns, group)
    # Numpy takes ten times as long in one step, and where the innermost axis is short.
    lines = reduce(of, np.moveaxis(squares, 2, 0))
    return np.moveaxis(reduce(of, np.moveaxis(lines, 3, 0)), 0, -1)


def _with_following(cells: NDArray[np.generic], of: np.ufunc) -> NDArray[Any]:
    """Combine each cell (rows, cols, ...) with that beside, that below and that beside the one below."""
    cells = np.concatenate([of(cells[:-1], cells[1:]), cells[-1:]])
    return np.concatenate([of(cells[:, :-1], cells[:, 1:]), cells[:, -1:]], axis=1)


def _differing(low: NDArray[np.uint8], high: NDArray[np.uint8]) -> Mask:
    """Return the cells whose pixels differ, or differ from those of the cells that follow: an edge may run between."""
    low, high = _with_following(low, np.minimum), _with_following(high, np.maximum)
    return np.asarray(reduce(np.maximum, np.moveaxis(high - low, -1, 0)) > ONE_COLOR)


def _extremes(pixels: Pixels, block: int) -> NDArray[np.uint8]:
    """Return the least and greatest value of each channel in each block (rows, cols, 2 c)."""
    return np.concatenate([_grouped(pixels, block, np.minimum), _grouped(pixels, block, np.maximum)], axis=-1)


def _color_and_spread(pixels: Pixels, block: int) -> NDArray[np.uint8]:
    """Return the mean colour of each block, and the mean spread of the channels within a pixel (rows, cols, 4)."""
    brightest, darkest = extremes(pixels)
    parts = (np.ascontiguousarray(part) for part in (pixels, brightest - darkest))
    return np.dstack([np.asarray(PIL.Image.fromarray(part).reduce(block)) for part in parts])


def _reduced(
    image: Image, level: int, block: int, reduction: Callable[[Pixels, int], NDArray[np.uint8]]
) -> tuple[NDArray[np.uint8], Mask]:
    """Apply `reduction` to each block of pixels, a band at a time; blocks at the right and lower border may be smaller.

    Return (rows, cols, k), and a mask (rows, cols) of the blocks that could not be read.
    """
    width, height = image.levels[level].size
    rows, columns = -(-height // block), -(-width // block)
    out: NDArray[np.uint8] | None = None
    unread = np.zeros((rows, columns), bool)
    cells = max(1, _BAND_BYTES // (block * block * image.channels))
    wide = min(columns, max(1, cells // max(1, _MIN_BAND_ROWS // block)))
    high = max(1, cells // wide)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            x, y = left * block, top * block
            box = Box(x, y, min(wide * block, width - x), min(high * block, height - y))
            pixels, damaged = _read(image, box, level)
            part = reduction(pixels, block)
            for hole in damaged:
                lines = slice(hole.y // block, -(-(hole.y + hole.height) // block))
                unread[lines, hole.x // block : -(-(hole.x + hole.width) // block)] = True
            beat()
            if out is None:
                out = np.empty((rows, columns, part.shape[-1]), np.uint8)
            out[top : top + part.shape[0], left : left + part.shape[1]] = part
    assert out is not None
    return out, unread


def _read(image: Image, box: Box, level: int) -> tuple[Pixels, list[Box]]:
    """Return the pixels of a box, and its damaged pieces, which become background; raise if all are damaged."""
    try:
        return image.read(box, level), []
    except ImageLost:
        raise
    except ImageError as error:
        first = error
    pixels = np.full((box.height, box.width, image.channels), image.background, np.uint8)
    damaged, seen = [], False
    for y in range(0, box.height, _PIECE_SIDE):
        for x in range(0, box.width, _PIECE_SIDE):
            target = pixels[y : y + _PIECE_SIDE, x : x + _PIECE_SIDE]
            piece = Box(box.x + x, box.y + y, target.shape[1], target.shape[0])
            try:
                target[...] = image.read(piece, level)
                seen = True
            except ImageLost:
                raise
            except ImageError:
                damaged.append(piece)
            beat()
    if not seen:
        raise first
    return pixels, damaged
