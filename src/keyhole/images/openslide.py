"""Whole-slide files through OpenSlide: formats of makers that no faster reader reads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from keyhole.errors import ImageError
from keyhole.images.faults import check_reachable, faults_of, one_line
from keyhole.images.geometry import Box, Level, Size, downsample_of, same_shape
from keyhole.images.image import Image, Pixels
from keyhole.images.pixels import on_white
from keyhole.images.scale import Scale, agreed, plausible_scale
from keyhole.images.tiff_file import TIFF_MAGIC, check_segment, check_tiles, vendor_of
from keyhole.images.tiff_layout import per_length

if TYPE_CHECKING:
    from openslide import OpenSlide, OpenSlideCache

CACHE_BYTES = 32 * 2**20
"""Decoded tiles that OpenSlide keeps for the whole process."""
_SUFFIXES = frozenset({".mrxs", ".vms", ".vmu", ".svslide", ".czi", ".dcm"})


class OpenSlideImage(Image):
    """Every format of OpenSlide: Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, Zeiss, DICOM, Aperio.

    `TiffImage` reads plain TIFF, OME-TIFF and Aperio SVS (JPEG) about three times as fast, and its handle survives
    errors. Parts that were not scanned become white. If a level's downsample is not a whole number, OpenSlide moves a
    region to the nearest level-0 pixel and blends. `mpp` is the value that the maker states.
    """

    priority: ClassVar[int] = 10
    suffixes: ClassVar[frozenset[str]] = _SUFFIXES | {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif"}

    def __init__(self, path: Path) -> None:
        self.path = path
        with faults_of(path, "damaged slide"), path.open("rb") as file:
            head = file.read(64)
        # libopenslide ends the process if an allocation fails, and keeps the highest eight bits of 16
        depth = check_tiles(path) if head[:4] in TIFF_MAGIC else 1
        self._lock = threading.Lock()
        slide = self._open()
        with faults_of(path, "damaged slide"):
            properties = dict(slide.properties)
            sizes = [Size(*size) for size in slide.level_dimensions]
            downsamples = slide.level_downsamples
            for level in range(len(sizes)):  # a tile is decoded whole, TIFF or not
                sides = [properties.get(f"openslide.level[{level}].tile-{side}", "") for side in ("width", "height")]
                if all(side.isdigit() for side in sides):
                    check_segment(path, Size(int(sides[0]), int(sides[1])))
            self.mpp, self.mpp_note = _scale(properties)
            x, y = (properties.get(f"openslide.bounds-{axis}", "0") for axis in "xy")
            self.qupath_origin = (int(x), int(y)) if x.isdigit() and y.isdigit() else (0, 0)
            self.note = planes(properties, depth)
            check_bits(path, properties)
        self._numbers = [k for k, size in enumerate(sizes) if k == 0 or same_shape(sizes[0], size)]  # OpenSlide's
        self._downsamples = [downsamples[k] for k in self._numbers]
        self.size, self.channels = sizes[0], 3
        self.levels = tuple(Level(sizes[k], downsample_of(sizes[0], sizes[k])) for k in self._numbers)
        self._slide: OpenSlide | None = slide

    @classmethod
    def sniff(cls, path: Path, head: bytes) -> bool:
        if head[:4] in TIFF_MAGIC:  # a plain TIFF that TiffImage refuses would be decoded wrongly here
            return vendor_of(path) is not None
        return bool(head) and path.suffix.lower() in _SUFFIXES

    def _open(self) -> OpenSlide:
        import openslide

        try:
            slide = openslide.OpenSlide(self.path)
            slide.set_cache(_cache())
            return slide
        except openslide.OpenSlideError as error:
            check_reachable(self.path, str(error))
            problem = f"damaged slide ({one_line(error)}). Copy it again."
            if isinstance(error, openslide.OpenSlideUnsupportedFormatError):
                problem = "not a slide that OpenSlide reads. Export it as a pyramidal TIFF."
            raise ImageError(self.path, problem) from error

    def _read(self, box: Box, level: int) -> Pixels:
        import openslide

        if (shared := self._slide) is None:
            raise ImageError(self.path, "read after it was closed")
        try:
            return self._region(shared, box, level)
        except openslide.OpenSlideError:
            # The handle is lost, perhaps through a read of another thread: try again with one that is not shared.
            own = self._open()
        try:
            pixels = self._region(own, box, level)
        except openslide.OpenSlideError as error:
            own.close()
            self._replace(shared, None)
            check_reachable(self.path, str(error))
            problem = f"damaged at {tuple(box)} of level {level} ({one_line(error)}). Copy it again."
            raise ImageError(self.path, problem) from error
        self._replace(shared, own)
        return pixels

    def _region(self, slide: OpenSlide, box: Box, level: int) -> Pixels:
        l0_place = round(box.x * self._downsamples[level]), round(box.y * self._downsamples[level])
        with faults_of(self.path, f"damaged at {tuple(box)} of level {level}"):
            region = slide.read_region(l0_place, self._numbers[level], (box.width, box.height))
            return on_white(np.asarray(region))

    def _replace(self, failed: OpenSlide, sound: OpenSlide | None) -> None:
        """Replace a failed handle, which is closed when no thread uses it any more."""
        with self._lock:
            if self._slide is failed:
                self._slide = sound if sound is not None else self._open()

    def close(self) -> None:
        with self._lock:
            self._slide = None  # closed when no thread uses it any more


@functools.cache
def _cache() -> OpenSlideCache:
    """Return the only cache of the process, so that memory does not grow with the number of open slides."""
    import openslide

    return openslide.OpenSlideCache(CACHE_BYTES)


def planes(properties: Mapping[str, str], depth: int) -> str:
    """Return a note on a slide of several planes (`depth`, or Zeiss's) or time points, of which OpenSlide reads one."""
    counts = {axis: properties.get(f"zeiss.Information.Image.Size{axis.upper()}", "1") for axis in "zt"}
    counts["z"] = str(depth) if depth > 1 else counts["z"]
    many = [f"{count} along {axis}" for axis, count in counts.items() if count.isdigit() and int(count) > 1]
    return f"a stack of pictures ({', '.join(many)}), of which one is read" if many else ""


def check_bits(path: Path, properties: Mapping[str, str]) -> None:
    """Refuse a Zeiss slide that uses fewer than 16 bits of a value, since OpenSlide keeps the highest eight."""
    kind = properties.get("zeiss.Information.Image.PixelType", "").lower()
    bits = properties.get("zeiss.Information.Image.ComponentBitCount", "16")
    if kind == "bgr48" and bits != "16":
        raise ImageError(path, f"16 bits a value, of which {bits} are in use, would be nearly black. Export it with 8.")


def _scale(properties: Mapping[str, str]) -> Scale:
    scale = plausible_scale(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))
    if properties.get("openslide.vendor") != "aperio":
        return scale
    unit = {"inch": 2, "centimeter": 3}.get(properties.get("tiff.ResolutionUnit", "inch"), 0)
    try:
        x, y = (float(properties[f"tiff.{axis}Resolution"]) for axis in "XY")
    except (KeyError, ValueError):
        return scale
    return agreed(scale, per_length(unit, x, y))
