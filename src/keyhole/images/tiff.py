"""TIFF of nearly all kinds, read tile by tile: tifffile finds the bytes, imagecodecs decodes them."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import ends_early, faults_of
from keyhole.images.geometry import Size
from keyhole.images.jpeg import Coded
from keyhole.images.pixels import Pixels
from keyhole.images.tiff_file import BLOCK, CONVERT, MAX_SEGMENT_PIXELS, TIFF_MAGIC, vendor_of
from keyhole.images.tiff_layout import read_layout
from keyhole.images.tile_cache import TILE_CACHE
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
        self._pages, (self.mpp, self.mpp_note), orientation, self.note = read_layout(path)
        first = self._pages[0]
        self._file = path.open("rb", buffering=0)
        self._file_lock = threading.Lock()
        super().__init__(
            path,
            [page.size for page in self._pages],
            [page.segment for page in self._pages],
            channels=first.channels,
            bits=first.bits,
            says_bits=first.says_bits,
            orientation=orientation,
        )

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return head[:4] in TIFF_MAGIC and vendor_of(path) is None

    def settle_bits(self, given: int | None) -> None:
        super().settle_bits(given)
        if not self._says_bits:
            for page in self._pages:
                page.bits = self.bits

    def _stored_values(self, tile: int) -> Iterator[NDArray[Any]]:
        colors = self._pages[0].colors
        return (values[..., :colors] for values in itertools.islice(self._planes(0, tile), colors))

    def close(self) -> None:
        self._file.close()
        super().close()

    def _coded(self, level: int, tiles: Sequence[int]) -> Iterator[Coded]:
        if self._pages[level].planes > 1 or not tiles:
            return iter([b""] * len(tiles))
        return self._many_bytes(self._places(level, tiles))

    def decode_tile(self, level: int, tile: int, coded: Coded | None, out: Pixels | None) -> Pixels | None:
        page = self._pages[level]
        if page.jpeg is not None and coded:
            room = np.empty((page.segment.height, page.segment.width, self.channels), np.uint8) if out is None else out
            if page.jpeg.decode_into(coded, room):
                return room
        parts = [*self._planes(level, tile, coded)]
        if len(parts) < page.planes:
            return None
        return page.pixels(np.concatenate(parts, axis=-1) if page.planes > 1 else parts[0])

    def _planes(self, level: int, tile: int, coded: Coded | None = None) -> Iterator[NDArray[Any]]:
        """Yield the stored values of a tile, plane by plane, as far as the file has them; read them if not `coded`."""
        page, tiles = self._pages[level], math.prod(self._grids[level])
        for number in range(tile, page.planes * tiles, tiles):
            data = bytes(coded) if coded else self._bytes(*self._places(level, [number])[0])
            if not data:
                return
            yield page.decode(data, number)

    def jpeg_tiling(self, level: int) -> Size | None:
        page = self._pages[level]
        whole = page.jpeg is not None and page.tiled and page.color in ("grey", "rgb") and self._orientation == 1
        return page.segment if whole else None

    def jpeg_tiles(self, cells: NDArray[np.int64], level: int, colors: Container[str]) -> list[bytes | None]:
        page, found = self._pages[level], list[bytes | None]([None] * len(cells))
        assert page.jpeg is not None
        whole = page.size.width // page.segment.width, page.size.height // page.segment.height
        inside = np.flatnonzero(((cells >= 0) & (cells < whole)).all(axis=1))
        if not len(inside):
            return found
        columns, rows = cells[inside].T
        numbers = rows * self._grids[level][0] + columns
        order = numbers.argsort(kind="stable")
        first, last = (tuple(cells[inside[end]].tolist()) for end in order[[0, -1]])
        with faults_of(self.path, f"damaged at tiles {first} to {last} of level {level}"):
            coded = self._many_bytes(self._places(level, numbers[order]))
            for place, data in zip(inside[order].tolist(), coded, strict=True):
                found[place] = page.jpeg.stream(data, colors)
                beat()
        return found

    def _places(self, level: int, numbers: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return (offset, count) of the bytes of segments with rising numbers."""
        wanted = np.asarray(numbers, np.int64)
        found: list[tuple[int, int]] = []
        cuts = np.flatnonzero(np.diff(wanted // BLOCK)) + 1
        for first, end in itertools.pairwise([0, *cuts.tolist(), len(wanted)]):
            entries = wanted[first:end] % BLOCK
            places = self._table(level, int(wanted[first]) // BLOCK, int(entries[-1]))[:, entries]
            found += zip(*places.tolist(), strict=True)
        return found

    def _table(self, level: int, block: int, last: int) -> NDArray[np.int64]:
        """Return a block of the tables, (2, up to BLOCK): offsets and counts, at least up to entry `last`."""
        places = TILE_CACHE.get(self._owner, ("places", level, block))
        if places is None:
            page, start = self._pages[level], block * BLOCK
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
        """Yield the bytes of segments (offset, count); segments side by side are read together."""
        for group in _side_by_side(places):
            start, end, together = group[0][0], sum(group[-1]), memoryview(b"")
            if len(group) > 1:
                with suppress(OSError):  # each is then read alone, since others may be readable
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


def _side_by_side(places: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut segments (offset, count) into groups that follow each other in the file."""
    group = [places[0]]
    for offset, count in places[1:]:
        near = group[-1][1] and 0 <= offset - sum(group[-1]) <= _MAX_GAP_BYTES
        if not near or offset + count - group[0][0] > _MAX_READ_BYTES:
            yield group
            group = []
        group.append((offset, count))
    yield group
