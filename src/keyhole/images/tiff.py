"""TIFF in its variety, read tile by tile: tifffile finds the bytes, imagecodecs decodes them."""

from __future__ import annotations

import io
import itertools
import os
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import ends_early, faults_of
from keyhole.images.geometry import Box, Level, Size, downsample_of
from keyhole.images.jpeg import Coded, jpeg_size
from keyhole.images.pixels import (
    Pixels,
    alpha_of,
    eight_bit,
    make_upright,
    on_white,
    stored_box,
    straight,
    upright_size,
)
from keyhole.images.tiff_file import BLOCK, CONVERT, MAX_SEGMENT_PIXELS, is_tiff, vendor_of
from keyhole.images.tiff_layout import TiffLevel, read_layout
from keyhole.images.tile_cache import MIN_KEPT_BYTES, TILE_CACHE
from keyhole.images.tiles import TiledImage
from keyhole.util.threads import beat

_MAX_GAP_BYTES = 4096
"""Bytes between two tiles that are read with them."""
_MAX_READ_BYTES = 2**20
"""Encoded bytes that a thread reads at once."""


class TiffImage(TiledImage):
    """TIFF and BigTIFF: tiled or striped, pyramids (SubIFDs or a chain of pages), OME-TIFF, Aperio SVS.

    Compression none, PackBits, LZW, Deflate, LZMA, Zstd, CCITT, JPEG, JPEG 2000 and WebP; grey (also inverted), RGB,
    CMYK and palette of 1 to 8 bits, grey and RGB of up to 16 bits, scaled to 8. Alpha is composited onto white, the
    orientation tag obeyed; a missing tile is background. Of several pictures the first is read.

    `mpp` comes from OME-XML, Aperio's description or the resolution tags, if those can be a microscope's.
    """

    priority: ClassVar[int] = 20
    suffixes: ClassVar[frozenset[str]] = frozenset({".tif", ".tiff", ".svs"})

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored, (self.mpp, self.mpp_note), self._orientation, self.note = read_layout(path)
        first = self._stored[0]
        self.channels, self.bits, self._says_bits = first.channels, first.bits, first.says_bits
        self._l0_tiles = first.grid[0] * first.grid[1]
        sizes = [upright_size(level.size, self._orientation) for level in self._stored]
        self.size = sizes[0]
        self.levels = tuple(Level(size, downsample_of(self.size, size)) for size in sizes)
        self._file = path.open("rb", buffering=0)
        self._file_lock = threading.Lock()
        self._owner = TILE_CACHE.owner()

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return is_tiff(head) and vendor_of(path) is None

    def settle_bits(self, given: int | None) -> None:
        super().settle_bits(given)
        if not self._says_bits:
            self._stored = tuple(replace(level, bits=self.bits) for level in self._stored)

    def _stored_values(self, tile: int) -> Iterator[NDArray[Any]]:
        colors = self._stored[0].colors
        return (values[..., :colors] for values in itertools.islice(self._planes(0, tile), colors))

    def close(self) -> None:
        self._file.close()
        TILE_CACHE.drop(self._owner)

    def tiling(self, level: int) -> Size | None:
        return self._stored[level].segment if self._orientation == 1 else None

    def _keeps_all(self, level: int) -> bool:
        page = self._stored[level]
        return not page.tiled or page.segment.width * page.segment.height * self.channels >= MIN_KEPT_BYTES

    def _read(self, box: Box, level: int) -> Pixels:
        if self._orientation == 1:
            return super()._read(box, level)
        page = self._stored[level]
        stored = stored_box(box, self.levels[level].size, self._orientation)
        out = np.empty((stored.height, stored.width, self.channels), np.uint8)
        with faults_of(self.path, f"damaged at {tuple(box)} of level {level}"):
            self._scatter([stored], level, [out], page.size, page.segment)
        return make_upright(out, self._orientation)

    def _coded(self, level: int, tiles: Sequence[int]) -> Iterator[Coded]:
        page = self._stored[level]
        if page.planes > 1 or not tiles:
            return iter([b""] * len(tiles))
        return self._many_bytes(self._places(level, tiles))

    def decode_tile(self, level: int, tile: int, coded: Coded | None, out: Pixels | None) -> Pixels | None:
        page = self._stored[level]
        if page.jpeg is not None and coded:
            room = np.empty((page.segment.height, page.segment.width, self.channels), np.uint8) if out is None else out
            if page.jpeg.decode_into(coded, room):
                return room
        parts = [*self._planes(level, tile, coded)]
        if len(parts) < page.planes:
            return None
        return _to_pixels(np.concatenate(parts, axis=-1) if page.planes > 1 else parts[0], page)

    def _planes(self, level: int, tile: int, coded: Coded | None = None) -> Iterator[NDArray[Any]]:
        """The stored values of a tile, plane by plane; ends where the file has none. They are read if not `coded`."""
        page = self._stored[level]
        columns, rows = page.grid
        for number in range(tile, page.planes * columns * rows, columns * rows):
            data = bytes(coded) if coded else self._bytes(*self._places(level, [number])[0])
            if not data:
                return
            self._check_coded(page, data)
            yield page.decode(data, number)

    def jpeg_tiling(self, level: int) -> Size | None:
        page = self._stored[level]
        whole = page.jpeg is not None and page.tiled and page.color in ("grey", "rgb") and self._orientation == 1
        return page.segment if whole else None

    def jpeg_tiles(self, cells: NDArray[np.int64], level: int, colors: Container[str]) -> list[bytes | None]:
        page, found = self._stored[level], list[bytes | None]([None] * len(cells))
        assert page.jpeg is not None
        whole = page.size.width // page.segment.width, page.size.height // page.segment.height
        inside = np.flatnonzero(((cells >= 0) & (cells < whole)).all(axis=1))
        if not len(inside):
            return found
        columns, rows = cells[inside].T
        numbers = rows * page.grid[0] + columns
        order = numbers.argsort(kind="stable")
        first, last = (tuple(cells[inside[end]].tolist()) for end in order[[0, -1]])
        with faults_of(self.path, f"damaged at tiles {first} to {last} of level {level}"):
            coded = self._many_bytes(self._places(level, numbers[order]))
            for place, data in zip(inside[order].tolist(), coded, strict=True):
                found[place] = page.jpeg.stream(data, colors)
                beat()
        return found

    def _places(self, level: int, numbers: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int]]:
        """Where the bytes of segments lie, (offset, count) each; their numbers rise."""
        wanted = np.asarray(numbers, np.int64)
        found: list[tuple[int, int]] = []
        cuts = np.flatnonzero(np.diff(wanted // BLOCK)) + 1
        for first, end in itertools.pairwise([0, *cuts.tolist(), len(wanted)]):
            entries = wanted[first:end] % BLOCK
            places = self._table(level, int(wanted[first]) // BLOCK, int(entries[-1]))[:, entries]
            found += zip(*places.tolist(), strict=True)
        return found

    def _table(self, level: int, block: int, last: int) -> NDArray[np.int64]:
        """A block of the tables, (2, up to BLOCK): offsets and counts, at least up to entry `last`."""
        places = TILE_CACHE.get(self._owner, ("places", level, block))
        if places is None:
            page, start = self._stored[level], block * BLOCK
            tables = [table.read(self._pread, start, start + BLOCK) for table in (page.offsets, page.counts)]
            length = min(map(len, tables))
            if last >= length:
                raise ends_early(self.path, self.path.stat().st_size, max(page.offsets.end, page.counts.end))
            places = np.stack([table[:length] for table in tables])
            TILE_CACHE.put(self._owner, ("places", level, block), places)
        return places

    def _bytes(self, offset: int, count: int) -> bytes:
        if count == 0 or offset == 0:
            return b""
        if count > 8 * MAX_SEGMENT_PIXELS:
            raise ImageError(self.path, f"one tile or strip of {count:,} bytes. {CONVERT}")
        data = self._pread(count, offset)
        if len(data) < count:
            raise ends_early(self.path, offset + len(data), offset + count)
        return data

    def _many_bytes(self, places: Sequence[tuple[int, int]]) -> Iterator[Coded]:
        """Bytes of segments (offset, count), those that lie side by side with one read."""
        for group in _side_by_side(places):
            start, end, together = group[0][0], sum(group[-1]), memoryview(b"")
            if len(group) > 1:
                with suppress(OSError):  # each is then read by itself, since others may be readable
                    together = memoryview(self._pread(end - start, start))
            for offset, count in group:
                data = together[offset - start : offset - start + count]
                yield data if len(data) == count > 0 else self._bytes(offset, count)

    def _pread(self, count: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), count, offset)
        with self._file_lock:
            self._file.seek(offset)
            return self._file.read(count) or b""

    def _check_coded(self, page: TiffLevel, data: bytes) -> None:
        """Refuse a tile that is a picture of its own and declares a much larger size than the page does."""
        if not page.coded:
            return
        size = jpeg_size(data) if page.coded == "JPEG" else _picture_size(data)
        if size is not None and size.width * size.height > max(4 * page.segment.width * page.segment.height, 2**16):
            problem = f"a tile of {tuple(page.segment)} pixels holds a picture of {tuple(size)}."
            raise ImageError(self.path, f"{problem} Export it again.")


def _to_pixels(values: NDArray[np.unsignedinteger | np.bool_], page: TiffLevel) -> Pixels:
    """Decoded samples (h, w, samples) to (h, w, 1 or 3) uint8, by the page's kind of colour."""
    color, associated = values[..., : page.colors], page.alpha == "associated"
    pixels = page.palette[color[..., 0].astype(np.intp)] if page.palette is not None else eight_bit(color, page.bits)
    alpha = alpha_of(values[..., page.samples - 1 : page.samples], page.bits, page.stored) if page.alpha else None
    if associated and alpha is not None and page.color in ("inverted", "cmyk"):
        pixels, associated = straight(pixels, alpha), False  # ink was multiplied by alpha, not the colour it gives
    if page.color == "inverted":
        pixels = 255 - pixels
    elif page.color == "cmyk":
        ink, black = 255 - pixels[..., :3].astype(np.uint16), 255 - pixels[..., 3:].astype(np.uint16)
        pixels = ((ink * black + 127) // 255).astype(np.uint8)
    return pixels if alpha is None else on_white(np.concatenate([pixels, alpha], axis=-1), associated)


def _side_by_side(places: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut segments (offset, count) into groups that lie one behind the other in the file."""
    group = [places[0]]
    for offset, count in places[1:]:
        near = group[-1][1] and 0 <= offset - sum(group[-1]) <= _MAX_GAP_BYTES
        if not near or offset + count - group[0][0] > _MAX_READ_BYTES:
            yield group
            group = []
        group.append((offset, count))
    yield group


def _picture_size(data: bytes) -> Size:
    """Width and height of a JPEG 2000 or WebP segment, from its header."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data), formats=("JPEG2000", "WEBP")) as picture:
            return Size(*picture.size)
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
