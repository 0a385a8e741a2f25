"""An image of any size as a source of rectangular regions, and `open_image` that finds the reader.

docs/adding-a-reader.md shows how to add a format.
"""

from __future__ import annotations

import functools
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ConfigError, ImageError, ImageLost
from keyhole.images.faults import one_line, raise_if_lost
from keyhole.images.geometry import Box, Level, Size, runs_of
from keyhole.images.pixels import Pixels as Pixels
from keyhole.images.pixels import place, settled_bits
from keyhole.util.threads import beat
from keyhole.util.wording import from_to

Uses = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""(left, top, right, bottom) of tiles in level pixels, each (k,), -> how many boxes of the whole pass touch each."""

GROUP = "keyhole.images"
"""Entry-point group that readers register under."""


class Image(ABC):
    """Pixels of one picture, at one or more resolutions. Safe to read from several threads.

    Attributes:
        path: the file, or a name for pixels in memory.
        size: (width, height) of level 0 in pixels, orientation obeyed.
        levels: level 0 first, then ever smaller ones; each with size and downsample.
        mpp: microns per level-0 pixel, or None where the file does not state them plausibly.
        mpp_note: "", or why `mpp` is None although the file states a value: "the file says 0.25 x 0.5 um per pixel".
        note: "", or which part of the file is not read: "of 3 pages the first is read".
        channels: 1 (grey) or 3 (RGB).
        bits: bits of a stored value that are in use: 8, or those from which values are scaled to 8.
        background: value of pixels outside the image.
        qupath_origin: level-0 x, y from which QuPath counts: the corner of the bounds that a slide states.
        held_pixels: pixels of level 0 that stay in memory from the first read until the image is closed.

    Examples:
        >>> import numpy as np
        >>> from keyhole.images import ArrayImage
        >>> with ArrayImage(np.zeros((96, 144, 3), np.uint8)) as image:
        ...     image.size, image.read((140, 90, 10, 10)).shape
        (Size(width=144, height=96), (10, 10, 3))
    """

    priority: ClassVar[int] = 0
    """The reader with the highest priority among those that claim a file is tried first."""
    suffixes: ClassVar[frozenset[str]] = frozenset()
    """Suffixes in lower case by which files of this format are found in a folder."""
    folder_suffixes: ClassVar[frozenset[str]] = frozenset()
    """The same for folders that are one image each."""

    path: Path
    size: Size
    levels: tuple[Level, ...]
    mpp: float | None = None
    mpp_note: str = ""
    note: str = ""
    channels: int = 3
    bits: int = 8
    background: int = 255
    qupath_origin: tuple[int, int] = (0, 0)
    held_pixels: int = 0
    _says_bits: bool = True

    @classmethod
    @abstractmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        """Tell whether this reader is for a file; `head` are its first 64 bytes (none for a folder).

        Returns:
            True if `open_image` is to try this reader. Never raises.
        """

    @abstractmethod
    def _read(self, box: Box, level: int) -> Pixels:
        """Return pixels (h, w, c) uint8 of a box that lies wholly inside the level."""

    def settle_bits(self, given: int | None) -> None:
        """Decide how many bits of a stored value are in use (`given` by the user, or None) before anything is read.

        Raises BitsUnknown if neither the user nor the file states it, and the values do not show it.
        """
        if not self._says_bits:
            self.bits = settled_bits(self.path, given, self._values())

    def _values(self) -> Iterable[NDArray[Any]]:
        """Return the colours as they are stored, in parts; only asked for if the file does not state its bits."""
        return ()

    def read(self, box: Box | tuple[int, int, int, int], level: int = 0) -> Pixels:
        """Read the pixels of a box. Those outside the image have the value `background`.

        Args:
            box: x, y, width, height in pixels of `level`; may reach over the border.
            level: index into `levels`.

        Returns:
            Pixels, (h, w, c) uint8.

        Raises:
            ImageError: the file is damaged there. Every other box can still be read.
            ImageLost: the file cannot be reached; the same box may be read later.
            ValueError: there is no such level, or the box has no area.
            TypeError: the reader has a fault: its `_read` returned something else.
        """
        box = Box(*box)
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level (={level}) must be in {from_to('0', str(len(self.levels) - 1), ' ... ')}")
        if box.width < 1 or box.height < 1:
            raise ValueError(f"box (={tuple(box)}) must have a width and height of at least 1")
        lv_width, lv_height = self.levels[level].size
        left, top = max(box.x, 0), max(box.y, 0)
        right, bottom = min(box.x + box.width, lv_width), min(box.y + box.height, lv_height)
        if (left, top, right - left, bottom - top) == box:
            return self._checked(box, level)
        out = np.full((box.height, box.width, self.channels), self.background, np.uint8)
        if left < right and top < bottom:
            inside = self._checked(Box(left, top, right - left, bottom - top), level)
            out[top - box.y : bottom - box.y, left - box.x : right - box.x] = inside
        return out

    def _checked(self, box: Box, level: int) -> Pixels:
        """Return what `_read` does; TypeError if that is not what every reader has to return."""
        pixels, expected = self._read(box, level), (box.height, box.width, self.channels)
        if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == expected:
            return pixels
        came = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else str(type(pixels))
        error = TypeError(
            f"`_read` of the reader {type(self).__name__} returned {came} for the box {tuple(box)} of level {level}, "
            f"expected uint8 {expected}. Correct the reader: docs/adding-a-reader.md"
        )
        error.add_note(f"The image is {self.path}.")  # not in the message: `keyhole check` groups equal ones
        raise error

    def read_boxes(self, boxes: Sequence[Box], level: int, out: Sequence[Pixels], uses: Uses | None = None) -> None:
        """Write the pixels of many boxes. Each tile is decoded once; without tiles, neighbours are read together.

        Args:
            boxes: in pixels of `level`, with area, in raster order; may reach over the border.
            level: index into `levels`.
            out: a target (h, w, c) for each box; views of any strides.
            uses: if this is one of many calls of a pass, returns how many boxes of the pass touch each tile.
        """
        alone = ((row, row + 1, box) for row, box in enumerate(boxes))
        for start, stop, around in runs_of(boxes) if self.in_memory(level) is None else alone:
            region = self.read(around, level)
            for box, target in zip(boxes[start:stop], out[start:stop], strict=True):
                left, top = box.x - around.x, box.y - around.y
                place(target, region[top : top + box.height, left : left + box.width])
            beat()

    def in_memory(self, level: int) -> Pixels | None:
        """Return the pixels of a level that is in memory, so that reading only copies.

        Returns:
            (h, w, c) uint8, not to be written to; None where they are not in memory.
        """
        return None

    def jpeg_tiling(self, level: int) -> Size | None:
        """Tell whether `jpeg_tiles` returns the tiles of a level, for a decoder on another device.

        Returns:
            The size of a tile, or None.
        """
        return None

    def jpeg_tiles(self, cells: NDArray[np.int64], level: int, colors: Container[str]) -> list[bytes | None]:
        """Return tiles as JPEG files, which any decoder decodes to the pixels that `read` returns.

        Args:
            cells: (k, 2) column and row of each tile, in any order.
            level: one that has a `jpeg_tiling`.
            colors: accepted meanings of the samples, of "grey", "rgb" and "ycbcr".

        Returns:
            (k) files; None for a tile that is missing, damaged, of other colours, or reaches over the image.
        """
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 - most readers hold nothing
        """Release what the reader holds open. Reading afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Return for example `TiffImage('slide.svs', 46000 x 32914 px, 3 levels, 0.499 um per pixel)`."""
        facts = [f"{self.size.width} x {self.size.height} px"]
        facts += [f"{len(self.levels)} levels"] if len(self.levels) > 1 else []
        facts += [f"{self.mpp:.4g} um per pixel"] if self.mpp is not None else []
        return f"{type(self).__name__}({str(self.path)!r}, {', '.join(facts)})"


class ArrayImage(Image):
    """An image that is already in memory.

    Args:
        pixels: (h, w, c) or (h, w) uint8, c = 1 or 3.
        name: for messages.
        mpp: microns per pixel, if known.
    """

    def __init__(self, pixels: Pixels, name: str | Path = "array", mpp: float | None = None) -> None:
        if pixels.dtype != np.uint8:
            raise ValueError(f"pixels must be uint8, not {pixels.dtype}")
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
            raise ValueError(f"pixels must be (h, w), (h, w, 1) or (h, w, 3), not {pixels.shape}")
        self.pixels, self.path, self.mpp = pixels, Path(name), mpp
        self.size, self.channels = Size(pixels.shape[1], pixels.shape[0]), pixels.shape[2]
        self.levels = (Level(self.size, 1.0),)

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        return False

    def in_memory(self, level: int) -> Pixels | None:
        return self.pixels

    def _read(self, box: Box, level: int) -> Pixels:
        return self.pixels[box.y : box.y + box.height, box.x : box.x + box.width]


def open_image(path: str | Path, bits: int | None = None) -> Image:
    """Open an image file, or the folder of an OME-Zarr.

    The readers that claim the file by `sniff` are tried, highest `priority` first; the first that opens it reads it.

    Args:
        path: the file or folder.
        bits: bits in use of a 16-bit value, where the file does not state it.

    Returns:
        The open image. Close it, or use it in a `with` statement.

    Raises:
        BitsUnknown: a picture of 16 bits a value that does not state how many are in use.
        ImageLost: there is no such file, or its disk or share does not answer.
        ImageError: not a regular file, empty, no permission, damaged, or of a kind that no reader knows.

    Examples:
        >>> import numpy as np
        >>> from PIL import Image as Picture
        >>> Picture.fromarray(np.zeros((96, 144, 3), np.uint8)).save("black.png")
        >>> from keyhole import open_image
        >>> with open_image("black.png") as image:
        ...     image.size, image.channels, image.mpp, image.read((0, 0, 32, 16)).shape
        (Size(width=144, height=96), 3, None, (16, 32, 3))
    """
    path = Path(path)
    head = _head(path)
    first: ImageError | None = None
    for reader in readers():
        if reader.sniff(path, head):
            try:
                image = reader(path)  # type: ignore[call-arg]
                try:
                    image.settle_bits(bits)
                except BaseException:
                    image.close()
                    raise
                return image
            except ImageLost:
                raise
            except ImageError as error:
                first = first or error
            except OSError as error:
                raise_if_lost(path, error)
                first = first or ImageError(path, f"cannot be read ({one_line(error)})")
    raise first or ImageError(path, _why_unread(path, head))


@functools.cache
def readers() -> tuple[type[Image], ...]:
    """Return the registered readers, highest priority first; ConfigError if one cannot be imported."""
    found: list[type[Image]] = []
    for entry in metadata.entry_points(group=GROUP):
        try:
            found.append(entry.load())
        except (ImportError, AttributeError) as error:
            problem = f"the image reader {entry.name} ({entry.value}) cannot be imported: {one_line(error)}."
            raise ConfigError(f"{problem} Reinstall the package that provides it, or uninstall it.") from error
    return tuple(sorted(found, key=lambda reader: -reader.priority))


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of files and folders that are images, as the readers declare them."""
    return frozenset(suffix for reader in readers() for suffix in reader.suffixes | reader.folder_suffixes)


