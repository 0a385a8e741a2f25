"""Decoded images that stay in memory when they fit; one rule decides."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.foreground import foreground
from keyhole.images.geometry import Box
from keyhole.images.image import Image, open_image
from keyhole.images.pixels import Pixels
from keyhole.pool import beat

BAND_PIXELS = 2**22
"""Pixels read at a time while an image is taken into memory."""
BAND_ROWS = 256
"""Rows of a band at least: bands lower than a tile would decode it more than once."""


def decoded_bytes(image: Image, level: int = 0) -> int:
    """Memory that a level takes when it is held decoded."""
    width, height = image.levels[level].size
    return width * height * image.channels


def available_bytes() -> int:
    """Memory that this process could still take without swapping, its container's limit included."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        free = [int(words[1]) * 1024 for words in lines if words and words[0] == "MemAvailable:"] or free
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and Path(used).exists():
            text = Path(limit).read_text().strip()
            if text != "max":
                free.append(max(int(text) - int(Path(used).read_text()), 0))
    return min(free)


def fits(total_bytes: int, limit_gb: float | None) -> tuple[bool, str]:
    """Whether decoded images of so many bytes stay in memory, and the sentence that says so.

    Args:
        total_bytes: of all images at the level that is read (`decoded_bytes`).
        limit_gb: GB they may take; None is a quarter of the memory free now, 0 never keeps any.
    """
    if limit_gb is None:
        free = available_bytes()
        limit = free / 4
        why = f"a quarter of the {free / 1e9:.1f} GB free"
    else:
        limit = limit_gb * 1e9
        why = "data.cache"
    keep = limit > 0 and total_bytes <= limit
    verdict = "stay in memory" if keep else "are read from their files each time"
    relation = "within" if keep else "over"
    return keep, (
        f"images {verdict}: {total_bytes / 1e9:.1f} GB decoded, {relation} the limit of {limit / 1e9:.1f} GB ({why})"
    )


class ResidentImage(Image):
    """One level of an image in memory; it describes itself as the file does. Other levels come from the file.

    Args:
        image: the open file; read whole here and not used afterwards.
        level: the level to hold.

    Raises:
        ImageError: the file is damaged.
    """

    def __init__(self, image: Image, level: int) -> None:
        self.path, self.size, self.levels, self.mpp = image.path, image.size, image.levels, image.mpp
        self.channels, self.background = image.channels, image.background
        self.level = level
        width, height = image.levels[level].size
        self._pixels = np.empty((height, width, image.channels), np.uint8)
        band = max(BAND_PIXELS // width, BAND_ROWS)
        for top in range(0, height, band):
            rows = min(band, height - top)
            self._pixels[top : top + rows] = image.read(Box(0, top, width, rows), level)
            beat()

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return False

    def copy(self) -> ResidentImage:
        """Another image over the same pixels, so that who changes its `mpp` changes no other."""
        twin = object.__new__(ResidentImage)
        twin.__dict__.update(self.__dict__)
        return twin

    def _read(self, box: Box, level: int) -> Pixels:
        if level != self.level:
            with open_image(self.path) as image:
                return image.read(box, level)
        return self._pixels[box.y : box.y + box.height, box.x : box.x + box.width]


class ImageStore:
    """Opens images, from their files each time or, with `keep`, once and then from memory. Thread-safe.

    Foreground masks are small and are kept in either case.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._lock = threading.Lock()
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._resident: defaultdict[Path, dict[int, ResidentImage]] = defaultdict(dict)
        self._masks: dict[tuple[Path, str], NDArray[np.bool_]] = {}

    def open(self, path: Path, level: int | Callable[[Image], int] = 0) -> Image:
        """An image for the caller to close.

        Args:
            path: the file.
            level: the level that will be read, or a function that tells it from the image.

        Raises:
            ImageError: the file cannot be opened, or with `keep` not be read.
        """
        if not self.keep:
            return open_image(path)
        with self._lock_of(path):
            held = self._resident[path]
            known = next(iter(held.values()), None)
            wanted = level if isinstance(level, int) else None if known is None else level(known)
            if wanted not in held:
                with open_image(path) as image:
                    wanted = level if isinstance(level, int) else level(image)
                    held[wanted] = ResidentImage(image, wanted)
            return held[wanted].copy()

    def foreground(self, path: Path, kind: Literal["non-empty", "tissue"]) -> NDArray[np.bool_]:
        """The foreground mask of a file, made at the first call.

        Raises:
            ImageError: the file cannot be opened or read.
        """
        with self._lock_of(path):
            if (path, kind) not in self._masks:
                with open_image(path) as image:
                    self._masks[path, kind] = foreground(image, kind)
            return self._masks[path, kind]

    def _lock_of(self, path: Path) -> threading.Lock:
        """One image is read once, and a file that hangs holds up nobody who wants another."""
        with self._lock:
            return self._locks[path]
