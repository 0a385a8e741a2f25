"""Where a TIFF keeps its pixels: the levels of its pyramid, how each is decoded, its scale and orientation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import not_one_picture
from keyhole.images.geometry import Size, same_shape
from keyhole.images.jpeg import JpegTiles
from keyhole.images.pixels import DEEP, bits_of_largest, valid_orientation
from keyhole.images.scale import TO_MICRONS, Scale, agreed, plausible_scale
from keyhole.images.tiff_file import ShortTables, TileTable, check_segment, open_pages

_JPEG = 7
_PICTURES = {_JPEG: "JPEG", 34712: "picture", 50001: "picture"}  # segments with a size of their own: JPEG 2000, WebP
_PLAIN = {1, 2, 3, 4, 5, 8, 32946, 32773, 34925, 50000}  # none, CCITT, LZW, Deflate, PackBits, LZMA, Zstd
_MICROSCOPE_MPP = 0.05, 20.0
"""Microns per pixel of a resolution tag that can be a microscope's: any program writes 72 or 300 dpi."""
_YCBCR = 6
_COLORS = {0: ("inverted", 1), 1: ("grey", 1), 2: ("rgb", 3), 3: ("palette", 1), 5: ("cmyk", 4), _YCBCR: ("rgb", 3)}


@dataclass(frozen=True)
class TiffLevel:
    """One page: a table of segments (tiles, or strips as wide as the image) and how to decode one."""

    size: Size  # as stored
    segment: Size  # a tile or strip
    tiled: bool
    offsets: TileTable  # planes one after the other
    counts: TileTable  # 0 is missing
    planes: int  # 1, or the number of samples where each colour is stored by itself
    samples: int  # those of the colour, and those up to alpha
    stored: int  # bits of a value
    bits: int  # how many of them are in use
    says_bits: bool  # whether the file states how many are in use; else `TiffImage.settle_bits` finds out
    color: str  # "grey", "inverted", "rgb", "palette" or "cmyk"
    alpha: str | None  # of the last of `samples`: "straight" or "associated"
    palette: NDArray[np.uint8] | None  # (2**bits, 3)
    coded: str  # "", or how the segment's own header states its size: "JPEG", "picture"
    decode: Callable[[bytes, int], NDArray[Any]]  # (bytes, index) -> (h, w, samples of a plane) of `stored` bits
    jpeg: JpegTiles | None = None  # a quicker decoder for JPEG tiles of the usual kinds

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


class TiffLayout(NamedTuple):
    """What an opened TIFF is: levels largest first, microns per pixel, orientation, and what is not read of it."""

    levels: tuple[TiffLevel, ...]
    scale: Scale
    orientation: int
    note: str


def read_layout(path: Path) -> TiffLayout:
    """Levels, scale and orientation of a TIFF; ImageError for a kind that is not read says how to convert it."""
    with open_pages(path) as (tif, short):
        first = main = tif.pages[0]
        stated: int | None = None
        ome = ome_pixels(first.description) if first.is_ome else None
        if ome is not None:
            _check_ome(path, ome, first)
            data = ome.find("{*}TiffData")
            main, stated = tif.pages[int(data.get("IFD", "0")) if data is not None else 0], _significant_bits(ome)
            scale = agreed(_ome_scale(ome), _resolution_scale(main))
        elif main.is_imagej:
            _check_imagej(path, main.description)
            scale = _imagej_scale(main.description, main)
        else:
            scale = agreed(_aperio_scale(main.description), _resolution_scale(main))
        if stated is None and main.bitspersample == DEEP and (largest := main.tags.valueof(281)) is not None:
            stated = bits_of_largest(float(np.max(largest)))
        pages = _pyramid(tif, short, main)
        levels = tuple(_level(path, page, short, stated) for page in pages)
        for level, page in zip(levels, pages, strict=True):
            if level.channels != levels[0].channels:
                raise ImageError(path, f"page {page.index} has {level.channels} channels, level 0 has another number")
        read = {page.index for page in pages}
        others = (page.index not in read and not (page.subfiletype or 0) & 1 for page in tif.pages)
        note = ""  # a slide's label, macro picture and thumbnail do not count
        if not (main.subifds or main.is_svs) and any(others):
            place = "first" if main.index == 0 else f"{main.index + 1}th"
            note = f"of {len(tif.pages)} pages the {place} is read"
        return TiffLayout(levels, scale, valid_orientation(main.tags.valueof(274, 1)), note)


def _size_of(page: Any) -> Size:
    return Size(int(page.imagewidth), int(page.imagelength))


