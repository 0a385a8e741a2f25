"""The levels of a TIFF pyramid and how each is decoded, its scale and its orientation."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import not_one_picture
from keyhole.images.geometry import Size, same_shape
from keyhole.images.jpeg import JpegTiles, frame_of
from keyhole.images.pixels import (
    DEEP,
    Pixels,
    alpha_of,
    bits_of_largest,
    eight_bit,
    on_white,
    straight,
    valid_orientation,
)
from keyhole.images.scale import TO_MICRONS, Scale, agreed, plausible_scale
from keyhole.images.tiff_file import ShortTables, check_segment, open_pages

_JPEG = 7
_PICTURES = {_JPEG: "JPEG", 34712: "picture", 50001: "picture"}  # segments that state a size: also JPEG 2000, WebP
_PLAIN = {1, 2, 3, 4, 5, 8, 32946, 32773, 34925, 50000}  # none, CCITT, LZW, Deflate, PackBits, LZMA, Zstd
_MICROSCOPE_MPP = 0.05, 20.0
"""Microns per pixel that a resolution tag of a microscope can state; other programs write 72 or 300 dpi."""
_YCBCR = 6
_COLORS = {0: ("inverted", 1), 1: ("grey", 1), 2: ("rgb", 3), 3: ("palette", 1), 5: ("cmyk", 4), _YCBCR: ("rgb", 3)}


class TiffLevel:
    """One page: a table of segments (tiles, or strips as wide as the image) and how to decode one.

    `stated` are the bits in use, as the file states them. `offsets` and `counts` (0 is missing) list plane after plane.
    """

    def __init__(self, path: Path, page: Any, short: ShortTables, stated: int | None) -> None:
        self.path, self.size, self.tiled = path, _size_of(page), bool(page.is_tiled)
        rows = page.tilelength if self.tiled else page.rowsperstrip
        self.segment = Size(page.tilewidth if self.tiled else self.size.width, rows)
        if min(self.size) < 1 or min(self.segment) < 1:
            raise ImageError(path, f"page {page.index} has a size of {tuple(self.size)}. Copy or export it again.")
        check_segment(path, self.segment)
        # `samples` are those of the colour and those up to alpha, `planes` is 1 unless each colour is stored by itself
        self.color, self.alpha, self.samples = _color(path, page)
        self.colors = {"rgb": 3, "cmyk": 4}.get(self.color, 1)
        self.channels = 1 if self.color in ("grey", "inverted") else 3
        self.planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self.offsets, self.counts = short.tables(page)
        columns, rows = (math.ceil(whole / part) for whole, part in zip(self.size, self.segment, strict=True))
        expected, listed = columns * rows * self.planes, min(self.offsets.count, self.counts.count)
        if listed < expected:
            raise ImageError(path, f"page {page.index} lists {listed} of {expected} tiles or strips. Copy it again.")
        self.coded = _PICTURES.get(int(page.compression), "")
        self.stored: int = page.bitspersample
        in_use = None if self.coded and self.stored <= 8 else stated  # 8-bit JPEG has the bits that its decoder gives
        self.says_bits = in_use is not None or self.stored != DEEP
        self.palette = _palette(path, page) if self.color == "palette" else None
        self.bits = self.stored if in_use is None or self.palette is not None else min(in_use, self.stored)
        is_jpeg = page.compression == _JPEG
        self._options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if is_jpeg else {}
        self._decode = page.decode
        jpeg = JpegTiles(page, self.segment, self.samples) if is_jpeg and self.alpha is None else None
        self.jpeg = jpeg if jpeg is not None and jpeg.plain else None  # a quicker decoder of the usual kinds

    def decode(self, data: bytes, number: int) -> NDArray[Any]:
        """Decode a segment to (h, w, samples of a plane) of `stored` bits.

        Raises ImageError for one that is a picture by itself and declares a much larger size than the page does.
        """
        if self.coded:
            # the decoder reports a JPEG without a frame header
            size = frame_of(data)[1] if self.coded == "JPEG" else _picture_size(data)
            most = max(4 * self.segment.width * self.segment.height, 2**16)
            if size is not None and size.width * size.height > most:
                size = Size(size.width, size.height)
                problem = f"a tile of {tuple(self.segment)} pixels holds a picture of {tuple(size)}."
                raise ImageError(self.path, f"{problem} Export it again.")
        values: NDArray[Any] = self._decode(data, number, **self._options)[0][0]
        if values.dtype.itemsize != (1 if self.stored <= 8 else 2):
            raise ValueError(f"a segment of {values.dtype} where {self.stored} bits are declared")
        return values

    def pixels(self, values: NDArray[np.unsignedinteger | np.bool_]) -> Pixels:
        """Turn decoded samples (h, w, samples) into (h, w, 1 or 3) uint8, by the kind of colour."""
        color, associated, alpha = values[..., : self.colors], self.alpha == "associated", None
        pixels = eight_bit(color, self.bits) if self.palette is None else self.palette[color[..., 0].astype(np.intp)]
        if self.alpha:
            alpha = alpha_of(values[..., self.samples - 1 : self.samples], self.bits, self.stored)
            if associated and self.color in ("inverted", "cmyk"):  # alpha multiplied the ink, not the colour it gives
                pixels, associated = straight(pixels, alpha), False
        if self.color == "inverted":
            pixels = 255 - pixels
        elif self.color == "cmyk":
            ink, black = 255 - pixels[..., :3].astype(np.uint16), 255 - pixels[..., 3:].astype(np.uint16)
            pixels = ((ink * black + 127) // 255).astype(np.uint8)
        return pixels if alpha is None else on_white(np.concatenate([pixels, alpha], axis=-1), associated)


def _picture_size(data: bytes) -> Size:
    """Return width and height of a JPEG 2000 or WebP segment, from its header."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data), formats=("JPEG2000", "WEBP")) as picture:
            return Size(*picture.size)
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


