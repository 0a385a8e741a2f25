"""Microns per pixel of a TIFF, and what OME-XML says of its planes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from keyhole.errors import ImageError
from keyhole.images.scale import TO_MICRONS, Scale, believed

_PHOTOGRAPH = 0.05, 20.0
"""Resolution tags outside say nothing of the picture: 72 or 300 dpi are what any program writes."""


def ome_pixels(description: str) -> ElementTree.Element | None:
    """The <Pixels> of the first image of OME-XML; None where the XML is not usable."""
    if "<!DOCTYPE" in description or "<!ENTITY" in description:
        return None
    try:
        return ElementTree.fromstring(description).find("{*}Image/{*}Pixels")
    except (ElementTree.ParseError, ValueError):
        return None


def check_ome(path: Path, pixels: ElementTree.Element, page: Any) -> None:
    channels = int(pixels.get("SizeC", "1"))
    if channels > 1 and channels > page.samplesperpixel:
        raise ImageError(
            path,
            f"OME-TIFF of {channels} channels in planes of their own; keyhole reads RGB or one channel. "
            "Merge the channels to RGB, or save the one you want.",
        )


def first_plane(pixels: ElementTree.Element) -> int:
    data = pixels.find("{*}TiffData")
    return int(data.get("IFD", "0")) if data is not None else 0


def ome_scale(pixels: ElementTree.Element) -> Scale:
    """PhysicalSizeX and Y. Their unit is µm where none is written: so says the schema, and writers rely on it."""
    sizes: list[float | None] = []
    for axis in ("X", "Y"):
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if size is not None and unit not in TO_MICRONS:
            return Scale(None, f"its OME-XML gives the size of a pixel in {unit!r}, which is no unit of length")
        try:
            sizes.append(None if size is None else float(size) * TO_MICRONS[unit])
        except ValueError:
            return Scale(None, f"its OME-XML gives {size!r:.20} as the size of a pixel")
    return believed(sizes[0], sizes[1], "its OME-XML")


def aperio_scale(description: str) -> Scale:
    found = re.search(r"\|\s*MPP\s*=\s*([^|]*)", description) if description.startswith("Aperio") else None
    if found is None:
        return Scale()
    um = found[1].strip().replace(",", ".")  # as OpenSlide reads it
    return believed(um, um, "its description")


def resolution_scale(page: Any) -> Scale:
    """From the resolution tags of a tifffile page."""
    x, y = page.tags.valueof(282), page.tags.valueof(283)
    if x is None or y is None or not (x[1] and y[1]):
        return Scale()
    return per_length(page.tags.valueof(296, 2), x[0] / x[1], y[0] / y[1])


def per_length(unit: object, x: float, y: float) -> Scale:
    """From pixels per inch (2) or cm (3), but only where that can be a microscope's."""
    micron = {2: 25400.0, 3: 10000.0}.get(unit) if isinstance(unit, int) else None
    if micron is None or not (x > 0 and y > 0):
        return Scale()
    return believed(micron / x, micron / y, "its resolution tag", *_PHOTOGRAPH)
