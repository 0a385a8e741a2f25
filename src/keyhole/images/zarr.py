"""OME-Zarr: a folder of chunks, read through the package `zarr`."""

from __future__ import annotations

import math
import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from keyhole.errors import ImageError
from keyhole.images.faults import faults_of
from keyhole.images.geometry import Box, Level, downsample_of, same_shape
from keyhole.images.image import Image, Pixels
from keyhole.images.ome_zarr import METADATA, Picture, picture_of
from keyhole.images.pixels import eight_bit
from keyhole.images.recent import LARGE, RECENT
from keyhole.images.tiff_checks import MAX_SEGMENT_PIXELS

if TYPE_CHECKING:
    from keyhole.images.zarr_store import CheckedStore

# Its remarks on odd files in the folder would appear between the lines of a progress bar.
warnings.filterwarnings("ignore", module=r"zarr\.")


class ZarrImage(Image):
    """OME-Zarr 0.4 (zarr v2) and 0.5 (zarr v3), the first series of a bioformats2raw folder, or one zarr array.

    Axes in any order; one time point and plane; one channel or three (red, green, blue); uint8, or uint16 of which the
    highest eight bits are kept (value >> 8). Chunks compressed with Blosc, Zstd, gzip, zlib, LZ4, bz2 or not at all,
    in shards or not. Levels are those whose size is level 0's by one factor; microns per pixel come from the scale and
    the units of the axes, and from nothing else. A region costs the chunks it touches.

    A chunk that is not there reads as the array's fill value: zarr leaves empty chunks out, so a lost one cannot be
    told from an empty one. A chunk that is there and damaged is an error, and so is a folder that is gone.

    Raises:
        ImageError: damaged, a chunk of more than 64 Mpx, plates, label images, and kinds not listed here.
        ImageLost: the folder is gone, or its disk or share does not answer.
    """

    priority: ClassVar[int] = 20

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
            for array in picture.arrays:
                self._check(picture, array)
                self._store.rules[array.path] = chunk_rule(array, self._refusal)
        sizes = [picture.size(array) for array in picture.arrays]
        kept = [k for k, size in enumerate(sizes) if k == 0 or same_shape(sizes[0], size)]
        kept = [k for n, k in enumerate(kept) if n == 0 or sizes[k].width < sizes[kept[n - 1]].width]
        self._arrays = [picture.arrays[k] for k in kept]
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

    def _read(self, box: Box, level: int) -> Pixels:
        if self._closed.is_set():
            raise ImageError(self.path, "read after it was closed")
        with faults_of(self.path, f"damaged at {tuple(box)} of level {level}"):
            array = self._arrays[level]
            high, wide = (array.chunks[self._axes.index(axis)] for axis in "yx")
            if high * wide * self.channels * array.dtype.itemsize < LARGE:
                return self._pixels(array, box)
            out = np.empty((box.height, box.width, self.channels), np.uint8)
            for row in range(box.y // high, (box.y + box.height - 1) // high + 1):
                for column in range(box.x // wide, (box.x + box.width - 1) // wide + 1):
                    self._copy_chunk(array, level, Box(column * wide, row * high, wide, high), box, out)
            return out

    def _copy_chunk(self, array: Any, level: int, chunk: Box, box: Box, out: Pixels) -> None:
        """What a large chunk, decoded once for the boxes it touches, has of `box`."""
        size = self.levels[level].size
        inside = Box(chunk.x, chunk.y, min(chunk.width, size.width - chunk.x), min(chunk.height, size.height - chunk.y))
        decoded_bytes = chunk.width * chunk.height * self.channels * array.dtype.itemsize
        key = level, inside.x, inside.y
        pixels = RECENT.once(self._owner, key, decoded_bytes, lambda: self._pixels(array, inside))
        assert pixels is not None
        left, top = max(box.x, inside.x), max(box.y, inside.y)
        right = min(box.x + box.width, inside.x + inside.width)
        below = min(box.y + box.height, inside.y + inside.height)
        out[top - box.y : below - box.y, left - box.x : right - box.x] = pixels[
            top - inside.y : below - inside.y, left - inside.x : right - inside.x
        ]

    def _pixels(self, array: Any, box: Box) -> Pixels:
        """(h, w, c) uint8 of a box inside the array."""
        spans = {"y": slice(box.y, box.y + box.height), "x": slice(box.x, box.x + box.width), "c": slice(None)}
        values = np.asarray(array[tuple(spans.get(axis, 0) for axis in self._axes)])
        left = "".join(axis for axis in self._axes if axis in spans)
        values = eight_bit(values, 8 * array.dtype.itemsize)
        if left == "yxc":
            return values
        out = np.empty((box.height, box.width, self.channels), np.uint8)
        planes = values.transpose([left.index(axis) for axis in "cyx" if axis in left])
        for channel, plane in enumerate(planes if "c" in left else planes[None]):
            out[:, :, channel] = plane  # six times as fast as a copy of the transposed array
        return out

    def close(self) -> None:
        self._closed.set()
        RECENT.drop(self._owner)
        self._arrays = []
        self._store.close()
