"""Write a pyramidal JPEG TIFF of any size in constant memory, from a function that renders its tiles.

Level 0 goes straight into the file, each smaller level first into a temporary one. Memory holds one row of tiles per
level. tifffile would store the background in every tile, and write a level only after the one before.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from keyhole.images.geometry import Size
from keyhole.util.files import atomic_file

Pixels = NDArray[np.uint8]

TILE = 256
FACTOR = 4  # each level has a quarter of the side of the one before, as most scanners write them
MAX_LAST_SIDE = 512  # the pyramid ends with the first level whose longer side is at most this
QUALITY = 80
_TILES_PER_JOB = 8  # a blank tile takes less time than handing a job to a thread
_CLASSIC_END = 2**32 - 1
_HEADER = 16  # bytes of a BigTIFF's header; a classic one takes half of them
_SHORT, _LONG, _RATIONAL, _LONG8 = 3, 4, 5, 16
_DTYPES = {_SHORT: "<u2", _LONG: "<u4", _RATIONAL: "<u4", _LONG8: "<u8"}


def write_pyramid(
    path: Path,
    size: Size,
    render: Callable[[int, int], Pixels | None],
    *,
    mpp: float,
    background: Pixels,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Size]:
    """Write `path`, which appears only when it is complete, and return the size of each level.

    Several threads call `render(column, row)` for the pixels (256, 256, 3) of each level-0 tile, or None for
    `background`, which is stored once per level. `progress` gets the number of pixels of each row of tiles.
    """
    sizes = level_sizes(size)
    blank = _Blank(background, _encode(background), smaller(background))
    with ExitStack() as stack:
        out = stack.enter_context(atomic_file(path))
        files = [out, *(stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in sizes[1:])]
        levels: list[_Level] = []
        for level_size, file in zip(reversed(sizes), reversed(files), strict=True):
            levels.insert(0, _Level(level_size, file, blank, levels[0] if levels else None))
        out.seek(_HEADER)
        columns, rows = levels[0].grid

        def run(job: tuple[int, int]) -> list[Encoded]:
            start, row = job
            tiles = (render(column, row) for column in range(start, min(start + _TILES_PER_JOB, columns)))
            return [(None, blank.small) if tile is None else (_encode(tile), smaller(tile)) for tile in tiles]

        with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
            for row in range(rows):
                parts = pool.map(run, [(start, row) for start in range(0, columns, _TILES_PER_JOB)])
                levels[0].put_row(tile for part in parts for tile in part)
                if progress is not None:
                    progress(min(TILE, size.height - row * TILE) * size.width)
        _finish(out, levels, mpp)
    return sizes


def level_sizes(size: Size) -> list[Size]:
    """Return the size of level 0 and all smaller ones; a border that does not fill a whole pixel still gets one."""
    sizes = [size]
    while max(sizes[-1]) > MAX_LAST_SIDE:
        sizes.append(Size(*(-(-extent // FACTOR) for extent in sizes[-1])))
    return sizes


def smaller(tile: Pixels) -> Pixels:
    """Return the rounded means of 4 x 4 pixels; adding slices is several times faster than a mean over axes."""
    sums = tile[0::FACTOR].astype(np.uint16)
    for start in range(1, FACTOR):
        sums += tile[start::FACTOR]
    total = sums[:, 0::FACTOR].copy()
    for start in range(1, FACTOR):
        total += sums[:, start::FACTOR]
    return ((total + FACTOR * FACTOR // 2) // (FACTOR * FACTOR)).astype(np.uint8)


Encoded = tuple[bytes | None, Pixels]  # an encoded tile, None for background, and the tile at a quarter of its side


@dataclass(frozen=True)
class _Blank:
    tile: Pixels
    data: bytes
    small: Pixels  # at a quarter of its side


@dataclass
class _Level:
    """One level while it is written."""

    size: Size
    file: BinaryIO
    blank: _Blank
    above: _Level | None  # the next smaller level
    offsets: array[int] = field(default_factory=lambda: array("Q"))  # of each tile in `file`
    counts: array[int] = field(default_factory=lambda: array("L"))  # bytes of each tile
    blank_at: int | None = None  # position of the background tile once it is written
    strips: list[tuple[Pixels, list[bool]]] = field(default_factory=list)
    """What the next row consists of: pixels (64, width, 3) from the level below, and which tiles are background."""

    @property
    def grid(self) -> tuple[int, int]:
        """Return the columns and rows of tiles."""
        return -(-self.size.width // TILE), -(-self.size.height // TILE)

    def put_row(self, tiles: Iterable[Encoded]) -> None:
        """Write one row of tiles; after four strips, or the last ones, the level above writes its row."""
        columns, rows = self.grid
        strip = np.empty((TILE // FACTOR, columns * TILE // FACTOR, 3), np.uint8), [False] * columns
        for column, (data, small) in enumerate(tiles):
            self._put(data)
            strip[0][:, column * small.shape[1] : (column + 1) * small.shape[1]] = small
            strip[1][column] = data is None
        if self.above is not None:
            self.above.strips.append(strip)
            if len(self.above.strips) == FACTOR or len(self.offsets) == columns * rows:
                self.above.put_row(self.above.cut())
                self.above.strips.clear()

    def cut(self) -> Iterator[Encoded]:
        """Yield the tiles of the next row from the strips."""
        for column in range(self.grid[0]):
            if all(all(blank[column * FACTOR : (column + 1) * FACTOR]) for _, blank in self.strips):
                yield None, self.blank.small
                continue
            tile = self.blank.tile.copy()
            for place, (pixels, _) in enumerate(self.strips):
                part = pixels[:, column * TILE : (column + 1) * TILE]
                tile[place * part.shape[0] : (place + 1) * part.shape[0], : part.shape[1]] = part
            yield _encode(tile), smaller(tile)

    def _put(self, data: bytes | None) -> None:
        at = self.blank_at if data is None else None
        if at is None:
            at = self.file.tell()
            self.file.write(self.blank.data if data is None else data)
            if data is None:
                self.blank_at = at
        self.offsets.append(at)
        self.counts.append(len(self.blank.data if data is None else data))


def _encode(tile: Pixels) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.jpeg8_encode(tile, level=QUALITY, subsampling="420"))


def _finish(out: BinaryIO, levels: Sequence[_Level], mpp: float) -> None:
    """Append the smaller levels and the directories, then write the header."""
    for level in levels[1:]:
        base = _align(out)
        level.file.seek(0)
        shutil.copyfileobj(level.file, out)
        level.offsets = array("Q", (offset + base for offset in level.offsets))
    big = out.tell() + sum(16 * len(level.offsets) + 1024 for level in levels) > _CLASSIC_END
    first = _align(out)
    for number, level in enumerate(levels):
        out.write(_directory(level, number, mpp * FACTOR**number, out.tell(), big))
    out.seek(0)
    out.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, first) if big else struct.pack("<2sHI", b"II", 42, first))


def _directory(level: _Level, number: int, mpp: float, start: int, big: bool) -> bytes:
    """Return the tags of a level, their long values, and the position of the next directory; `start` is its own."""
    per_cm = Fraction(10_000 / mpp).limit_denominator(1000)
    resolution = [per_cm.numerator, per_cm.denominator]
    offset_type, offset_code, room = (_LONG8, "Q", 8) if big else (_LONG, "I", 4)
    tags: list[tuple[int, int, Sequence[int]]] = [
        (254, _LONG, [int(number > 0)]),  # a reduced copy of another page
        (256, _LONG, [level.size.width]),
        (257, _LONG, [level.size.height]),
        (258, _SHORT, [8, 8, 8]),
        (259, _SHORT, [7]),  # JPEG
        (262, _SHORT, [6]),  # YCbCr
        (277, _SHORT, [3]),
        (282, _RATIONAL, resolution),
        (283, _RATIONAL, resolution),
        (284, _SHORT, [1]),
        (296, _SHORT, [3]),  # per centimetre
        (322, _SHORT, [TILE]),
        (323, _SHORT, [TILE]),
        (324, offset_type, level.offsets),
        (325, _LONG, level.counts),
        (530, _SHORT, [2, 2]),  # colour at half the resolution both ways
    ]
    entries = struct.pack("<Q" if big else "<H", len(tags))
    long_values = b""
    long_at = start + len(entries) + (12 + 8 if big else 12) * len(tags) + room
    for tag, type_, values in tags:
        packed = np.asarray(values).astype(_DTYPES[type_]).tobytes()
        count = len(values) // (2 if type_ == _RATIONAL else 1)
        if len(packed) > room:
            value = struct.pack(f"<{offset_code}", long_at + len(long_values))
            long_values += packed + bytes(-len(packed) % 8)
        else:
            value = packed.ljust(room, b"\0")
        entries += struct.pack(f"<HH{offset_code}", tag, type_, count) + value
    length = len(entries) + room + len(long_values)
    padding = -length % 8 if level.above is not None else 0
    following = struct.pack(f"<{offset_code}", start + length + padding if level.above is not None else 0)
    return entries + following + long_values + bytes(padding)


def _align(out: BinaryIO) -> int:
    """Move to the end, at a multiple of eight bytes."""
    end = out.seek(0, os.SEEK_END)
    out.write(bytes(-end % 8))
    return out.tell()