class TiffLayout(NamedTuple):
    """Levels, largest first, microns per pixel, orientation, and a note on what is not read."""

    levels: tuple[TiffLevel, ...]
    scale: Scale
    orientation: int
    note: str


def read_layout(path: Path) -> TiffLayout:
    """Read levels, scale and orientation of a TIFF; ImageError with a remedy for a kind that is not read."""
    with open_pages(path) as (tif, short):
        first = main = tif.pages[0]
        stated: int | None = None
        ome = ome_pixels(first.description) if first.is_ome else None
        if ome is not None:
            data = ome.find("{*}TiffData")
            main = tif.pages[int(data.get("IFD", "0")) if data is not None else 0]
            scale, stated = _read_ome(path, ome, first)
            scale = agreed(scale, _resolution_scale(main))
        elif main.is_imagej:
            scale = _read_imagej(path, main)
        else:
            text = main.description if main.description.startswith("Aperio") else ""
            found = re.search(r"\|\s*MPP\s*=\s*([^|]*)", text)
            um = found[1].strip().replace(",", ".") if found is not None else None  # as OpenSlide reads it
            scale = agreed(plausible_scale(um, um, "its description"), _resolution_scale(main))
        if stated is None and main.bitspersample == DEEP and (largest := main.tags.valueof(281)) is not None:
            stated = bits_of_largest(float(np.max(largest)))
        pages = _pyramid(tif, short, main)
        levels = tuple(TiffLevel(path, page, short, stated) for page in pages)
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
    """Return the page `main` and its smaller copies, largest first: its SubIFDs, or else the pages after it.

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


def _color(path: Path, page: Any) -> tuple[str, str | None, int]:
    """Return the kinds of colour and alpha, and how many samples they take; refuse other than up to 16 bits a value."""

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
        extra = [2]  # Pillow too takes an undescribed sample beside red, green and blue as alpha
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
    """Return the palette (2**bits, 3). Some writers put 8-bit values into the 16-bit table; then all are small."""
    table = np.asarray(page.colormap)
    if table.shape != (3, 2**page.bitspersample):
        raise ImageError(path, f"a palette of {table.shape} for {page.bitspersample} bits. Export it again.")
    # An 8-bit value v is written as 257 v, or as 256 v by Pillow and others. The highest eight bits are v in both.
    return np.asarray((table >> 8 if table.max() > 255 else table).T, np.uint8)


def ome_pixels(description: str) -> ElementTree.Element | None:
    """Return the <Pixels> of the first image of OME-XML; None if the XML is not usable."""
    if "<!DOCTYPE" in description or "<!ENTITY" in description:
        return None
    try:
        return ElementTree.fromstring(description).find("{*}Image/{*}Pixels")
    except (ElementTree.ParseError, ValueError):
        return None


def _read_ome(path: Path, pixels: ElementTree.Element, page: Any) -> tuple[Scale, int | None]:
    """Return scale and significant bits that OME-XML states; refuse a stack of channels, planes or time points."""
    lengths = {axis: int(pixels.get(f"Size{axis.upper()}", "1")) for axis in "czt"}
    if lengths["c"] <= page.samplesperpixel:
        del lengths["c"]
    if many := {axis: length for axis, length in lengths.items() if length > 1}:
        raise not_one_picture(path, many)
    stated = pixels.get("SignificantBits", "")
    in_file = {"bit": 1, "uint8": 8, "uint16": 16}.get(pixels.get("Type", ""), 0)
    bits = int(stated) if stated.isdigit() and 0 < int(stated) < in_file else None  # many writers put the stored bits
    sizes: list[float | None] = []
    for axis in ("X", "Y"):
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if size is not None and unit not in TO_MICRONS:
            problem = f"its OME-XML gives the size of a pixel in {unit!r}, which is not a unit of length"
            return Scale(None, problem), bits
        try:
            sizes.append(None if size is None else float(size) * TO_MICRONS[unit])
        except ValueError:
            return Scale(None, f"its OME-XML gives {size!r:.20} as the size of a pixel"), bits
    return plausible_scale(sizes[0], sizes[1], "its OME-XML"), bits


def _read_imagej(path: Path, page: Any) -> Scale:
    """Return the scale that ImageJ states, pixels per `unit` of its description; refuse a stack.

    The description counts channels, slices (z) and frames (t), or only images.
    """
    counts = {key: int(number) for key, number in re.findall(r"^(\w+)=(\d+)\s*$", page.description, re.MULTILINE)}
    axes = {"c": "channels", "z": "slices", "t": "frames"}
    many = {axis: counts[key] for axis, key in axes.items() if counts.get(key, 1) > 1}
    if not many and counts.get("images", 1) > 1:
        many = {"z": counts["images"]}
    if many:
        raise not_one_picture(path, many)
    x, y = page.tags.valueof(282), page.tags.valueof(283)
    if x is None or y is None or not (x[0] and x[1] and y[0] and y[1]):
        return Scale()
    stated = reversed(re.findall(r"^(y?unit)=(.*)$", page.description, re.MULTILINE))
    units = {name: unit.strip().replace("\\u00B5", "µ") for name, unit in stated}
    unit = units.get("unit", "")
    micron_x, micron_y = TO_MICRONS.get(unit), TO_MICRONS.get(units.get("yunit", unit))
    if micron_x is None or micron_y is None:
        return _resolution_scale(page)  # inches and cm are in the resolution tags too; pixels are no length
    return plausible_scale(micron_x * x[1] / x[0], micron_y * y[1] / y[0], "its ImageJ description")


def _resolution_scale(page: Any) -> Scale:
    x, y = page.tags.valueof(282), page.tags.valueof(283)
    if x is None or y is None or not (x[1] and y[1]):
        return Scale()
    return per_length(page.tags.valueof(296, 2), x[0] / x[1], y[0] / y[1])


def per_length(unit: object, x: float, y: float) -> Scale:
    """Return the scale of pixels per inch (2) or cm (3), if it can be that of a microscope."""
    micron = {2: 25400.0, 3: 10000.0}.get(unit) if isinstance(unit, int) else None
    if micron is None or not (x > 0 and y > 0):
        return Scale()
    return plausible_scale(micron / x, micron / y, "its resolution tag", _MICROSCOPE_MPP)
