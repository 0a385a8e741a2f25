"""Microns per pixel of a TIFF, and what OME-XML says of its planes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from keyhole.errors import ImageError

_TO_MICRONS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4}


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


def ome_mpp(pixels: ElementTree.Element) -> float | None:
    factor = _TO_MICRONS.get(pixels.get("PhysicalSizeXUnit", "µm"))
    return _positive(float(pixels.get("PhysicalSizeX", "nan")) * factor) if factor else None


def aperio_mpp(description: str) -> float | None:
    found = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", description) if description.startswith("Aperio") else None
    return _positive(float(found[1])) if found else None


def resolution_mpp(page: Any) -> float | None:
    """From pixels per inch or cm, but only where it can be a microscope's: 72 or 300 dpi say nothing of the picture."""
    micron = {2: 25400.0, 3: 10000.0}.get(page.tags.valueof(296, 2) if 282 in page.tags else 0)
    x, y = page.tags.valueof(282), page.tags.valueof(283)
    if micron is None or x is None or y is None or not (x[0] and x[1] and y[0] and y[1]):
        return None
    um_x, um_y = micron * x[1] / x[0], micron * y[1] / y[0]
    return um_x if 0.05 <= um_x <= 20 and abs(um_x / um_y - 1) < 0.01 else None


def _positive(value: float) -> float | None:
    return value if math.isfinite(value) and value > 0 else None
