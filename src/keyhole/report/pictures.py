"""The pixels that show a prediction, read from its own source while that is open."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images import open_image
from keyhole.images.geometry import Box, Size
from keyhole.images.image import Image
from keyhole.images.pixels import Pixels
from keyhole.images.resample import sketch, thumbnail
from keyhole.patches.features import FeaturePatches
from keyhole.patches.sources import FilePatches
from keyhole.report.predicted import KeptPatches, Pictures, Predicted
from keyhole.report.score_layer import ScoreScale, folded, opaque, score_raster

MAX_PATCHES = 64
"""Largest number of kept patches whose pixels a prediction carries."""
SIDE = 142
"""Largest side of such a patch, in pixels, as on the contact sheet."""
THUMBNAIL = 1024
"""Longest side of the picture of the whole image."""
MAX_THUMBNAIL_PIXELS = 2**29
"""Pixels of a level that are read for this picture; a larger one is sketched, in seconds instead of minutes."""
SKETCH_SQUARES = 128


def most_attended(kept: KeptPatches) -> NDArray[np.int64]:
    """Return the places of the kept patches to show: at most `MAX_PATCHES`, by their highest rank in any task."""
    ranks = [np.argsort(np.argsort(-weights, kind="stable")) for weights in kept.attention.values()]
    order = np.argsort(np.min(ranks, axis=0), kind="stable") if ranks else np.arange(len(kept))
    return np.sort(order[:MAX_PATCHES]).astype(np.int64)


def small_patches(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return patches (k, s, s, c) scaled down to sides of at most `SIDE` pixels."""
    return np.array(pixels) if pixels.shape[1] <= SIDE else np.stack([_resized(patch, SIDE) for patch in pixels])


def pictures_of_file(
    source: FilePatches,
    prediction: Predicted,
    place: NDArray[np.int64],
    patches: Pixels,
    whole: Pixels,
    before: Pictures | None = None,
) -> Pictures:
    """Return the pictures of a prediction from an open file; patches (k, s, s, c) are as the model saw them.

    The thumbnail is that of `before`, if given.
    """
    base = None if before is None or before.of_scores else before
    if base is None:
        try:
            picture, downsample, note = _whole(source.image)
            base = Pictures(picture, downsample, patches[:0], place[:0], note)
        except ImageError:  # the patches that could be read were enough for a prediction
            base = _of_scores(prediction, "damaged image: its scores are shown")
    return replace(base, patches=small_patches(patches), place=place, whole=whole.copy())


def pictures_of_features(
    source: FeaturePatches, prediction: Predicted, place: NDArray[np.int64], first: NDArray[np.int64]
) -> Pictures:
    """Return the pictures of a prediction from stored features: of the slide if it can be read, else of the scores.

    A slide is not shown if its size is not that which the features state, or if it ends before their last patch. The
    `first` kept patches are read at the resolution of the features, if that is known.
    """
    boxes = prediction.kept.boxes
    if boxes[place, 2:].any() and prediction.image != source.file.path:
        try:
            with open_image(prediction.image) as image:
                if _is_slide_of(image.size, source):
                    picture, downsample, sketched = _whole(image)
                    note = f"stored features: pixels of the image{', ' if sketched else ''}{sketched}"
                    side = source.grid.size or int(boxes[0, 2])
                    patches, whole = _patches(image, boxes[place], SIDE), _patches(image, boxes[first], side)
                    return Pictures(picture, downsample, patches, place, note, whole=whole)
        except ImageError:
            pass  # the slide is elsewhere, or damaged
    return _of_scores(prediction, "stored features: scores, no pixels")


def _whole(image: Image) -> tuple[Pixels, float, str]:
    """Return the picture of a whole image, its level-0 pixels per pixel, and a note if it is a sketch."""
    coarsest = min((level.size for level in image.levels if max(level.size) >= THUMBNAIL), default=image.size)
    if image.held_pixels or coarsest.width * coarsest.height <= MAX_THUMBNAIL_PIXELS:
        return *thumbnail(image, THUMBNAIL), ""
    level = next(number for number, each in enumerate(image.levels) if each.size == coarsest)
    downsample = max(image.size) / THUMBNAIL
    size = Size(*(max(1, round(side / downsample)) for side in image.size))
    picture = sketch(image, level, (0, 0, *coarsest), size, SKETCH_SQUARES)
    return picture, downsample, "no smaller levels: the image is a sketch of samples"


def _is_slide_of(size: Size, source: FeaturePatches) -> bool:
    """Return whether the features can be of a slide of this size: all patches begin on it."""
    if source.l0_size is not None:
        return size == source.l0_size
    side = source.scale * source.grid.size
    return all(have > reach - side for have, reach in zip(size, source.extent, strict=True))


def _patches(image: Image, boxes: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
    """Return pixels (k, side, side, c) of level-0 boxes, from the coarsest level that has as many."""
    out = np.empty((len(boxes), side, side, image.channels), np.uint8)
    for patch, (x, y, width, height) in zip(out, boxes.tolist(), strict=True):
        fine = [i for i, level in enumerate(image.levels) if i == 0 or level.downsample * side <= max(width, height)]
        down = image.levels[fine[-1]].downsample
        left, top, right, bottom = (round(edge / down) for edge in (x, y, x + width, y + height))
        box = Box(left, top, max(1, right - left), max(1, bottom - top))
        patch[...] = _resized(image.read(box, fine[-1]), side)
    return out


def _resized(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return pixels (h, w, c) resized to (side, side, c)."""
    picture = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    resized: NDArray[np.uint8] = np.asarray(picture.resize((side, side), PIL.Image.Resampling.BICUBIC))
    return resized.reshape(side, side, -1)


def _of_scores(prediction: Predicted, note: str) -> Pictures:
    """Return pictures with the scores instead of the image: at their places if they have any, else row by row."""
    scores = prediction.scores
    assert scores is not None, "a prediction that was just made has the score of every patch"
    scale, nothing = ScoreScale.of(scores.score), np.empty((0, SIDE, SIDE, 3), np.uint8)
    place = np.empty(0, np.int64)
    if not prediction.kept.boxes[:, 2:].any():
        values = folded(scores.score)
        zoom = max(1, THUMBNAIL // max(values.shape))
        picture = opaque(scale.heat(values.repeat(zoom, axis=0).repeat(zoom, axis=1)))
        return Pictures(picture, 1.0, nothing, place, note, of_scores=True)
    downsample = max(prediction.size) / THUMBNAIL
    shape = tuple(max(1, round(side / downsample)) for side in (prediction.size.height, prediction.size.width))
    picture = opaque(scale.heat(score_raster(scores, None, (shape[0], shape[1]), downsample)))
    return Pictures(picture, downsample, nothing, place, note, of_scores=True)
