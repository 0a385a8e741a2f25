"""Rows of a contact sheet from files: thumbnail and pixels of the kept patches, read for the images shown only."""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.config import PatchConfig
from keyhole.errors import ImageError
from keyhole.grid import PatchGrid
from keyhole.images import open_image
from keyhole.images.geometry import Box
from keyhole.images.image import Image
from keyhole.images.thumbnail import thumbnail
from keyhole.prediction import Prediction, Scores
from keyhole.report.contact_sheet import SheetEntry, score_picture

SHOWN = 64
"""Kept patches of an image whose pixels are read."""
SIDE = 142
"""Of a patch that was embedded before, in pixels: what the sheet shows of it."""
LEAST = 340
"""Pixels of the longer side of a picture of scores."""


def sheet_entry(patch: PatchConfig, prediction: Prediction, truth: str | None = None) -> SheetEntry:
    """What the sheet shows of one image: of stored features the scores alone, where the slide cannot be read.

    Args:
        patch: settings the model looks at images with.
        prediction: of the image.
        truth: its known label.

    Raises:
        ImageError: the file cannot be read any more.
    """
    if "features" in prediction.patch:
        return _features_entry(prediction, truth)
    with open_image(prediction.image) as image:
        if image.mpp is None and patch.mpp is not None:
            image.mpp = patch.mpp / float(prediction.patch["scale"])  # the manifest knew what the file does not say
        full = PatchGrid(image, patch.size, patch.stride, patch.mpp, level=patch.level)
        small, downsample = thumbnail(image, 680)
        scores = prediction.scores
        # a mask renumbers the patches; their cells in the full grid say where they are
        first = prediction.kept.index[:SHOWN]
        cells = first if scores is None else scores.cells[first] @ [full.columns, 1]
        pixels = full.read(cells)
    return SheetEntry(prediction, truth, small, downsample, pixels)


def _features_entry(prediction: Prediction, truth: str | None) -> SheetEntry:
    boxes = prediction.kept.boxes[:SHOWN]
    if boxes[:, 2:].any():
        try:
            with open_image(prediction.image) as image:
                small, downsample = thumbnail(image, 680)
                return SheetEntry(prediction, truth, small, downsample, _patches(image, boxes))
        except ImageError:
            pass  # the slide is often elsewhere than its features; a damaged one is no reason to show nothing
    picture, downsample = _scores_picture(prediction)
    return SheetEntry(prediction, truth, picture, downsample, np.empty((0, SIDE, SIDE, 3), np.uint8))


def _patches(image: Image, boxes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Pixels (k, SIDE, SIDE, c) of level-0 boxes, from the coarsest level that has as many."""
    out = np.empty((len(boxes), SIDE, SIDE, image.channels), np.uint8)
    for place, (x, y, width, height) in zip(out, boxes.tolist(), strict=True):
        fine = [i for i, level in enumerate(image.levels) if i == 0 or level.downsample * SIDE <= max(width, height)]
        down = image.levels[fine[-1]].downsample
        left, top, right, bottom = (round(edge / down) for edge in (x, y, x + width, y + height))
        pixels = image.read(Box(left, top, max(1, right - left), max(1, bottom - top)), fine[-1])
        picture = PIL.Image.fromarray(pixels[..., 0] if image.channels == 1 else pixels)
        place[...] = np.asarray(picture.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)).reshape(place.shape)
    return out


def _scores_picture(prediction: Prediction) -> tuple[NDArray[np.uint8], float]:
    """The scores as a picture in the place of the image, and level-0 pixels per pixel of it."""
    scores, size = prediction.scores, prediction.size
    if scores is None or not prediction.kept.boxes[:, 2:].any():
        values = np.full((1, 1), np.nan, np.float32) if scores is None else _folded(scores)
        return score_picture(values, max(1, LEAST // max(values.shape))), 1.0
    scale = float(prediction.patch["scale"]) * float(prediction.patch["stride"])
    zoom = max(1, round(LEAST / max(scores.rows, scores.columns)))
    picture = score_picture(scores.map(), zoom)
    # the map begins less than a step from the slide's corner, and may end before the slide does
    wanted = [max(1, round(side / scale * zoom)) for side in (size.height, size.width)]
    grown = np.full((max(wanted[0], picture.shape[0]), max(wanted[1], picture.shape[1]), 3), 255, np.uint8)
    grown[: picture.shape[0], : picture.shape[1]] = picture
    return grown, scale / zoom


def _folded(scores: Scores) -> NDArray[np.float32]:
    """Scores without places, in the order of the file, as lines of a square."""
    columns = int(np.ceil(np.sqrt(len(scores))))
    values = np.full((-(-len(scores) // columns) * columns), np.nan, np.float32)
    values[: len(scores)] = scores.score
    return values.reshape(-1, columns)
