"""The pixels that show a prediction, read from its own source while that is open."""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images import open_image
from keyhole.images.geometry import Box, Size
from keyhole.images.image import Image
from keyhole.images.pixels import Pixels
from keyhole.images.resample import thumbnail
from keyhole.patches.features import FeaturePatches
from keyhole.patches.sources import FilePatches
from keyhole.report.drawing import score_picture
from keyhole.report.prediction import KeptPatches, Pictures, Prediction, Scores

MAX_PATCHES = 64
"""Largest number of kept patches whose pixels a prediction carries."""
SIDE = 142
"""Largest side of such a patch, in pixels, as on the contact sheet."""
THUMBNAIL = 680
"""Longest side of the picture of the whole image."""
SCORES_SIDE = 340
"""Longest side of a picture of scores, approximately."""


def most_attended(kept: KeptPatches) -> NDArray[np.int64]:
    """Return the places of the kept patches to show: at most `MAX_PATCHES`, by their highest rank in any task."""
    ranks = [np.argsort(np.argsort(-weights, kind="stable")) for weights in kept.attention.values()]
    order = np.argsort(np.min(ranks, axis=0), kind="stable") if ranks else np.arange(len(kept))
    return np.sort(order[:MAX_PATCHES]).astype(np.int64)


def small_patches(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return patches (k, s, s, c) scaled down to sides of at most `SIDE` pixels."""
    return np.array(pixels) if pixels.shape[1] <= SIDE else np.stack([_resized(patch) for patch in pixels])


def pictures_of_file(
    source: FilePatches, prediction: Prediction, place: NDArray[np.int64], patches: Pixels
) -> Pictures:
    """Return the pictures of a prediction from an open file; patches (k, s, s, c) are as the model saw them."""
    small = small_patches(patches)
    try:
        picture, downsample = thumbnail(source.image, THUMBNAIL)
    except ImageError:  # the patches that could be read were enough for a prediction
        picture, downsample = _scores_picture(prediction)
        return Pictures(picture, downsample, small, place, "damaged image: its scores are shown")
    return Pictures(picture, downsample, small, place)


def pictures_of_features(source: FeaturePatches, prediction: Prediction, place: NDArray[np.int64]) -> Pictures:
    """Return the pictures of a prediction from stored features: of the slide if it can be read, else of the scores.

    A slide is not shown if its size is not that which the features state, or if it ends before their last patch.
    """
    boxes = prediction.kept.boxes[place]
    if boxes[:, 2:].any() and prediction.image != source.file.path:
        try:
            with open_image(prediction.image) as image:
                if _is_slide_of(image.size, source):
                    picture, downsample = thumbnail(image, THUMBNAIL)
                    note = "stored features: pixels of the slide"
                    return Pictures(picture, downsample, _patches(image, boxes), place, note)
        except ImageError:
            pass  # the slide is elsewhere, or damaged
    picture, downsample = _scores_picture(prediction)
    nothing = np.empty((0, SIDE, SIDE, 3), np.uint8)
    return Pictures(picture, downsample, nothing, place[:0], "stored features: scores, no pixels")


def _is_slide_of(size: Size, source: FeaturePatches) -> bool:
    """Return whether the features can be of a slide of this size: all patches begin on it."""
    if source.l0_size is not None:
        return size == source.l0_size
    side = source.scale * source.grid.size
    return all(have > reach - side for have, reach in zip(size, source.extent, strict=True))


def _patches(image: Image, boxes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return pixels (k, SIDE, SIDE, c) of level-0 boxes, from the coarsest level that has as many."""
    out = np.empty((len(boxes), SIDE, SIDE, image.channels), np.uint8)
    for patch, (x, y, width, height) in zip(out, boxes.tolist(), strict=True):
        fine = [i for i, level in enumerate(image.levels) if i == 0 or level.downsample * SIDE <= max(width, height)]
        down = image.levels[fine[-1]].downsample
        left, top, right, bottom = (round(edge / down) for edge in (x, y, x + width, y + height))
        patch[...] = _resized(image.read(Box(left, top, max(1, right - left), max(1, bottom - top)), fine[-1]))
    return out


def _resized(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels (h, w, c) resized to (SIDE, SIDE, c)."""
    picture = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    resized: NDArray[np.uint8] = np.asarray(picture.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC))
    return resized.reshape(SIDE, SIDE, -1)


def _scores_picture(prediction: Prediction) -> tuple[NDArray[np.uint8], float]:
    """Return a picture of the scores instead of the image, and level-0 pixels per pixel of it."""
    scores, size = prediction.scores, prediction.size
    if scores is None or not prediction.kept.boxes[:, 2:].any():
        values = np.full((1, 1), np.nan, np.float32) if scores is None else _folded(scores)
        equal = 1.0 if scores is None else 1 / len(scores)
        return score_picture(values, max(1, SCORES_SIDE // max(values.shape)), equal), 1.0
    step = float(prediction.patch["scale"]) * float(prediction.patch["stride"])
    zoom = max(1, round(SCORES_SIDE / max(scores.rows, scores.columns)))
    picture = score_picture(scores.map(), zoom, 1 / len(scores))
    # The cell and box of one patch give the place of the map on the slide.
    at = scores.boxes(scores.index[:1])[0, :2] - scores.cells[0, ::-1] * step
    left, top = (round(max(0.0, float(edge) / step * zoom)) for edge in at)
    wanted = [max(1, round(side / step * zoom)) for side in (size.height, size.width)]
    height, width = max(wanted[0], top + picture.shape[0]), max(wanted[1], left + picture.shape[1])
    grown = np.full((height, width, 3), 255, np.uint8)
    grown[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return grown, step / zoom


def _folded(scores: Scores) -> NDArray[np.float32]:
    """Return scores without places as a square, row by row in the order of the file."""
    columns = int(np.ceil(np.sqrt(len(scores))))
    values = np.full((-(-len(scores) // columns) * columns), np.nan, np.float32)
    values[: len(scores)] = scores.score
    return values.reshape(-1, columns)
