"""Writes a pyramidal JPEG TIFF of any size in constant memory: its pixels are asked for tile by tile.

    write_pyramid(path, Size(width, height), render, mpp=0.5, background=tile) -> levels

Level 0 goes straight into the file, in rows of tiles. Every smaller level is made from the one before while that one
streams by, and its encoded tiles wait in a temporary file beside the target until level 0 is complete. Held in memory
are one row of tiles of each smaller level, and the tables of where each tile lies.

A classic TIFF, or a BigTIFF where 4 GiB are exceeded: the header is written last, when that is known.
"""

from __future__ import annotations

import os
import struct
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from keyhole.images.geometry import Size
from keyhole.util.files import atomic_file

Pixels = NDArray[np.uint8]

TILE = 256
"""Side of a tile in pixels."""
FACTOR = 4
"""Each level has a quarter of the side of the one before, as most scanners write them."""
SMALLEST = 512
"""The pyramid ends with the first level whose longer side is at most this."""
QUALITY = 80
"""JPEG, colour at half the resolution: what slide scanners write."""
_RUN = 8
"""Tiles a thread takes at once: one by one, handing over would cost more than a blank tile does."""
_CLASSIC_END = 2**32 - 1

Encoded = tuple[bytes | None, Pixels]


def write_pyramid(
    path: Path,
    size: Size,
    render: Callable[[int, int], Pixels | None],
    *,
    mpp: float,
    background: Pixels,
    quality: int = QUALITY,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Size]:
    """Writes `path`, which appears only when it is complete.

    Args:
        path: of the file; its folder must exist and takes the temporary files as well.
        size: of level 0 in pixels.
        render: (column, row) of a level-0 tile -> its pixels (256, 256, 3) uint8, whole also at the right and lower
            border, or None for background. Called from several threads.
        mpp: microns per pixel of level 0.
        background: (256, 256, 3), stored once in each level and referred to wherever `render` gives None.
        quality: of the JPEG tiles, 1 ... 100.
        threads: that render and encode; default one per core, at most 16. The bytes written do not depend on it.
        progress: called with the number of pixels done after every row of tiles.

    Returns:
        The size of each level.

    Raises:
        OutputError: no permission or no space; what was at `path` before is unchanged.
    """
    sizes = level_sizes(size)
    encode = _encoder(quality)
    with ExitStack() as stack:
        out = stack.enter_context(atomic_file(path))
        parts = [out, *(stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in sizes[1:])]
        levels = [_Level(lv_size, file, encode(background)) for lv_size, file in zip(sizes, parts, strict=True)]
        out.seek(_HEADER)
        with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
            _stream(levels, render, background, encode, pool, progress)
        _finish(out, levels, mpp)
    return sizes


