"""Decoded images and foreground masks that stay in memory."""

from __future__ import annotations

import copy
import math
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError, ImageLost
from keyhole.images.geometry import Box
from keyhole.images.image import ArrayImage, Image, open_image
from keyhole.images.pixels import Pixels
from keyhole.patches.foreground.rules import FOREGROUND_RULES, Rule
from keyhole.patches.grid import PatchGrid
from keyhole.util.budget import memory_text
from keyhole.util.platform import available_memory
from keyhole.util.threads import beat

MAX_BAND_PIXELS = 2**22
"""Pixels read at a time while an image is decoded into memory."""
MIN_BAND_ROWS = 256
"""Rows of such a band: bands lower than a tile would decode it more than once."""


def decoded_bytes(image: Image, level: int = 0) -> int:
    """Return the memory that a level takes when it is decoded."""
    width, height = image.levels[level].size
    return width * height * image.channels


def fits(total_bytes: int, limit_gb: float | None) -> tuple[bool, str]:
    """Decide whether decoded images of `total_bytes` in all stay in memory; also return a line for the log.

    `limit_gb` are the GB that they may take; None is a quarter of the memory that is free now, 0 keeps none.
    """
    size = f"{memory_text(total_bytes)} decoded"
    if limit_gb == 0:
        return False, f"images are read from their files each time, as data.cache 0 asks: {size}"
    limit, why = (limit_gb or 0) * 1e9, "data.cache"
    if limit_gb is None:
        free = available_memory()
        limit, why = free / 4, f"a quarter of the {memory_text(free)} free"
    keep = limit > 0 and total_bytes <= limit
    verdict, relation = ("stay in memory", "within") if keep else ("are read from their files each time", "over")
    return keep, f"images {verdict}: {size}, {relation} the limit of {memory_text(round(limit))} ({why})"


class ResidentImage(Image):
    """An image of which one level is in memory; other levels come from the file. `image` is not used afterwards."""

    def __init__(self, image: Image, level: int, bits: int | None = None) -> None:
        self.path, self.size, self.levels, self.mpp = image.path, image.size, image.levels, image.mpp
        self.channels, self.background, self.mpp_note = image.channels, image.background, image.mpp_note
        self.note, self.bits, self.qupath_origin = image.note, image.bits, image.qupath_origin
        self.level, self._given_bits = level, bits
        width, height = image.levels[level].size
        self._pixels = np.empty((height, width, image.channels), np.uint8)
        band = max(MAX_BAND_PIXELS // width, MIN_BAND_ROWS)
        for top in range(0, height, band):
            rows = min(band, height - top)
            self._pixels[top : top + rows] = image.read(Box(0, top, width, rows), level)
            beat()

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return False

    def in_memory(self, level: int) -> Pixels | None:
        return self._pixels if level == self.level else None

    def _read(self, box: Box, level: int) -> Pixels:
        if level != self.level:
            with open_image(self.path, self._given_bits) as image:
                return image.read(box, level)
        return self._pixels[box.y : box.y + box.height, box.x : box.x + box.width]


MaskKey = tuple[Path, Rule, Path | None]
"""Image, foreground rule, and file of the mask where it has one."""


@dataclass(eq=False)
class MaskCache:
    """Foreground masks, packed to about a hundredth, so that those of a thousand slides fit into memory."""

    _packed: dict[MaskKey, tuple[tuple[int, ...], bytes]] = field(default_factory=dict)

    def __contains__(self, key: MaskKey) -> bool:
        return key in self._packed

    def __getitem__(self, key: MaskKey) -> NDArray[np.bool_]:
        shape, packed = self._packed[key]
        bits = np.frombuffer(zlib.decompress(packed), np.uint8)
        return np.unpackbits(bits, count=math.prod(shape)).view(bool).reshape(shape)

    def __setitem__(self, key: MaskKey, mask: NDArray[np.bool_]) -> None:
        self._packed[key] = mask.shape, zlib.compress(np.packbits(mask).tobytes(), level=1)

    @property
    def nbytes(self) -> int:
        """Memory that the masks take."""
        return sum(len(packed) for _, packed in self._packed.values())


@dataclass(eq=False)
class ImageCache:
    """Opens images, from their files each time or, with `keep`, once and then from memory. Thread-safe.

    Attributes:
        keep: whether decoded images stay in memory.
        masks: those of another cache, so that no mask is made twice in a run; masks stay in memory in either case.
        grids: places of the patches of images in memory, where masks made them take time; for `FileOpener`.
        image: the only image, which is in memory already; paths are then only its name.
    """

    keep: bool = False
    masks: MaskCache = field(default_factory=MaskCache)
    grids: dict[tuple[object, ...], PatchGrid] = field(default_factory=dict)
    image: ArrayImage | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _locks: defaultdict[Path, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))
    _damaged: set[Path] = field(default_factory=set)
    _resident: defaultdict[Path, dict[int, ResidentImage]] = field(default_factory=lambda: defaultdict(dict))

    def open(self, path: Path, level: int | Callable[[Image], int] = 0, bits: int | None = None) -> Image:
        """Open an image, which the caller closes. Changing its `mpp` changes no other.

        `level` is the level to read, or a function that returns it for the image. A damaged file is not kept, so that
        its other parts can be read.
        """
        if self.image is not None:
            return copy.copy(self.image)
        if not self.keep or path in self._damaged:
            return open_image(path, bits)
        if (held := self._held(path, level)) is not None:  # without the lock, which a thread that hangs may have
            return copy.copy(held)
        with self._lock_of(path):
            resident = self._resident[path]
            known = next(iter(resident.values()), None)
            wanted = level if isinstance(level, int) else None if known is None else level(known)
            if wanted not in resident:
                with open_image(path, bits) as image:
                    wanted = level if isinstance(level, int) else level(image)
                    try:
                        resident[wanted] = ResidentImage(image, wanted, bits)
                    except ImageLost:
                        raise
                    except ImageError:
                        self._damaged.add(path)
                        return open_image(path, bits)
            return copy.copy(resident[wanted])

    def holds(self, path: Path, level: int | Callable[[Image], int] = 0) -> bool:
        """Return whether `open` with these arguments reads no file."""
        if self.image is not None:
            return True
        return self.keep and path not in self._damaged and self._held(path, level) is not None

    def _held(self, path: Path, level: int | Callable[[Image], int]) -> ResidentImage | None:
        """Return the level of an image that is in memory, or None."""
        known = dict(self._resident.get(path, {}))
        if not known:
            return None
        return known.get(level if isinstance(level, int) else level(next(iter(known.values()))))

    def foreground(
        self, path: Path, rule: Rule, mask: Path | None = None, bits: int | None = None
    ) -> NDArray[np.bool_]:
        """Return the foreground mask (rows, cols) of an image by a rule that has one; only the first call reads files.

        `mask` is the file of the mask, for the rule `mask` only.
        """
        key = path, rule, mask
        if key in self.masks:
            return self.masks[key]
        with self._lock_of(path):
            if key not in self.masks:
                with open_image(path, bits) if self.image is None else copy.copy(self.image) as image:
                    self.masks[key] = FOREGROUND_RULES[rule].mask(image, mask)
            return self.masks[key]

    def _lock_of(self, path: Path) -> threading.Lock:
        """Return the lock of one image: it is read once, and a file that hangs blocks only those that need it."""
        with self._lock:
            return self._locks[path]
