"""Whole-slide files through OpenSlide: the makers' formats that nothing faster reads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from keyhole.errors import ImageError
from keyhole.images.faults import faults_of, one_line
from keyhole.images.geometry import Box, Level, Size, downsample_of
from keyhole.images.image import Image, Pixels
from keyhole.images.pixels import on_white
from keyhole.images.tiff_checks import check_tiles, is_tiff, vendor_of

if TYPE_CHECKING:
    from openslide import OpenSlide

_SUFFIXES = frozenset({".mrxs", ".vms", ".vmu", ".svslide", ".czi", ".dcm"})


class OpenSlideImage(Image):
    """Every format of OpenSlide: Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss, DICOM, Aperio.

    Transparent parts, where the scanner saw nothing, become white. Where a level's downsample is not a whole number,
    OpenSlide places a region to the nearest level-0 pixel and blends: at most half a level-0 pixel off.

    Raises:
        ImageError: not a slide that OpenSlide reads, damaged, or with a tile of more than 64 Mpx.
    """

    priority: ClassVar[int] = 10

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(64)
        if is_tiff(head):
            check_tiles(path)  # libopenslide ends the process where an allocation fails
        self._lock = threading.Lock()
        self._slide: OpenSlide | None = self._open()
        with faults_of(path, "damaged slide"):
            sizes = [Size(*size) for size in self._slide.level_dimensions]
            self._downsamples = tuple(self._slide.level_downsamples)
            self.mpp = _mpp(self._slide.properties.get("openslide.mpp-x"))
        self.size = sizes[0]
        self.levels = tuple(Level(size, downsample_of(sizes[0], size)) for size in sizes)
        self.channels = 3

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        if is_tiff(head):  # of plain TIFF, what TiffImage refuses would come out wrong here, not better
            return vendor_of(path) is not None
        return bool(head) and path.suffix.lower() in _SUFFIXES

    def _open(self) -> OpenSlide:
        import openslide

        try:
            return openslide.OpenSlide(self.path)
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise ImageError(self.path, "not a slide that OpenSlide reads. Export it as a pyramidal TIFF.") from error
        except openslide.OpenSlideError as error:
            raise ImageError(self.path, f"damaged slide ({one_line(error)}). Copy it again.") from error

    def _read(self, box: Box, level: int) -> Pixels:
        import openslide

        l0_place = round(box.x * self._downsamples[level]), round(box.y * self._downsamples[level])
        # An error is final for a handle, also for other threads that share it: each tries once more on a new one.
        for last in (False, True):
            slide = self._slide
            if slide is None:
                raise ImageError(self.path, "read after it was closed")
            try:
                with faults_of(self.path, f"damaged at {tuple(box)} of level {level}"):
                    region = slide.read_region(l0_place, level, (box.width, box.height))
                    return on_white(np.asarray(region))
            except openslide.OpenSlideError as error:
                self._replace(slide)
                if last:
                    problem = f"damaged at {tuple(box)} of level {level} ({one_line(error)}). Copy it again."
                    raise ImageError(self.path, problem) from error
        raise AssertionError("not reached")

    def _replace(self, failed: OpenSlide) -> None:
        """A new handle in place of a failed one, which is closed once the last thread has left it."""
        with self._lock:
            if self._slide is failed:
                self._slide = self._open()

    def close(self) -> None:
        with self._lock:
            self._slide = None  # closed when the last thread has left it


def _mpp(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