def folder_suffixes() -> frozenset[str]:
    return frozenset(suffix for reader in readers() for suffix in reader.folder_suffixes)


def _head(path: Path) -> bytes:
    """Return the first 64 bytes of a regular file, none for a folder. Opening a FIFO would wait."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return b""
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "not a regular file but a pipe, socket or device. Copy the image to a file.")
        if status.st_size == 0:
            raise ImageError(path, "the file is empty (0 bytes). Copy it again.")
        with path.open("rb") as file:
            return file.read(64)
    except PermissionError as error:
        raise ImageError(path, "no permission to read it. Change its permissions or owner.") from error
    except (OSError, ValueError) as error:
        raise_if_lost(path, error)
        raise ImageError(path, f"cannot be read ({one_line(error)})") from error


_OTHER_KINDS = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive (of a zipped OME-Zarr, unpack the folder)",
    b"\x1f\x8b": "gzip data",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"<!DOCTYPE": "a web page or XML",
    b"<html": "a web page",
    b"<?xml": "XML",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}


def _why_unread(path: Path, head: bytes) -> str:
    names = ", ".join(sorted({reader.__name__ for reader in readers()})) or "none: install keyhole with pip"
    if not head:
        return f"a folder, neither an image file nor OME-Zarr. Name the file inside (readers: {names})."
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if head.lower().startswith(magic.lower())), None)
    if kind is None and all(byte in b"\t\n\r" or byte >= 32 for byte in head) and b"\x7f" not in head:
        kind = f"text ({' '.join(head.decode(errors='replace').split())[:24]!r} ...)"
    if kind is None:
        kind = f"data of unknown kind (starts with {head[:8].hex(' ')})"
    name = f", although it is named {path.suffix}" if path.suffix else ""
    return f"holds {kind}{name}; no reader knows it ({names}). Put the image itself there, or convert it."
