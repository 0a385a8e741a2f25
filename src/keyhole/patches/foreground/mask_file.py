"""Foreground masks from files: a PNG of any resolution, or outlines drawn in QuPath."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.errors import DataError, ImageError
from keyhole.images.faults import faults_of
from keyhole.images.geometry import Size
from keyhole.patches.foreground.region_files import GEOJSON_SUFFIXES, read_geojson
from keyhole.patches.foreground.regions import rasterize

MASK_SUFFIXES = (".png", ".geojson", ".json")
MAX_MASK_SIDE = 2048
"""Cells along the longest side of a mask in memory (4 MB); a cell is then smaller than a patch on any slide."""
MAX_PNG_PIXELS = 2**26
"""Most pixels of a PNG (8,192 x 8,192); at most 4 bytes each once decoded. Checked before decoding."""
MAX_ASPECT_ERROR = 0.03
"""Relative difference between the proportions of mask and image, from rounding when the mask was made."""
IGNORED_CLASSES = ("ignore", "ignore*")
"""QuPath's class for areas that are not to be used."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BITS = (2, 4, 6)
"""PNG colour types that Pillow reads at 8 bits a channel only: a label 7 of 65,535 would be lost."""
_BAND_PIXELS = 2**22


def read_mask(
    path: str | Path, l0_size: Size, longest: int = MAX_MASK_SIDE, origin: tuple[int, int] = (0, 0)
) -> NDArray[np.bool_]:
    """Return the foreground mask of an image from a file.

    PNG: a pixel is foreground if it is not black and not wholly transparent; palettes are applied. The picture covers
    the whole image, at any resolution. A cell is foreground if any of its pixels is.

    GeoJSON (`.geojson`, `.json`): the polygons of QuPath's objects in level-0 pixels from `origin`, without
    holes. Areas of the class `Ignore*` are cut out of all others; every other class counts, `Region*` included. A
    cell is foreground if a polygon touches it, so that an annotation smaller than a cell is not lost, and cut out
    if its centre is in an `Ignore*`.

    Args:
        path: the mask.
        l0_size: width and height of the image that it belongs to.
        longest: cells along the longest side of the result, at most.
        origin: `Image.qupath_origin` of the image. A PNG covers all of level 0, whatever QuPath shows.

    Returns:
        Mask, bool (rows, cols).

    Raises:
        ImageError: the mask's file is missing, damaged, too large, of another kind, or of other proportions.

    >>> PIL.Image.fromarray(np.eye(4, dtype=np.uint8)).save("mask.png")
    >>> read_mask("mask.png", Size(400, 400)).sum()
    np.int64(4)
    """
    path = Path(path)
    if path.suffix.lower() in GEOJSON_SUFFIXES:
        with faults_of(path, "this mask cannot be read"):
            path.open("rb").close()
        return _from_outlines(path, l0_size, longest, origin)
    check_png(path, l0_size)
    with faults_of(path, "this mask is damaged"), PIL.Image.open(path, formats=("PNG",)) as picture:
        picture.load()
        return _shrunk(picture, longest)


def check_png(path: Path, l0_size: Size | None = None) -> None:
    """Raise ImageError if a file is not a whole PNG of a mask, or not of the proportions of its image where given."""
    with faults_of(path, "this mask cannot be read"), path.open("rb") as file:
        head = file.read(26)
    if not head.startswith(_SIGNATURE) or len(head) < 26:
        raise ImageError(
            path, f"this mask is not a PNG. Expected a PNG or GeoJSON of QuPath ({', '.join(MASK_SUFFIXES)})."
        )
    _check_size(path, Size(int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")), l0_size)
    if head[24:25] == b"\x10" and head[25] in _EIGHT_BITS:
        raise ImageError(path, "a mask of 16 bits a channel in colour or with transparency. Save it with 8 bits.")
    with faults_of(path, "this mask is damaged"), PIL.Image.open(path, formats=("PNG",)) as picture:
        picture.verify()  # the CRC of every chunk, without decoding


def _from_outlines(path: Path, l0_size: Size, longest: int, origin: tuple[int, int]) -> NDArray[np.bool_]:
    try:
        regions = read_geojson(path, origin)
    except DataError as error:
        raise ImageError(path, str(error).removeprefix(str(path)).lstrip(":, ")) from error
    cell = max(1.0, max(l0_size) / longest)
    shape = max(1, round(l0_size.height / cell)), max(1, round(l0_size.width / cell))
    ignored = [region for region in regions if region.name.strip().lower() in IGNORED_CLASSES]
    used = [region for region in regions if region.name.strip().lower() not in IGNORED_CLASSES]
    return rasterize(used, l0_size, shape, touched=True) & ~rasterize(ignored, l0_size, shape)


def _check_size(path: Path, size: Size, l0_size: Size | None) -> None:
    if size.width * size.height > MAX_PNG_PIXELS:
        raise ImageError(
            path,
            f"{size.width:,} x {size.height:,} pixels are too many for a mask (at most {MAX_PNG_PIXELS:,}). "
            "Save it smaller: it may have any resolution.",
        )
    if min(size) < 1:
        raise ImageError(path, "this mask is damaged: its header says that it has no pixels. Save it again.")
    if l0_size is not None and not _same_shape(size, l0_size):
        turned = " It seems to be turned." if _same_shape(Size(*reversed(size)), l0_size) else ""
        raise ImageError(
            path,
            f"this mask of {size.width:,} x {size.height:,} pixels has other proportions than its image of "
            f"{l0_size.width:,} x {l0_size.height:,}. Expected a mask over the whole image, at any resolution.{turned}",
        )


def _same_shape(size: Size, l0_size: Size) -> bool:
    """Return whether the proportions agree up to a pixel of rounding and `MAX_ASPECT_ERROR`."""
    width, height = (l0 / side for l0, side in zip(l0_size, size, strict=True))
    slack = MAX_ASPECT_ERROR + 1 / min(size)
    return abs(width - height) <= slack * max(width, height)


def _shrunk(picture: PIL.Image.Image, longest: int) -> NDArray[np.bool_]:
    """Return the cells in which any pixel is foreground, computed a band of rows at a time."""
    width, height = picture.size
    cell = max(1.0, max(width, height) / longest)
    rows, columns = max(1, round(height / cell)), max(1, round(width / cell))
    # the first pixel of each cell, so that cells divide the picture evenly
    top, left = (-(-np.arange(count + 1) * side // count) for count, side in ((rows, height), (columns, width)))
    mask = np.empty((rows, columns), bool)
    high = max(1, _BAND_PIXELS // round(width * cell))
    for row in range(0, rows, high):
        last = min(row + high, rows)
        band = _not_black(picture.crop((0, int(top[row]), width, int(top[last]))))
        across = np.logical_or.reduceat(band, left[:-1], axis=1)
        mask[row:last] = np.logical_or.reduceat(across, top[row:last] - top[row], axis=0)
    return mask


def _not_black(picture: PIL.Image.Image) -> NDArray[np.bool_]:
    """Return the pixels (h, w) that are neither 0 nor wholly transparent."""
    if picture.mode != "RGBA" and picture.has_transparency_data and picture.mode != "I;16":
        picture = picture.convert("RGBA")
    elif picture.mode == "P":
        picture = picture.convert("RGB")
    values = np.atleast_3d(np.asarray(picture) != 0)
    transparency = picture.mode in ("LA", "RGBA")
    lit: NDArray[np.bool_] = np.any(values[..., :-1] if transparency else values, axis=-1)
    return lit & values[..., -1] if transparency else lit