def level_sizes(size: Size) -> list[Size]:
    """Level 0 and all smaller ones; what does not fill a whole pixel at the border still gets one."""
    sizes = [size]
    while max(sizes[-1]) > SMALLEST:
        sizes.append(Size(*(-(-extent // FACTOR) for extent in sizes[-1])))
    return sizes


# --- tiles -----------------------------------------------------------------------------------------------------------


@dataclass
class _Strip:
    """What one row of tiles gives to the level above: pixels (64, width, 3), and which of the tiles were background."""

    pixels: Pixels
    blank: list[bool]


@dataclass
class _Level:
    """One level while it is written: where its tiles lie in its file, and the row of tiles that is being filled.

    Attributes:
        size: in pixels.
        file: level 0: the target; others: a temporary file.
        blank: the encoded background tile.
        offsets, counts: of each tile in row-major order; bytes.
        blank_at: offset of the background tile, once it is written.
        strips: of the row to come, each from one row of tiles of the level before.
    """

    size: Size
    file: BinaryIO
    blank: bytes
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    counts: array[int] = field(default_factory=lambda: array("L"))
    blank_at: int | None = None
    strips: list[_Strip] = field(default_factory=list)

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of tiles."""
        return -(-self.size.width // TILE), -(-self.size.height // TILE)

    def put(self, data: bytes | None) -> None:
        """Appends a tile; None is background, which is stored only once."""
        if data is None:
            if self.blank_at is None:
                self.blank_at = self._write(self.blank)
            self.offsets.append(self.blank_at)
            self.counts.append(len(self.blank))
        else:
            self.offsets.append(self._write(data))
            self.counts.append(len(data))

    def _write(self, data: bytes) -> int:
        at = self.file.tell()
        self.file.write(data)
        return at


def _encoder(quality: int) -> Callable[[Pixels], bytes]:
    import imagecodecs

    def encode(tile: Pixels) -> bytes:
        return bytes(imagecodecs.jpeg8_encode(tile, level=quality, subsampling="420"))

    return encode


def _stream(
    levels: list[_Level],
    render: Callable[[int, int], Pixels | None],
    background: Pixels,
    encode: Callable[[Pixels], bytes],
    pool: ThreadPoolExecutor,
    progress: Callable[[int], None] | None,
) -> None:
    """All of level 0, row by row, and with it all levels above."""
    small = smaller(background)
    columns, rows = levels[0].grid

    def run(start: int, row: int) -> list[Encoded]:
        done: list[Encoded] = []
        for column in range(start, min(start + _RUN, columns)):
            tile = render(column, row)
            done.append((None, small) if tile is None else (encode(tile), smaller(tile)))
        return done

    for row in range(rows):
        jobs = (pool.submit(run, start, row) for start in range(0, columns, _RUN))
        _put_row(levels, 0, (tile for part in _in_order(jobs) for tile in part), background, encode)
        if progress is not None:
            progress(min(TILE, levels[0].size.height - row * TILE) * levels[0].size.width)


Result = TypeVar("Result")


def _in_order(jobs: Iterator[Future[Result]], ahead: int = 32) -> Iterator[Result]:
    """Results in the order of the jobs, of which only so many are under way: a row may be 800 tiles long."""
    waiting = deque(islice(jobs, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(islice(jobs, 1))


def _put_row(
    levels: list[_Level], number: int, tiles: Iterable[Encoded], background: Pixels, encode: Callable[[Pixels], bytes]
) -> None:
    """Writes one row of tiles of a level; the level above gets its row as soon as four, or the last, are there."""
    level = levels[number]
    columns, rows = level.grid
    strip = _Strip(np.empty((TILE // FACTOR, columns * TILE // FACTOR, 3), np.uint8), [])
    for column, (data, small) in enumerate(tiles):
        level.put(data)
        strip.pixels[:, column * small.shape[1] : (column + 1) * small.shape[1]] = small
        strip.blank.append(data is None)
    if number + 1 == len(levels):
        return
    above = levels[number + 1]
    above.strips.append(strip)
    if len(above.strips) == FACTOR or len(level.offsets) == columns * rows:
        strips, above.strips = above.strips, []
        _put_row(levels, number + 1, _cut(strips, above.grid[0], background, encode), background, encode)


def _cut(
    strips: list[_Strip], columns: int, background: Pixels, encode: Callable[[Pixels], bytes]
) -> Iterator[Encoded]:
    """The tiles of a row of a smaller level, from the strips that make it up."""
    small = smaller(background)
    for column in range(columns):
        if all(all(strip.blank[column * FACTOR : (column + 1) * FACTOR]) for strip in strips):
            yield None, small
            continue
        tile = background.copy()
        for place, strip in enumerate(strips):
            part = strip.pixels[:, column * TILE : (column + 1) * TILE]
            tile[place * part.shape[0] : (place + 1) * part.shape[0], : part.shape[1]] = part
        yield encode(tile), smaller(tile)


def smaller(tile: Pixels) -> Pixels:
    """Means of 4 x 4 pixels, rounded; adding slices is several times faster than a mean over axes."""
    sums = tile[0::FACTOR].astype(np.uint16)
    for start in range(1, FACTOR):
        sums += tile[start::FACTOR]
    total = sums[:, 0::FACTOR].copy()
    for start in range(1, FACTOR):
        total += sums[:, start::FACTOR]
    return ((total + FACTOR * FACTOR // 2) // (FACTOR * FACTOR)).astype(np.uint8)


# --- the file around the tiles ---------------------------------------------------------------------------------------

_HEADER = 16
"""Bytes left free at the start: a BigTIFF's header; a classic one takes half of them."""
_SHORT, _LONG, _RATIONAL, _LONG8 = 3, 4, 5, 16
_CODE = {_SHORT: "H", _LONG: "I", _RATIONAL: "II", _LONG8: "Q"}


def _finish(out: BinaryIO, levels: list[_Level], mpp: float) -> None:
    """Appends the smaller levels and the directories, then writes the header."""
    for level in levels[1:]:
        base = _align(out)
        level.file.seek(0)
        while block := level.file.read(2**20):
            out.write(block)
        level.offsets = array("Q", (offset + base for offset in level.offsets))
    tables = sum(16 * len(level.offsets) + 1024 for level in levels)
    big = out.tell() + tables > _CLASSIC_END
    starts = [_write_directory(out, level, number, mpp * FACTOR**number, big) for number, level in enumerate(levels)]
    # Each directory ends with the place of the next; the header knows the first.
    for (_, link), (following, _) in zip(starts, [*starts[1:], (0, 0)], strict=True):
        out.seek(link)
        out.write(struct.pack("<Q" if big else "<I", following))
    out.seek(0)
    first = starts[0][0]
    out.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, first) if big else struct.pack("<2sHI", b"II", 42, first))


def _write_directory(out: BinaryIO, level: _Level, number: int, mpp: float, big: bool) -> tuple[int, int]:
    """Writes the tags of a level; returns where they start, and where the place of the next directory goes."""
    per_cm = Fraction(10_000 / mpp).limit_denominator(1000)
    resolution = [per_cm.numerator, per_cm.denominator]
    offset_kind, offset_code = (_LONG8, "Q") if big else (_LONG, "I")
    tags: list[tuple[int, int, Iterable[int]]] = [
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
        (324, offset_kind, level.offsets),
        (325, _LONG, level.counts),
        (530, _SHORT, [2, 2]),  # colour at half the resolution both ways
    ]
    room = 8 if big else 4
    start = _align(out)
    entry = 12 + 8 if big else 12
    link = start + (8 if big else 2) + entry * len(tags)
    long_values = link + room
    head = struct.pack("<Q" if big else "<H", len(tags))
    tail = []
    for tag, kind, values in tags:
        packed = _packed(kind, values)
        count = len(packed) // struct.calcsize("<" + _CODE[kind])
        if len(packed) <= room:
            value = packed.ljust(room, b"\0")
        else:
            value = struct.pack("<" + offset_code, long_values)
            packed += b"\0" * (-len(packed) % 8)
            tail.append(packed)
            long_values += len(packed)
        head += struct.pack("<HH" + offset_code, tag, kind, count) + value
    out.write(head + bytes(room))
    for packed in tail:
        out.write(packed)
    return start, link


def _packed(kind: int, values: Iterable[int]) -> bytes:
    dtype = {_SHORT: "<u2", _LONG: "<u4", _RATIONAL: "<u4", _LONG8: "<u8"}[kind]
    return np.asarray(values).astype(dtype).tobytes()


def _align(out: BinaryIO) -> int:
    """Moves to the end, at a multiple of eight bytes."""
    end = out.seek(0, os.SEEK_END)
    out.write(bytes(-end % 8))
    return out.tell()
