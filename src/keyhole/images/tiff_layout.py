"""Where a TIFF keeps its pixels: the levels of its pyramid, how each is decoded, its scale and orientation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.geometry import Size, same_shape
from keyhole.images.pixels import DEEP, valid_orientation
from keyhole.images.scale import Scale, agreed
from keyhole.images.tiff_file import ShortTables, TileTable, check_segment, open_pages, page_size
from keyhole.images.tiff_jpeg import JpegTiles
from keyhole.images.tiff_metadata import (
    aperio_scale,
    bits_of_tags,
    check_imagej,
    check_ome,
    first_plane,
    imagej_scale,
    ome_pixels,
    ome_scale,
    resolution_scale,
    significant_bits,
)

_COMPRESSIONS = {
    # TIFF tag 259 -> whether a segment is a picture of its own, with a size of its own that must be checked.
    1: False,  # none
    2: False,  # CCITT, bilevel
    3: False,
    4: False,
    5: False,  # LZW
    7: True,  # JPEG
    8: False,  # Deflate
    32946: False,  # Deflate, older number
    32773: False,  # PackBits
    34712: True,  # JPEG 2000
    34925: False,  # LZMA
    50000: False,  # Zstd
    50001: True,  # WebP
}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6


@dataclass(frozen=True)
class TiffLevel:
    """One page: a table of segments (tiles, or strips as wide as the image) and how to decode one.

    Attributes:
        size: (width, height) as stored.
        segment: (width, height) of a tile or strip.
        offsets, counts: where the encoded segments lie; planes one after the other. A count of 0 is missing.
        planes: 1, or the number of samples where each colour is stored by itself.
        samples: samples that are read: those of the colour, and those up to alpha.
        stored: bits of a value.
        bits: how many of them are in use.
        says_bits: whether the file states how many are in use. Else `TiffImage.settle_bits` finds out.
        color: "grey", "inverted", "rgb", "palette" or "cmyk".
        alpha: kind of the last of `samples`: None, "straight" or "associated".
        palette: (2**bits, 3) uint8, for "palette".
        coded: "", or how the segment's own header states its size: "JPEG", "picture".
        decode: (bytes, index) -> (h, w, samples of a plane) of `stored` bits.
        jpeg: a quicker decoder for JPEG tiles of the usual kinds; None for all others.
    """

    size: Size
    segment: Size
    tiled: bool
    offsets: TileTable
    counts: TileTable
    planes: int
    samples: int
    stored: int
    bits: int
    says_bits: bool
    color: str
    alpha: str | None
    palette: NDArray[np.uint8] | None
    coded: str
    decode: Callable[[bytes, int], NDArray[Any]]
    jpeg: JpegTiles | None = None

    @property
    def channels(self) -> int:
        return 1 if self.color in ("grey", "inverted") else 3

    @property
    def colors(self) -> int:
        """Samples of the colour, which come before all others."""
        return {"rgb": 3, "cmyk": 4}.get(self.color, 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of segments."""
        return math.ceil(self.size.width / self.segment.width), math.ceil(self.size.height / self.segment.height)


@dataclass(frozen=True)
class TiffLayout:
    """What an opened TIFF is: levels largest first, microns per pixel, orientation, and what is not read of it."""

    levels: tuple[TiffLevel, ...]
    scale: Scale
    orientation: int
    note: str


def read_layout(path: Path) -> TiffLayout:
    """Levels, scale and orientation of a TIFF; ImageError for a kind that is not read says how to convert it."""
    with open_pages(path) as (tif, short):
        description = tif.pages.first.description
        ome = ome_pixels(description) if tif.pages.first.is_ome else None
        if ome is not None:
            check_ome(path, ome, tif.pages.first)
        elif tif.pages.first.is_imagej:
            check_imagej(path, description)
        main = tif.pages[first_plane(ome) if ome is not None else 0]
        pages = [main, *_reduced(tif, short, main)]
        stated = (significant_bits(ome) if ome is not None else None) or bits_of_tags(main)
        levels = tuple(_level(path, page, short, stated) for page in pages)
        for level, page in zip(levels, pages, strict=True):
            if level.channels != levels[0].channels:
                raise ImageError(path, f"page {page.index} has {level.channels} channels, level 0 has another number")
        if ome is None and tif.pages.first.is_imagej:
            scale = imagej_scale(description, main)
        else:
            scale = agreed(ome_scale(ome) if ome is not None else aperio_scale(description), resolution_scale(main))
        note = "" if main.subifds else _unread_note(tif, main, pages)
        return TiffLayout(levels, scale, valid_orientation(main.tags.valueof(274, 1)), note)


def _unread_note(tif: Any, main: Any, levels: Sequence[Any]) -> str:
    """What is not read of a file with further pictures; a slide's label, macro picture and thumbnail do not count."""
    read = {page.index for page in levels}
    others = [page for page in tif.pages if page.index not in read and not (page.subfiletype or 0) & 1]
    if not others or main.is_svs:
        return ""
    return f"of {len(tif.pages)} pages the {'first' if main.index == 0 else f'{main.index + 1}th'} is read"


def _reduced(tif: Any, short: ShortTables, main: Any) -> list[Any]:
    """The smaller copies of the page `main`, largest first: its SubIFDs, or else the pages behind it.

    Labels, macro pictures and thumbnails have other proportions, or (Aperio) are not tiled.
    """
    candidates = short.subpages(tif, main)
    if not main.subifds and len(tif.pages) > 1 and main.index == 0:
        candidates = [page for page in tif.pages if page.index != 0 and (page.is_tiled or (page.subfiletype & 1))]
        if main.is_tiled:
            candidates = [page for page in candidates if page.is_tiled]
    found, last = [], page_size(main)
    for page in sorted(candidates, key=lambda page: -page.imagewidth):
        size = page_size(page)
        alike = (page.samplesperpixel, page.bitspersample) == (main.samplesperpixel, main.bitspersample)
        if alike and min(size) > 0 and size.width < last.width and same_shape(page_size(main), size):
            found.append(page)
            last = size
    return found