def _pyramid(tif: Any, short: ShortTables, main: Any) -> list[Any]:
    """The page `main` and its smaller copies, largest first: its SubIFDs, or else the pages behind it.

    Labels, macro pictures and thumbnails have other proportions, or (Aperio) are not tiled.
    """
    import tifffile

    candidates = []
    for number, offset in enumerate((main.subifds or ())[:64]):
        short.shorten(offset)
        tif.filehandle.seek(offset)
        candidates.append(tifffile.TiffPage(tif, (main.index, number)))
    if not main.subifds and main.index == 0 and len(tif.pages) > 1:  # counting them finds where a cut chain ends
        candidates = [page for page in tif.pages if page.is_tiled or (not main.is_tiled and page.subfiletype & 1)]
    found = [main]
    for page in sorted(candidates, key=lambda page: -page.imagewidth):
        alike = (page.samplesperpixel, page.bitspersample) == (main.samplesperpixel, main.bitspersample)
        narrower = 0 < page.imagewidth < found[-1].imagewidth
        if alike and narrower and same_shape(_size_of(main), _size_of(page)):
            found.append(page)
    return found


def _level(path: Path, page: Any, short: ShortTables, stated: int | None) -> TiffLevel:
    """A tifffile page as a `TiffLevel`; `stated` are the bits in use, as the file states them."""
    size = _size_of(page)
    segment = Size(page.tilewidth, page.tilelength) if page.is_tiled else Size(size.width, page.rowsperstrip)
    if min(size) < 1 or min(segment) < 1:
        raise ImageError(path, f"page {page.index} has a size of {tuple(size)}. Copy or export it again.")
    check_segment(path, segment)
    color, alpha, used = _color(path, page)
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    coded = _PICTURES.get(int(page.compression), "")
    offsets, counts = short.tables(page)
    expected = math.ceil(size.width / segment.width) * math.ceil(size.height / segment.height) * planes
    listed = min(offsets.count, counts.count)
    if listed < expected:
        raise ImageError(path, f"page {page.index} lists {listed} of {expected} tiles or strips. Copy it again.")
    options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression == _JPEG else {}
    decode_page, stored = page.decode, page.bitspersample
    in_use = None if coded and stored <= 8 else stated  # a JPEG of 8 bits is what its decoder makes of it
    bits = stored if in_use is None else min(in_use, stored)

    def decode(data: bytes, index: int) -> NDArray[Any]:
        values: NDArray[Any] = decode_page(data, index, **options)[0][0]
        if values.dtype.itemsize != (1 if stored <= 8 else 2):
            raise ValueError(f"a segment of {values.dtype} where {stored} bits are declared")
        return values

    jpeg = JpegTiles(page, segment, used) if page.compression == _JPEG and alpha is None else None
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
        coded=coded,
        decode=decode,
        jpeg=jpeg if jpeg is not None and jpeg.plain else None,
    )


def _color(path: Path, page: Any) -> tuple[str, str | None, int]:
    """Colour kind, kind of alpha, and how many of the samples matter; refuses what is not a picture of 8 or 16 bits."""

    def refuse(what: str) -> ImageError:
        return ImageError(path, f"{what} is not read. Export it as 8-bit RGB or grey TIFF.")

    compression, photometric, samples = int(page.compression), int(page.photometric), int(page.samplesperpixel)
    bits = page.bitspersample
    if compression not in _PLAIN and compression not in _PICTURES:
        raise refuse(f"TIFF compression {getattr(page.compression, 'name', compression)} ({compression})")
    if not isinstance(bits, int) or not 1 <= bits <= 16 or int(page.sampleformat) not in (1, 4):
        kind = {2: "signed integers", 3: "floating point"}.get(page.sampleformat, "samples")
        raise refuse(f"{kind} of {bits} bits")
    if page.imagedepth != 1:
        raise refuse(f"a volume of {page.imagedepth} slices")
    color, colors = _COLORS.get(photometric, ("", 0))
    if colors == 0 or (photometric == _YCBCR and compression != _JPEG):
        raise refuse(f"colour kind {getattr(page.photometric, 'name', photometric)} in this compression")
    if samples < colors or samples > colors + 2 or (colors == 1 and samples > 2):
        raise refuse(f"a page of {samples} channels (photometric {photometric})")
    extra = [int(kind) for kind in page.extrasamples[: samples - colors]]
    if not extra and samples == colors + 1:
        extra = [2]  # as Pillow takes a fourth sample beside red, green and blue that nobody describes
    at = next((number for number, kind in enumerate(extra) if kind in (1, 2)), None)
    alpha = None if at is None else "associated" if extra[at] == 1 and color != "palette" else "straight"
    if colors == 1 and samples == 2 and alpha is None:
        raise refuse("a page of 2 channels")
    if color == "palette" and page.colormap is None:
        raise ImageError(path, "a palette TIFF without its palette. Export it again.")
    if color in ("cmyk", "palette") and bits > 8:
        raise refuse(f"palette or CMYK of {bits} bits")
    return color, alpha, colors if at is None else colors + at + 1


