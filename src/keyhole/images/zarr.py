"""OME-Zarr: a folder of chunks."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import faults_of
from keyhole.images.geometry import Level, Size, downsample_of, same_shape
from keyhole.images.ome_zarr import Picture, picture_of
from keyhole.images.pixels import Pixels, eight_bit
from keyhole.images.tiff_file import MAX_SEGMENT_PIXELS
from keyhole.images.tile_cache import MIN_KEPT_BYTES, TILE_CACHE
from keyhole.images.tiles import TiledImage
from keyhole.images.zarr_array import METADATA, UnsupportedCodec, ZarrArray


class ZarrImage(TiledImage):
    """OME-Zarr 0.4 (zarr v2) and 0.5 (zarr v3), the first series of a bioformats2raw folder, or one zarr array.

    Axes in any order; one time point and plane; one channel or three (red, green, blue); uint8, or uint16, which is
    scaled to 8 bits. Chunks compressed with Blosc, Zstd, gzip, zlib, LZ4, bz2 or not at all, in shards or not.

    A missing chunk reads as the fill value: zarr leaves empty chunks out. A damaged chunk is an error.
    """

    priority: ClassVar[int] = 20
    folder_suffixes: ClassVar[frozenset[str]] = frozenset({".zarr"})

    def __init__(self, path: Path) -> None:
        self.path = path
        with faults_of(path, "damaged zarr metadata"):
            try:
                picture = picture_of(path)
            except UnsupportedCodec as error:
                what = f"{error}, which is not read. Save it with Blosc or Zstd and without filters."
                raise ImageError(path, what) from error
        for array in picture.arrays:
            self._check(picture, array)
        self._axes = picture.axes
        self.channels = picture.channels
        self.mpp, self.mpp_note = picture.scale
        self._says_bits = picture.bits is not None or picture.arrays[0].dtype.itemsize == 1
        self.bits = picture.bits or 8 * picture.arrays[0].dtype.itemsize
        sizes = [picture.size(array) for array in picture.arrays]
        kept = [k for k, size in enumerate(sizes) if k == 0 or same_shape(sizes[0], size)]
        kept = [k for n, k in enumerate(kept) if n == 0 or sizes[k].width < sizes[kept[n - 1]].width]
        self._arrays = [picture.arrays[k] for k in kept]
        self.size = sizes[0]
        self.levels = tuple(Level(sizes[k], downsample_of(sizes[0], sizes[k])) for k in kept)
        wide, high = self._chunk(0)
        self._l0_tiles = math.ceil(self.size.width / wide) * math.ceil(self.size.height / high)
        self._owner = TILE_CACHE.owner()
        self._closed = threading.Event()

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return not head and any(os.path.isfile(os.path.join(path, name)) for name in METADATA)  # noqa: PTH113, PTH118

    def _check(self, picture: Picture, array: ZarrArray) -> None:
        """Check the type of values and the size of a chunk before anything is decoded."""
        if array.dtype.kind != "u" or array.dtype.itemsize > 2:
            raise ImageError(self.path, f"pixels of {array.dtype} are not read. Save them as uint8 or uint16.")
        if math.prod(array.chunks) > MAX_SEGMENT_PIXELS * picture.channels:
            chunk = " x ".join(f"{side:,}" for side in array.chunks)
            raise ImageError(
                self.path,
                f"one chunk has {chunk} pixels, more than the {MAX_SEGMENT_PIXELS:,} that are decoded at once. "
                "Save it again in chunks of 256 to 1024 pixels a side.",
            )

    def _stored_values(self, tile: int) -> list[NDArray[Any]]:
        return [self._tile_values(0, tile, None)]

    def _chunk(self, level: int) -> Size:
        array = self._arrays[level]
        return Size(*(array.chunks[self._axes.index(axis)] for axis in "xy"))

    def tiling(self, level: int) -> Size:
        if self._closed.is_set():
            raise ImageError(self.path, "read after it was closed")
        return self._chunk(level)

    def _keeps_all(self, level: int) -> bool:
        wide, high = self._chunk(level)
        return bool(high * wide * self.channels * self._arrays[level].dtype.itemsize >= MIN_KEPT_BYTES)

    def _coded(self, level: int, tiles: Sequence[int]) -> Iterator[list[bytes | None]]:
        """The encoded chunks of each tile, one after the other along the channels."""
        array = self._arrays[level]
        columns = math.ceil(self.levels[level].size.width / self._chunk(level).width)
        parts = math.ceil(self.channels / array.chunks[self._axes.index("c")]) if "c" in self._axes else 1
        for tile in tiles:
            row, column = divmod(tile, columns)
            places = [{"y": row, "x": column, "c": part} for part in range(parts)]
            yield [array.encoded([place.get(axis, 0) for axis in self._axes]) for place in places]

    def decode_tile(self, level: int, tile: int, coded: list[bytes | None] | None, out: Pixels | None) -> Pixels:
        return self._as_pixels(self._tile_values(level, tile, coded), out)

    def _tile_values(self, level: int, tile: int, coded: list[bytes | None] | None) -> NDArray[Any]:
        """The stored values of a tile that lie inside the level, with the axes y, x and, where there is one, c."""
        array, (wide, high), size = self._arrays[level], self._chunk(level), self.levels[level].size
        parts = [array.decoded(data) for data in (coded or next(self._coded(level, [tile])))]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self._axes.index("c"))
        row, column = divmod(tile, math.ceil(size.width / wide))
        spans = {
            "y": slice(size.height - row * high),
            "x": slice(size.width - column * wide),
            "c": slice(self.channels),
        }
        return values[tuple(spans.get(axis, 0) for axis in self._axes)]

    def _as_pixels(self, values: NDArray[Any], out: Pixels | None) -> Pixels:
        """Stored values as (h, w, c) uint8; in `out` where that helps and fits."""
        left = "".join(axis for axis in self._axes if axis in "yxc")
        values = eight_bit(values, self.bits if values.dtype.itemsize == 2 else 8)
        if left == "yxc":
            return values
        planes = values.transpose([left.index(axis) for axis in "cyx" if axis in left])
        planes = planes if "c" in left else planes[None]
        shape = (*planes.shape[1:], self.channels)
        if out is None or out.shape != shape:
            out = np.empty(shape, np.uint8)
        for channel, plane in enumerate(planes):
            out[:, :, channel] = plane  # six times as fast as a copy of the transposed array
        return out

    def close(self) -> None:
        self._closed.set()
        TILE_CACHE.drop(self._owner)
        self._arrays = []
