"""Writes small slides in makers' own TIFF layouts, which libopenslide opens by its driver for that maker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from make_images import Stored, picture, pyramid
from numpy.typing import NDArray

UM = 0.5
"""Microns per level-0 pixel of all of them."""


def write_vendors(folder: Path) -> dict[str, Stored]:
    """One slide of each maker by OpenSlide's name for it, lossless, in three levels."""
    levels = pyramid(picture(3, 192, 128))
    return {
        "philips": Stored(_write(folder / "philips.tiff", levels, _philips(), software="Philips DP v1.0"), levels),
        "trestle": Stored(_write(folder / "trestle.tif", levels, _TRESTLE, software="MedScan", resolution=(UM, UM)), levels),
        "leica": Stored(_write(folder / "leica.scn", levels, _leica(levels), bigtiff=True, **_RESOLUTION), _inlaid(levels)),
    }  # fmt: skip


_RESOLUTION: dict[str, Any] = {"resolution": (1e4 / UM, 1e4 / UM), "resolutionunit": 3}
_TRESTLE = "Background Color=FFFFFF;White Balance=;Objective Power=20;JPEG Quality=75;OverlapsXY= 0 0 0 0 0 0"


def _write(
    path: Path, levels: Sequence[NDArray[np.uint8]], description: str, bigtiff: bool = False, **options: Any
) -> Path:
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        for number, level in enumerate(levels):
            writer.write(
                level, tile=(32, 32), photometric="rgb", compression="deflate", metadata=None,
                description=description, subfiletype=int(number > 0), **options,
            )  # fmt: skip
    return path


def _philips() -> str:
    """Philips keeps pixel spacings in mm in XML, for each level."""

    def attribute(name: str, content: str, kind: str) -> str:
        return f'<Attribute Name="{name}" Group="0x0028" Element="0x0030" PMSVR="{kind}">{content}</Attribute>'

    def spacing(um: float) -> str:
        return attribute("DICOM_PIXEL_SPACING", f"&quot;{um / 1000}&quot; &quot;{um / 1000}&quot;", "IDoubleArray")

    levels = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing(UM * 2**level)}'
        f"{attribute('PIIM_PIXEL_DATA_REPRESENTATION_NUMBER', str(level), 'IUInt16')}</DataObject>"
        for level in range(3)
    )
    sequence = attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", f"<Array>{levels}</Array>", "IDataObjectArray")
    kind = attribute("PIM_DP_IMAGE_TYPE", "WSI", "IString")
    image = f'<DataObject ObjectType="DPScannedImage">{kind}{spacing(UM)}{sequence}</DataObject>'
    images = attribute("PIM_DP_SCANNED_IMAGES", f"<Array>{image}</Array>", "IDataObjectArray")
    maker = attribute("DICOM_MANUFACTURER", "PHILIPS", "IString")
    return f'<?xml version="1.0"?><DataObject ObjectType="DPUfsImport">{maker}{images}</DataObject>'


def _leica(levels: Sequence[NDArray[np.uint8]]) -> str:
    """Leica places scanned regions on a slide, in nm: here one, in the middle of a slide twice as wide and high."""
    height, width = levels[0].shape[:2]
    nm_width, nm_height = round(width * UM * 1000), round(height * UM * 1000)

    def image(name: str, pages: Sequence[int], view: str) -> str:
        sides = [(levels[page].shape[1], levels[page].shape[0], page) for page in pages]
        dimensions = "".join(
            f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{page}"/>' for r, (w, h, page) in enumerate(sides)
        )
        return (
            f'<image name="{name}" uuid="urn:uuid:{name}"><creationDate>2020-01-01T00:00:00Z</creationDate>'
            f'<device model="none" version="1"/><pixels sizeX="{sides[0][0]}" sizeY="{sides[0][1]}">{dimensions}</pixels>'
            f'<view {view} spacingZ="0"/><scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>'
            "<illuminationSettings><numericalAperture>0.4</numericalAperture>"
            "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
        )  # fmt: skip

    whole = f'sizeX="{2 * nm_width}" sizeY="{2 * nm_height}"'
    macro = image("macro", [2], f'{whole} offsetX="0" offsetY="0"')
    main = image(
        "main",
        [0, 1, 2],
        f'sizeX="{nm_width}" sizeY="{nm_height}" offsetX="{nm_width // 2}" offsetY="{nm_height // 2}"',
    )
    return (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="urn:uuid:0">'
        f'<collection name="slide" uuid="urn:uuid:0" {whole}><barcode></barcode>{macro}{main}</collection></scn>'
    )


def _inlaid(levels: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], ...]:
    """Each level in the middle of white, twice as wide and high."""
    out = []
    for level in levels:
        height, width = level.shape[:2]
        out.append(np.pad(level, ((height // 2,) * 2, (width // 2,) * 2, (0, 0)), constant_values=255))
    return tuple(out)
