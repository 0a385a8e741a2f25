"""Images that are decoded tile by tile: each tile is decoded once and copied into all boxes that it touches.

A tile that other boxes of the same pass need stays in the process-wide `TILE_CACHE` until its last use.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import faults_of, passed_over
from keyhole.images.geometry import Box, Level, Size, downsample_of
from keyhole.images.image import Image, Uses
from keyhole.images.pixels import Pixels, make_upright, place, stored_box, upright_size
from keyhole.images.tile_cache import MIN_KEPT_BYTES, TILE_CACHE


class _Tile(NamedTuple):
    """A tile that some boxes touch."""

    number: int  # row by row
    box: Box  # in level pixels, the part inside the level
    uses: int  # boxes of the whole pass that touch it, as far as known
    users: list[int]  # which boxes of this call touch it
    cached: bool
    coded: Any  # from `_coded`; None if the tile was in the cache


class _Scratch(threading.local):
    """Memory for one tile on each thread, which stays in the processor's cache."""

    tile: Pixels = np.empty((0, 0, 0), np.uint8)


_scratch = _Scratch()


class TiledImage(Image):
    """An image that is stored in tiles of one size per level. Strips are tiles as wide as the image.

    `stored` are the sizes of the levels and `tiles` those of their tiles, before the orientation is obeyed; `says_bits`
    tells whether the file states how many bits are in use.
    """

    def __init__(
        self,
        path: Path,
        stored: Sequence[Size],
        tiles: Sequence[Size],
        *,
        channels: int,
        bits: int,
        says_bits: bool,
        orientation: int = 1,
    ) -> None:
        self.path, self.channels, self.bits, self._says_bits = path, channels, bits, says_bits
        self._stored, self._tiles, self._orientation = stored, tiles, orientation
        self._grids = [
            (math.ceil(size.width / tile.width), math.ceil(size.height / tile.height))
            for size, tile in zip(stored, tiles, strict=True)
        ]  # columns and rows
        sizes = [upright_size(size, orientation) for size in stored]
        self.size = sizes[0]
        self.levels = tuple(Level(size, downsample_of(self.size, size)) for size in sizes)
        self._owner = TILE_CACHE.owner()
        self._closed = False

    @abstractmethod
    def _coded(self, level: int, tiles: Sequence[int]) -> Iterator[Any]:
        """Yield what `decode_tile` needs of each of these tiles, in their order, read as late as possible."""

    @abstractmethod
    def decode_tile(self, level: int, tile: int, coded: Any, out: Pixels | None) -> Pixels | None:
        """Return pixels (h, w, c) of a tile, smaller at the border; None for background. Read it if `coded` is None.

        `out` is C-contiguous memory of a whole tile that may be used and returned; else the caller keeps the array.
        """

    @abstractmethod
    def _stored_values(self, tile: int) -> Iterable[NDArray[Any]]:
        """Return the colours of a tile of level 0 as they are stored, before they are scaled to 8 bits."""

    def _values(self) -> Iterator[NDArray[Any]]:
        """Yield the stored values of level 0, tile by tile from the middle on; damaged ones are left out."""
        count = math.prod(self._grids[0])
        for tile in (*range(count // 2, count), *range(count // 2)):
            with passed_over(self.path):  # reading the tile reports what is wrong with it
                yield from self._stored_values(tile)

    def _read(self, box: Box, level: int) -> Pixels:
        stored = stored_box(box, self.levels[level].size, self._orientation)
        out = np.empty((stored.height, stored.width, self.channels), np.uint8)
        with faults_of(self.path, f"damaged at {tuple(box)} of level {level}"):
            self._scatter([stored], level, [out])
        return make_upright(out, self._orientation)

    def read_boxes(self, boxes: Sequence[Box], level: int, out: Sequence[Pixels], uses: Uses | None = None) -> None:
        if self._orientation != 1:
            super().read_boxes(boxes, level, out, uses)
            return
        lv = self.levels[level].size
        left, top = max(min(box.x for box in boxes), 0), max(min(box.y for box in boxes), 0)
        right = min(max(box.x + box.width for box in boxes), lv.width)
        bottom = min(max(box.y + box.height for box in boxes), lv.height)
        with faults_of(self.path, f"damaged at {(left, top, right - left, bottom - top)} of level {level}"):
            self._scatter(boxes, level, out, uses)

    def _scatter(self, boxes: Sequence[Box], level: int, out: Sequence[Pixels], uses: Uses | None = None) -> None:
        """`read_boxes` in the coordinates in which the tiles are stored."""
        if self._closed:
            raise ImageError(self.path, "read after it was closed")
        lv, tile = self._stored[level], self._tiles[level]
        for box, target in zip(boxes, out, strict=True):
            if box.x < 0 or box.y < 0 or box.x + box.width > lv.width or box.y + box.height > lv.height:
                target[...] = self.background
        size = tile.width * tile.height * self.channels
        keeps_all = size >= MIN_KEPT_BYTES or (uses is None and tile.width >= lv.width)
        for number, inside, count, users, cached, coded in self._touched(boxes, level, None if keeps_all else uses):
            pixels, first = None, out[users[0]]
            if keeps_all or count > len(users):
                decode = partial(self.decode_tile, level, number, coded, None)
                shared = {} if keeps_all else {"uses": len(users), "total": count}
                pixels = TILE_CACHE.fetch(self._owner, (level, number), decode, size, **shared)
            elif not cached or (pixels := TILE_CACHE.get(self._owner, (level, number))) is None:
                # As on an aligned grid: the tile is the box of one patch, and is decoded into it.
                alone = count == len(users) == 1 and boxes[users[0]] == inside and inside[2:] == tile
                direct, shape = alone and first.flags.c_contiguous, (tile.height, tile.width, self.channels)
                if not direct and _scratch.tile.shape != shape:
                    _scratch.tile = np.empty(shape, np.uint8)
                pixels = self.decode_tile(level, number, coded, first if direct else _scratch.tile)
                if pixels is first:
                    continue
            for user in users:
                _copy(pixels, inside, boxes[user], out[user], self.background)

    def _touched(self, boxes: Sequence[Box], level: int, uses: Uses | None) -> Iterator[_Tile]:
        """Yield the tiles that boxes touch in their order in the file; those that another thread decodes come last."""
        lv, tile, (columns, _) = self._stored[level], self._tiles[level], self._grids[level]
        users: dict[int, list[int]] = {}
        for which, (x, y, width, height) in enumerate(boxes):
            right, bottom = min(x + width, lv.width), min(y + height, lv.height)
            first, last = max(x, 0) // tile.width, (right - 1) // tile.width
            for row in range(max(y, 0) // tile.height, (bottom - 1) // tile.height + 1):
                for number in range(row * columns + first, row * columns + last + 1):
                    users.setdefault(number, []).append(which)
        order = sorted(users)
        corners = np.array(order, np.int64)
        tops, lefts = (corners // columns) * tile.height, (corners % columns) * tile.width
        counts = [1] * len(order)
        if uses is not None:
            counts = uses(lefts, tops, lefts + tile.width, tops + tile.height).tolist()
        cached = TILE_CACHE.has(self._owner, [(level, number) for number in order])
        coded = self._coded(level, [number for number, has in zip(order, cached, strict=True) if not has])
        busy = []
        for number, x, y, count, has in zip(order, lefts.tolist(), tops.tolist(), counts, cached, strict=True):
            inside = Box(x, y, min(tile.width, lv.width - x), min(tile.height, lv.height - y))
            found = _Tile(number, inside, count, users[number], has, None if has else next(coded))
            if count > len(users[number]) and TILE_CACHE.is_decoding(self._owner, (level, number)):
                busy.append(found)
            else:
                yield found
        yield from busy

    def close(self) -> None:
        self._closed = True
        TILE_CACHE.drop(self._owner)


def _copy(pixels: Pixels | None, tile: Box, box: Box, out: Pixels, background: int) -> None:
    left, top = max(box.x, tile.x), max(box.y, tile.y)
    right = min(box.x + box.width, tile.x + tile.width)
    bottom = min(box.y + box.height, tile.y + tile.height)
    target = out[top - box.y : bottom - box.y, left - box.x : right - box.x]
    if pixels is None:
        target[...] = background
    else:
        place(target, pixels[top - tile.y : bottom - tile.y, left - tile.x : right - tile.x])
