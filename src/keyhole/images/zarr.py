"""OME-Zarr: a folder of chunks, read through the package `zarr`."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.depth import settled
from keyhole.images.faults import faults_of, passed_over
from keyhole.images.geometry import Box, Level, Size, downsample_of, same_shape
from keyhole.images.ome_zarr import METADATA, Picture, picture_of
from keyhole.images.pixels import Pixels, eight_bit
from keyhole.images.recent import LARGE, RECENT
from keyhole.images.tiff_checks import MAX_SEGMENT_PIXELS
from keyhole.images.tiles import TiledImage
from keyhole.images.zarr_direct import chunk_decoder, chunk_keys

if TYPE_CHECKING:
    from keyhole.images.zarr_store import CheckedStore

# Its remarks on odd files in the folder would appear between the lines of a progress bar.
warnings.filterwarnings("ignore", module=r"zarr\.")


class ZarrImage(TiledImage):
    """OME-Zarr 0.4 (zarr v2) and 0.5 (zarr v3), the first series of a bioformats2raw folder, or one zarr array.

    Axes in any order; one time point and plane; one channel or three (red, green, blue); uint8, or uint16, which
    is scaled to 8 bits. Chunks compressed with Blosc, Zstd, gzip, zlib, LZ4, bz2 or not at all,
    in shards or not. Levels are those whose size is level 0's by one factor; microns per pixel come from the scale and
    the units of the axes, and from nothing else. A region costs the chunks it touches.

    A chunk that is not there reads as the array's fill value: zarr leaves empty chunks out, so a lost one cannot be
    told from an empty one. A chunk that is there and damaged is an error, and so is a folder that is gone.

    Raises:
        ImageError: damaged, a chunk of more than 64 Mpx, plates, label images, and kinds not listed here.
        ImageLost: the folder is gone, or its disk or share does not answer.
    """

    priority: ClassVar[int] = 20
    folder_suffixes: ClassVar[frozenset[str]] = frozenset({".zarr"})

    def __init__(self, path: Path) -> None:
        from keyhole.images.zarr_chunks import chunk_rule
        from keyhole.images.zarr_store import CheckedStore

        self.path = path
        self._store: CheckedStore = CheckedStore(path.absolute())
        with faults_of(path, "damaged zarr metadata"):
            picture = picture_of(path, self._store)
            self._axes = picture.axes
            self.channels = picture.channels
            self.mpp, self.mpp_note = picture.scale
            self._says_bits = picture.bits is not None or picture.arrays[0].dtype.itemsize == 1
            self.bits = picture.bits or 8 * picture.arrays[0].dtype.itemsize
            for array in picture.arrays:
                self._check(picture, array)
                self._store.rules[array.path] = chunk_rule(array, self._refusal)
        sizes = [picture.size(array) for array in picture.arrays]
        kept = [k for k, size in enumerate(sizes) if k == 0 or same_shape(sizes[0], size)]
        kept = [k for n, k in enumerate(kept) if n == 0 or sizes[k].width < sizes[kept[n - 1]].width]
        self._arrays = [picture.arrays[k] for k in kept]
        with faults_of(path, "damaged zarr metadata"):
            self._decoders = [chunk_decoder(array, self._store.rules[array.path]) for array in self._arrays]
        self.size = sizes[0]
        self.levels = tuple(Level(sizes[k], downsample_of(sizes[0], sizes[k])) for k in kept)
        self._owner = RECENT.owner()
        self._closed = threading.Event()

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return not head and any(os.path.isfile(os.path.join(path, name)) for name in METADATA)  # noqa: PTH113, PTH118

    def _refusal(self, what: str) -> ImageError:
        return ImageError(self.path, f"{what}, which is not read. Save it with Blosc or Zstd and without filters.")

    def _check(self, picture: Picture, array: Any) -> None:
        """Colours and the size of a chunk, before anything is decoded."""
        if array.dtype.kind != "u" or array.dtype.itemsize > 2:
            raise ImageError(self.path, f"pixels of {array.dtype} are not read. Save them as uint8 or uint16.")
        if math.prod(array.chunks) > MAX_SEGMENT_PIXELS * picture.channels:
            chunk = " x ".join(f"{side:,}" for side in array.chunks)
            raise ImageError(
                self.path,
                f"one chunk has {chunk} pixels, more than the {MAX_SEGMENT_PIXELS:,} that are decoded at once. "
                "Save it anew in chunks of 256 to 1024 pixels a side.",
            )

    def settle_bits(self, given: int | None) -> None:
        if not self._says_bits:
            self.bits = settled(self.path, given, self._values())

    def _values(self) -> Iterator[NDArray[Any]]:
        """Level 0 as it is stored, chunk by chunk, for a look at how many bits it uses; first those in the middle."""
        (width, height), (wide, high) = self.size, self._chunk(0)
        columns, rows = math.ceil(width / wide), math.ceil(height / high)
        number = columns * rows
        for tile in (*range(number // 2, number), *range(number // 2)):
            y, x = tile // columns * high, tile % columns * wide
            values = None
            with passed_over(self.path):
                values = self._cut(self._arrays[0], Box(x, y, min(wide, width - x), min(high, height - y)))
            if values is not None:
                yield values

    def _chunk(self, level: int) -> Size:
        array = self._arrays[level]
        return Size(*(array.chunks[self._axes.index(axis)] for axis in "xy"))

    def tiling(self, level: int) -> Size | None:
        if self._closed.is_set():
            raise ImageError(self.path, "read after it was closed")
        return self._chunk(level) if self._decoders[level] is not None or self._keeps_all(level) else None

    def _keeps_all(self, level: int) -> bool:
        wide, high = self._chunk(level)
        return bool(high * wide * self.channels * self._arrays[level].dtype.itemsize >= LARGE)

    def _read(self, box: Box, level: int) -> Pixels:
        if self.tiling(level) is not None:
            return super()._read(box, level)
        with faults_of(self.path, f"damaged at {tuple(box)} of level {level}"):
            return self._pixels(self._arrays[level], box)

    def _coded(self, level: int, tiles: Sequence[int]) -> Iterator[list[bytes | None] | None]:
        array = self._arrays[level]
        columns = math.ceil(self.levels[level].size.width / self._chunk(level).width)
        for tile in tiles:
            keys = chunk_keys(array, self._axes, *divmod(tile, columns))
            yield None if self._decoders[level] is None else [self._store.read(key) for key in keys]

    def _decoded(self, level: int, tile: int, coded: list[bytes | None] | None, out: Pixels | None) -> Pixels | None:
        array, decode, (wide, high) = self._arrays[level], self._decoders[level], self._chunk(level)
        size = self.levels[level].size
        row, column = divmod(tile, math.ceil(size.width / wide))
        box = Box(column * wide, row * high, min(wide, size.width - column * wide), min(high, size.height - row * high))
        parts = [decode(data) for data in coded if data is not None] if coded and decode is not None else []
        if not parts or len(parts) < len(coded or ()) or any(part is None for part in parts):
            return self._pixels(array, box)
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self._axes.index("c"))  # type: ignore[arg-type]
        assert values is not None
        return self._as_pixels(self._cut(values, Box(0, 0, box.width, box.height)), out)

    def _pixels(self, array: Any, box: Box) -> Pixels:
        """(h, w, c) uint8 of a box inside the array, by zarr."""
        return self._as_pixels(self._cut(array, box), None)

    def _cut(self, array: Any, box: Box) -> NDArray[Any]:
        """Values of a box, with the axes y, x and, where there is one, c."""
        spans = {
            "y": slice(box.y, box.y + box.height),
            "x": slice(box.x, box.x + box.width),
            "c": slice(self.channels),
        }
        return np.asarray(array[tuple(spans.get(axis, 0) for axis in self._axes)])

    def _as_pixels(self, values: NDArray[Any], out: Pixels | None) -> Pixels:
        """Values as `_cut` gives them as (h, w, c) uint8; in `out` where that helps and fits."""
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
        RECENT.drop(self._owner)
        self._arrays, self._decoders = [], []
        self._store.close()