def _level(path: Path, page: Any, short: ShortTables, stated: int | None) -> TiffLevel:
    """A tifffile page as a `TiffLevel`; `stated` are the bits in use, as the file states them."""
    size = page_size(page)
    segment = Size(page.tilewidth, page.tilelength) if page.is_tiled else Size(size.width, page.rowsperstrip)
    if min(size) < 1 or min(segment) < 1:
        raise ImageError(path, f"page {page.index} has a size of {tuple(size)}. Copy or export it again.")
    check_segment(path, segment)
    color, alpha, used = _color(path, page)
    planes = page.samplesperpixel if page.planarconfig == 2 and page.samplesperpixel > 1 else 1
    coded = _COMPRESSIONS[int(page.compression)]
    offsets, counts = short.tables(page)
    expected = math.ceil(size.width / segment.width) * math.ceil(size.height / segment.height) * planes
    listed = min(offsets.count, counts.count)
    if listed < expected:
        raise ImageError(path, f"page {page.index} lists {listed} of {expected} tiles or strips. Copy it again.")
    short.check_end(page)
    options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression == 7 else {}
    decode_page, stored = page.decode, page.bitspersample
    in_use = None if coded and stored <= 8 else stated  # a JPEG of 8 bits is what its decoder makes of it
    bits = stored if in_use is None else min(in_use, stored)

    def decode(data: bytes, index: int) -> NDArray[Any]:
        values: NDArray[Any] = decode_page(data, index, **options)[0][0]
        if values.dtype.itemsize != (1 if stored <= 8 else 2):
            raise ValueError(f"a segment of {values.dtype} where {stored} bits are declared")
        return values

    jpeg = JpegTiles(page, segment, used) if page.compression == 7 and alpha is None else None
    return TiffLevel(
        size=size,
        segment=segment,
        tiled=bool(page.is_tiled),
        offsets=offsets,
        counts=counts,
        planes=planes,
        samples=used,
        stored=stored,
        bits=stored if color == "palette" else bits,
        says_bits=in_use is not None or stored != DEEP,
        color=color,
        alpha=alpha,
        palette=_palette(path, page) if color == "palette" else None,
        coded="" if not coded else "JPEG" if page.compression == 7 else "picture",
        decode=decode,
        jpeg=jpeg if jpeg is not None and jpeg.plain else None,
    )


def _color(path: Path, page: Any) -> tuple[str, str | None, int]:
    """Colour kind, kind of alpha, and how many of the samples matter; refuses what is not a picture of 8 or 16 bits."""

    def refuse(what: str) -> ImageError:
        return ImageError(path, f"{what} is not read. Export it as 8-bit RGB or grey TIFF.")

    compression, photometric, samples, bits = (
        int(page.compression),
        int(page.photometric),
        int(page.samplesperpixel),
        page.bitspersample,
    )
    if compression not in _COMPRESSIONS:
        raise refuse(f"TIFF compression {getattr(page.compression, 'name', compression)} ({compression})")
    if not isinstance(bits, int) or not 1 <= bits <= 16 or int(page.sampleformat) not in (1, 4):
        kind = {2: "signed integers", 3: "floating point"}.get(page.sampleformat, "samples")
        raise refuse(f"{kind} of {bits} bits")
    if page.imagedepth != 1:
        raise refuse(f"a volume of {page.imagedepth} slices")
    colors = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}.get(photometric, 0)
    if colors == 0 or (photometric == _YCBCR and compression != 7):
        raise refuse(f"colour kind {getattr(page.photometric, 'name', photometric)} in this compression")
    if samples < colors or samples > colors + 2 or (colors == 1 and samples > 2):
        raise refuse(f"a page of {samples} channels (photometric {photometric})")
    extra = [int(kind) for kind in page.extrasamples[: samples - colors]]
    if not extra and samples == colors + 1:
        extra = [2]  # as Pillow takes a fourth sample beside red, green and blue that nobody describes
    at = next((number for number, kind in enumerate(extra) if kind in (1, 2)), None)
    alpha = None if at is None else "associated" if extra[at] == 1 and photometric != _PALETTE else "straight"
    if colors == 1 and samples == 2 and alpha is None:
        raise refuse("a page of 2 channels")
    if photometric == _PALETTE and page.colormap is None:
        raise ImageError(path, "a palette TIFF without its palette. Export it again.")
    if photometric in (_CMYK, _PALETTE) and bits > 8:
        raise refuse(f"palette or CMYK of {bits} bits")
    kinds = {_WHITE_IS_ZERO: "inverted", _BLACK_IS_ZERO: "grey", _PALETTE: "palette", _CMYK: "cmyk"}
    return kinds.get(photometric, "rgb"), alpha, colors if at is None else colors + at + 1


def _palette(path: Path, page: Any) -> NDArray[np.uint8]:
    """(2**bits, 3) uint8. Some writers put 8-bit values into the 16-bit table; then all are small."""
    table = np.asarray(page.colormap)
    if table.shape != (3, 2**page.bitspersample):
        raise ImageError(path, f"a palette of {table.shape} for {page.bitspersample} bits. Export it again.")
    # An 8-bit value v is written as 257 v, or as 256 v by Pillow and others: the highest eight bits are v in both.
    palette: NDArray[np.uint8] = (table >> 8 if table.max() > 255 else table).T.astype(np.uint8)
    return palette
