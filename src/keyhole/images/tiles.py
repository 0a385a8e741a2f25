"""Images that are decoded tile by tile: many boxes at once, each tile decoded once and copied into all that it touches.

A tile that other boxes of the same pass will want is kept for them, in the process-wide `RECENT`, until the last has
had it. Held beside the boxes' own memory are one tile of each thread and some encoded bytes.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.images.faults import faults_of
from keyhole.images.geometry import Box, Size
from keyhole.images.image import Image
from keyhole.images.pixels import Pixels, place
from keyhole.images.recent import LARGE, RECENT

Index = NDArray[np.int64]
Uses = Callable[[Index, Index, Index, Index], Index]
"""(left, top, right, bottom) of tiles in level pixels, each (k,), -> how many boxes of the whole pass touch each."""

Tile = tuple[int, int, int, bool, int, list[int], bool, Any]
"""Number, left and top, whether whole, uses in the pass, boxes here that touch it, whether kept, and what is coded."""

_here = threading.local()


class TiledImage(Image):
    """An image that is stored in tiles of one size. Strips are tiles as wide as the image.

    A subclass implements `tiling`, `_keeps_all`, `_coded` and `_decoded`, and sets `_owner`.
    """

    _owner: int

    @abstractmethod
    def tiling(self, level: int) -> Size | None:
        """Size of the tiles of a level; None where boxes of it cannot be cut from tiles as they are stored."""

    @abstractmethod
    def _coded(self, level: int, tiles: Sequence[int]) -> Iterator[Any]:
        """What `_decoded` wants of each of these tiles, in their order, read as late as may be."""

    @abstractmethod
    def _decoded(self, level: int, tile: int, coded: Any, out: Pixels | None) -> Pixels | None:
        """Pixels (h, w, c) of a tile, less at the border; None for background.

        Args:
            level: of the tile.
            tile: its number, row by row.
            coded: what `_coded` gave; None: read it.
            out: C-contiguous memory of a whole tile that may be used and returned; None: the caller keeps the array.
        """

    @abstractmethod
    def _keeps_all(self, level: int) -> bool:
        """Whether each tile is worth keeping, whoever wants it: strips, and tiles so large that memory is for one.

        Where the boxes are part of a pass, its uses decide, but for the large ones.
        """

    def read_boxes(self, boxes: Sequence[Box], level: int, out: Sequence[Pixels], uses: Uses | None = None) -> None:
        """Write the pixels of `boxes` into `out`, (h, w, c) each; pixels outside the image are background.

        Args:
            boxes: in pixels of `level`, with area.
            level: one that `tiling` has a size for.
            out: a target for each box; views of any strides.
            uses: where this is one of many calls of a pass: how many boxes of the pass touch a tile.

        Raises:
            ImageError: the file is damaged there.
            ImageLost: the file cannot be reached.
        """
        lv = self.levels[level].size
        tile = self.tiling(level)
        assert tile is not None
        with faults_of(self.path, f"damaged at {_around(boxes, lv)} of level {level}"):
            self._scatter(boxes, level, out, lv, tile, uses)

    def _scatter(
        self, boxes: Sequence[Box], level: int, out: Sequence[Pixels], lv: Size, tile: Size, uses: Uses | None = None
    ) -> None:
        """`read_boxes`, in the coordinates in which the tiles are stored: those of a level of size `lv`."""
        for box, target in zip(boxes, out, strict=True):
            if box.x < 0 or box.y < 0 or box.x + box.width > lv.width or box.y + box.height > lv.height:
                target[...] = self.background
        touched = _touched(boxes, lv, tile)
        order = sorted(touched)  # as they lie in the file
        columns = math.ceil(lv.width / tile.width)
        corners = np.array(order, np.int64)
        tops, lefts = (corners // columns) * tile.height, (corners % columns) * tile.width
        whole = (lefts + tile.width <= lv.width) & (tops + tile.height <= lv.height)
        size = tile.width * tile.height * self.channels
        keeps_all = self._keeps_all(level) and (uses is None or size >= LARGE)
        counts = [1] * len(order)
        if uses is not None and not keeps_all:
            counts = uses(lefts, tops, lefts + tile.width, tops + tile.height).tolist()
        kept = RECENT.which(self._owner, [(level, number) for number in order])
        coded = self._coded(level, [number for number, has in zip(order, kept, strict=True) if not has])
        each_data = (None if has else next(coded) for has in kept)
        places = order, lefts.tolist(), tops.tolist(), whole.tolist()
        tiles = zip(*places, counts, map(touched.__getitem__, order), kept, each_data, strict=True)
        for number, left, top, full, count, users, has, data in self._busy_last(level, tiles):
            first = out[users[0]]
            # As on an aligned grid: the tile is the box of one patch, and is decoded into it.
            alone = full and count == len(users) == 1 and boxes[users[0]] == (left, top, *tile)
            pixels: Pixels | None
            if alone and not (has or keeps_all) and first.flags.c_contiguous:
                pixels = self._decoded(level, number, data, first)
                if pixels is first:
                    continue
            elif keeps_all:
                decode = partial(self._decoded, level, number, data, None)
                pixels = RECENT.once(self._owner, (level, number), size, decode)
            elif count > len(users):
                decode = partial(self._decoded, level, number, data, None)
                pixels = RECENT.shared(self._owner, (level, number), len(users), count, decode)
            else:
                pixels = RECENT.get(self._owner, (level, number)) if has else None
                if pixels is None:
                    room = scratch((tile.height, tile.width, self.channels))
                    pixels = self._decoded(level, number, data, room)
            inside = Box(left, top, min(tile.width, lv.width - left), min(tile.height, lv.height - top))
            for user in users:
                _copy(pixels, inside, boxes[user], out[user], self.background)

    def _busy_last(self, level: int, tiles: Iterable[Tile]) -> Iterator[Tile]:
        """Tiles of a level, at the end those that another thread is decoding: who waited for each of them would end up
        waiting all along, one tile behind the other thread."""
        busy = []
        for each in tiles:
            number, *_, count, users, _, _ = each
            if count > len(users) and RECENT.decoding(self._owner, (level, number)):
                busy.append(each)
            else:
                yield each
        yield from busy

    def _read(self, box: Box, level: int) -> Pixels:
        out = np.empty((box.height, box.width, self.channels), np.uint8)
        self.read_boxes([box], level, [out])
        return out


def _touched(boxes: Sequence[Box], lv: Size, tile: Size) -> dict[int, list[int]]:
    """Numbers of the tiles that the boxes touch, each with the boxes that touch it."""
    columns = math.ceil(lv.width / tile.width)
    found: dict[int, list[int]] = {}
    for which, (x, y, width, height) in enumerate(boxes):
        right, bottom = min(x + width, lv.width), min(y + height, lv.height)
        first, last = max(x, 0) // tile.width, (right - 1) // tile.width
        for row in range(max(y, 0) // tile.height, (bottom - 1) // tile.height + 1):
            for number in range(row * columns + first, row * columns + last + 1):
                if number in found:
                    found[number].append(which)
                else:
                    found[number] = [which]
    return found


def _around(boxes: Sequence[Box], lv: Size) -> tuple[int, int, int, int]:
    """The common box, for messages."""
    left, top = max(min(box.x for box in boxes), 0), max(min(box.y for box in boxes), 0)
    right = min(max(box.x + box.width for box in boxes), lv.width)
    bottom = min(max(box.y + box.height for box in boxes), lv.height)
    return left, top, right - left, bottom - top


def _copy(pixels: Pixels | None, tile: Box, box: Box, out: Pixels, background: int) -> None:
    """What a tile has of a box, or background, into the box's target."""
    left, top = max(box.x, tile.x), max(box.y, tile.y)
    right = min(box.x + box.width, tile.x + tile.width)
    bottom = min(box.y + box.height, tile.y + tile.height)
    target = out[top - box.y : bottom - box.y, left - box.x : right - box.x]
    if pixels is None:
        target[...] = background
    else:
        place(target, pixels[top - tile.y : bottom - tile.y, left - tile.x : right - tile.x])


def scratch(shape: tuple[int, int, int]) -> Pixels:
    """Memory for one tile, the same again and again on each thread: it stays in the processor's cache."""
    held: Pixels | None = getattr(_here, "tile", None)
    if held is None or held.shape != shape:
        held = _here.tile = np.empty(shape, np.uint8)
    return held
