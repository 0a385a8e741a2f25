"""Rows of a contact sheet from files: thumbnail and pixels of the kept patches, read for the images shown only."""

from __future__ import annotations

from keyhole.config import PatchConfig
from keyhole.grid import PatchGrid
from keyhole.images import open_image
from keyhole.images.thumbnail import thumbnail
from keyhole.prediction import Prediction
from keyhole.report.contact_sheet import SheetEntry


def sheet_entry(patch: PatchConfig, prediction: Prediction, truth: str | None = None) -> SheetEntry:
    """What the sheet shows of one image.

    Args:
        patch: settings the model looks at images with.
        prediction: of the image.
        truth: its known label.

    Raises:
        ImageError: the file cannot be read any more.
    """
    with open_image(prediction.image) as image:
        if image.mpp is None and patch.mpp is not None:
            image.mpp = patch.mpp / float(prediction.patch["scale"])  # the manifest knew what the file does not say
        full = PatchGrid(image, patch.size, patch.stride, patch.mpp, level=patch.level)
        small, downsample = thumbnail(image, 680)
        scores = prediction.scores
        # a mask renumbers the patches; their cells in the full grid say where they are
        first = prediction.kept.index[:64]
        cells = first if scores is None else scores.cells[first] @ [full.columns, 1]
        pixels = full.read(cells)
    return SheetEntry(prediction, truth, small, downsample, pixels)