def _palette(path: Path, page: Any) -> NDArray[np.uint8]:
    """(2**bits, 3) uint8. Some writers put 8-bit values into the 16-bit table; then all are small."""
    table = np.asarray(page.colormap)
    if table.shape != (3, 2**page.bitspersample):
        raise ImageError(path, f"a palette of {table.shape} for {page.bitspersample} bits. Export it again.")
    # An 8-bit value v is written as 257 v, or as 256 v by Pillow and others: the highest eight bits are v in both.
    return np.asarray((table >> 8 if table.max() > 255 else table).T, np.uint8)


def ome_pixels(description: str) -> ElementTree.Element | None:
    """The <Pixels> of the first image of OME-XML; None where the XML is not usable."""
    if "<!DOCTYPE" in description or "<!ENTITY" in description:
        return None
    try:
        return ElementTree.fromstring(description).find("{*}Image/{*}Pixels")
    except (ElementTree.ParseError, ValueError):
        return None


def _check_ome(path: Path, pixels: ElementTree.Element, page: Any) -> None:
    """Refuse an OME-TIFF whose first image is a stack of channels, planes or time points."""
    lengths = {axis: int(pixels.get(f"Size{axis.upper()}", "1")) for axis in "czt"}
    if lengths["c"] <= page.samplesperpixel:
        del lengths["c"]
    if many := {axis: length for axis, length in lengths.items() if length > 1}:
        raise not_one_picture(path, many)


def _significant_bits(pixels: ElementTree.Element) -> int | None:
    """SignificantBits; None where they are not fewer than are stored: writers put the bits of the type there."""
    stated = pixels.get("SignificantBits", "")
    in_file = {"bit": 1, "uint8": 8, "uint16": 16}.get(pixels.get("Type", ""), 0)
    return int(stated) if stated.isdigit() and 0 < int(stated) < in_file else None


def _ome_scale(pixels: ElementTree.Element) -> Scale:
    """PhysicalSizeX and Y. Their unit is µm where none is written, by the schema."""
    sizes: list[float | None] = []
    for axis in ("X", "Y"):
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if size is not None and unit not in TO_MICRONS:
            return Scale(None, f"its OME-XML gives the size of a pixel in {unit!r}, which is not a unit of length")
        try:
            sizes.append(None if size is None else float(size) * TO_MICRONS[unit])
        except ValueError:
            return Scale(None, f"its OME-XML gives {size!r:.20} as the size of a pixel")
    return plausible_scale(sizes[0], sizes[1], "its OME-XML")


def _check_imagej(path: Path, description: str) -> None:
    """Refuse a stack of ImageJ, whose description counts channels, slices (z) and frames (t), or images alone."""
    counts = {key: int(number) for key, number in re.findall(r"^(\w+)=(\d+)\s*$", description, re.MULTILINE)}
    axes = {"c": "channels", "z": "slices", "t": "frames"}
    many = {axis: counts[key] for axis, key in axes.items() if counts.get(key, 1) > 1}
    if not many and counts.get("images", 1) > 1:
        many = {"z": counts["images"]}
    if many:
        raise not_one_picture(path, many)


def _imagej_scale(description: str, page: Any) -> Scale:
    """Microns per pixel of a picture that ImageJ calibrated: pixels per `unit` of its description."""
    x, y = page.tags.valueof(282), page.tags.valueof(283)
    if x is None or y is None or not (x[0] and x[1] and y[0] and y[1]):
        return Scale()
    stated = reversed(re.findall(r"^(y?unit)=(.*)$", description, re.MULTILINE))
    units = {name: unit.strip().replace("\\u00B5", "µ") for name, unit in stated}
    unit = units.get("unit", "")
    micron_x, micron_y = TO_MICRONS.get(unit), TO_MICRONS.get(units.get("yunit", unit))
    if micron_x is None or micron_y is None:
        return _resolution_scale(page)  # inches and cm are in the resolution tags too; pixels are no length
    return plausible_scale(micron_x * x[1] / x[0], micron_y * y[1] / y[0], "its ImageJ description")


def _aperio_scale(description: str) -> Scale:
    found = re.search(r"\|\s*MPP\s*=\s*([^|]*)", description) if description.startswith("Aperio") else None
    um = found[1].strip().replace(",", ".") if found is not None else None  # as OpenSlide reads it
    return plausible_scale(um, um, "its description")


def _resolution_scale(page: Any) -> Scale:
    x, y = page.tags.valueof(282), page.tags.valueof(283)
    if x is None or y is None or not (x[1] and y[1]):
        return Scale()
    return per_length(page.tags.valueof(296, 2), x[0] / x[1], y[0] / y[1])


def per_length(unit: object, x: float, y: float) -> Scale:
    """From pixels per inch (2) or cm (3), but only where that can be a microscope's."""
    micron = {2: 25400.0, 3: 10000.0}.get(unit) if isinstance(unit, int) else None
    if micron is None or not (x > 0 and y > 0):
        return Scale()
    return plausible_scale(micron / x, micron / y, "its resolution tag", _MICROSCOPE_MPP)
