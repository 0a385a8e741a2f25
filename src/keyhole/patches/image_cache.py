"""Decoded images that stay in memory when they fit; one rule decides."""

from __future__ import annotations

import copy
import os
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError, ImageLost
from keyhole.images.geometry import Box
from keyhole.images.image import ArrayImage, Image, open_image
from keyhole.images.pixels import Pixels
from keyhole.patches.foreground.mask import foreground
from keyhole.patches.foreground.masks import read_mask
from keyhole.util.budget import memory_text
from keyhole.util.threads import beat

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
        why = f"a quarter of the {memory_text(free)} free"
    elif limit_gb == 0:
        return (
            False,
            f"images are read from their files each time, as data.cache 0 asks: {memory_text(total_bytes)} decoded",
        )
    else:
        limit = limit_gb * 1e9
        why = "data.cache"
    keep = limit > 0 and total_bytes <= limit
    verdict = "stay in memory" if keep else "are read from their files each time"
    relation = "within" if keep else "over"
    return keep, (
        f"images {verdict}: {memory_text(total_bytes)} decoded, {relation} the limit of {memory_text(round(limit))} "
        f"({why})"
    )


class ResidentImage(Image):
    """One level of an image in memory; it describes itself as the file does. Other levels come from the file.

    Args:
        image: the open file; read whole here and not used afterwards.
        level: the level to hold.
        bits: as in `open_image`, for the other levels.

    Raises:
        ImageError: the file is damaged.
    """

    def __init__(self, image: Image, level: int, bits: int | None = None) -> None:
        self.path, self.size, self.levels, self.mpp = image.path, image.size, image.levels, image.mpp
        self.channels, self.background, self.mpp_note = image.channels, image.background, image.mpp_note
        self.note, self.bits, self.qupath_origin = image.note, image.bits, image.qupath_origin
        self.level, self._given_bits = level, bits
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
            with open_image(self.path, self._given_bits) as image:
                return image.read(box, level)
        return self._pixels[box.y : box.y + box.height, box.x : box.x + box.width]


Key = tuple[Path, str, Path | None]
"""Key of a mask: the image, the kind, and the mask's own file where it has one."""


class Masks:
    """Foreground masks by file and kind, each made once; packed, so that those of a thousand slides may stay.

    A mask of 2048 x 2048 cells takes 4 MB as an array, and 5 to 60 kB here (at worst 0.5 MB); unpacking it takes some
    milliseconds, once each time its image is opened.
    """

    def __init__(self) -> None:
        self._packed: dict[Key, tuple[tuple[int, int], bytes]] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._packed

    def __getitem__(self, key: Key) -> NDArray[np.bool_]:
        shape, packed = self._packed[key]
        bits = np.frombuffer(zlib.decompress(packed), np.uint8)
        return np.unpackbits(bits, count=shape[0] * shape[1]).view(bool).reshape(shape)

    def __setitem__(self, key: Key, mask: NDArray[np.bool_]) -> None:
        rows, columns = mask.shape
        self._packed[key] = (rows, columns), zlib.compress(np.packbits(mask).tobytes(), level=1)

    @property
    def nbytes(self) -> int:
        """Memory that the masks take."""
        return sum(len(packed) for _, packed in self._packed.values())


class ImageStore:
    """Opens images, from their files each time or, with `keep`, once and then from memory. Thread-safe.

    Args:
        keep: whether decoded images stay in memory.
        masks: those of another store, so that no mask is made twice in a run; they are kept in either case.
    """

    def __init__(self, keep: bool, masks: Masks | None = None) -> None:
        self.keep = keep
        self.masks = Masks() if masks is None else masks
        self._lock = threading.Lock()
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._damaged: set[Path] = set()
        self._resident: defaultdict[Path, dict[int, ResidentImage]] = defaultdict(dict)

    def open(self, path: Path, level: int | Callable[[Image], int] = 0, bits: int | None = None) -> Image:
        """An image for the caller to close.

        Args:
            path: the file.
            level: the level that will be read, or a function that tells it from the image.
            bits: as in `open_image`; the same at every call.

        Raises:
            ImageError: the file cannot be opened. One that is damaged somewhere is not kept, so that what is not
                damaged can be read from it.
        """
        if not self.keep or path in self._damaged:
            return self._file(path, bits)
        with self._lock_of(path):
            held = self._resident[path]
            known = next(iter(held.values()), None)
            wanted = level if isinstance(level, int) else None if known is None else level(known)
            if wanted not in held:
                with self._file(path, bits) as image:
                    wanted = level if isinstance(level, int) else level(image)
                    try:
                        held[wanted] = ResidentImage(image, wanted, bits)
                    except ImageLost:
                        raise
                    except ImageError:
                        self._damaged.add(path)
                        return self._file(path, bits)
            return held[wanted].copy()

    def _file(self, path: Path, bits: int | None) -> Image:
        """The image as it is stored."""
        return open_image(path, bits)

    def foreground(
        self,
        path: Path,
        kind: Literal["non-empty", "tissue", "mask"],
        mask: Path | None = None,
        bits: int | None = None,
    ) -> NDArray[np.bool_]:
        """The foreground mask (rows, cols) of an image, made at the first call; later ones read no file.

        Args:
            path: the image.
            kind: as in `config.PatchConfig`.
            mask: the file of the mask, for the kind `mask` and no other.
            bits: as in `open`.

        Raises:
            ImageError: the image or the mask cannot be opened or read.
        """
        key = path, kind, mask
        with self._lock_of(path):
            if key not in self.masks:
                with self._file(path, bits) as image:
                    if kind == "mask":
                        assert mask is not None
                        self.masks[key] = read_mask(mask, image.size, origin=image.qupath_origin)
                    else:
                        self.masks[key] = foreground(image, kind)
            return self.masks[key]

    def _lock_of(self, path: Path) -> threading.Lock:
        """One image is read once, and a file that hangs holds up nobody who wants another."""
        with self._lock:
            return self._locks[path]


class MemoryStore(ImageStore):
    """A store of one image that is in memory; paths are only its name.

    Args:
        image: what `open` gives copies of, so that who changes the `mpp` of one changes no other.
    """

    def __init__(self, image: ArrayImage) -> None:
        super().__init__(keep=False)
        self.image = image

    def _file(self, path: Path, bits: int | None) -> Image:
        return copy.copy(self.image)
