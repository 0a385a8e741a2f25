"""Microns per pixel, planes and bits in the tags, the OME-XML and the descriptions of ImageJ and Aperio of a TIFF."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from keyhole.images.faults import not_one_picture
from keyhole.images.pixels import DEEP, bits_of_largest
from keyhole.images.scale import TO_MICRONS, Scale, plausible_scale

_MICROSCOPE_MPP = 0.05, 20.0
"""Microns per pixel of a resolution tag that can be a microscope's: any program writes 72 or 300 dpi."""


_IMAGEJ_AXES = ("channels", "slices", "frames")


def ome_pixels(description: str) -> ElementTree.Element | None:
    """The <Pixels> of the first image of OME-XML; None where the XML is not usable."""
    if "<!DOCTYPE" in description or "<!ENTITY" in description:
        return None
    try:
        return ElementTree.fromstring(description).find("{*}Image/{*}Pixels")
    except (ElementTree.ParseError, ValueError):
        return None


def check_ome(path: Path, pixels: ElementTree.Element, page: Any) -> None:
    """Refuse an OME-TIFF whose first image is a stack of channels, planes or time points."""
    lengths = {axis: int(pixels.get(f"Size{axis.upper()}", "1")) for axis in "czt"}
    if lengths["c"] <= page.samplesperpixel:
        del lengths["c"]
    if many := {axis: length for axis, length in lengths.items() if length > 1}:
        raise not_one_picture(path, many)


def check_imagej(path: Path, description: str) -> None:
    """Refuse a stack of ImageJ, whose description counts channels, slices (z) and frames (t), or images alone."""
    counts = {key: int(number) for key, number in re.findall(r"^(\w+)=(\d+)\s*$", description, re.MULTILINE)}
    many = {axis: counts[key] for axis, key in zip("czt", _IMAGEJ_AXES, strict=True) if counts.get(key, 1) > 1}
    if not many and counts.get("images", 1) > 1:
        many = {"z": counts["images"]}
    if many:
        raise not_one_picture(path, many)


def imagej_scale(description: str, page: Any) -> Scale:
    """Microns per pixel of a picture that ImageJ calibrated: pixels per `unit` of its description."""
    units = {
        axis: found[1].strip().replace("\\u00B5", "µ")
        for axis in ("x", "y")
        if (found := re.search(rf"^{'y' if axis == 'y' else ''}unit=(.*)$", description, re.MULTILINE))
    }
    x, y = page.tags.valueof(282), page.tags.valueof(283)
    if x is None or y is None or not (x[0] and x[1] and y[0] and y[1]):
        return Scale()
    unit = units.get("x", "")
    micron_x, micron_y = TO_MICRONS.get(unit), TO_MICRONS.get(units.get("y", unit))
    if micron_x is None or micron_y is None:
        return resolution_scale(page)  # inches and cm are in the resolution tags too; pixels are no length
    return plausible_scale(micron_x * x[1] / x[0], micron_y * y[1] / y[0], "its ImageJ description")


def significant_bits(pixels: ElementTree.Element) -> int | None:
    """SignificantBits; None where they are not fewer than are stored: writers put the bits of the type there."""
    stated, kind = pixels.get("SignificantBits", ""), pixels.get("Type", "")
    in_file = {"bit": 1, "uint8": 8, "uint16": 16}.get(kind, 0)
    return int(stated) if stated.isdigit() and 0 < int(stated) < in_file else None


def bits_of_tags(page: Any) -> int | None:
    """Bits in use by MaxSampleValue, where that is the white of fewer bits than are stored."""
    largest = page.tags.valueof(281)
    if page.bitspersample != DEEP or largest is None:
        return None
    return bits_of_largest(float(np.max(largest)))


def first_plane(pixels: ElementTree.Element) -> int:
    data = pixels.find("{*}TiffData")
    return int(data.get("IFD", "0")) if data is not None else 0


def ome_scale(pixels: ElementTree.Element) -> Scale:
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


def aperio_scale(description: str) -> Scale:
    found = re.search(r"\|\s*MPP\s*=\s*([^|]*)", description) if description.startswith("Aperio") else None
    if found is None:
        return Scale()
    um = found[1].strip().replace(",", ".")  # as OpenSlide reads it
    return plausible_scale(um, um, "its description")


def resolution_scale(page: Any) -> Scale:
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
