"""The score of every patch as a transparent layer over a picture of the image.

A score is the share of a patch in the attention over all n patches, so it is shown as a multiple of the equal share
1/n. The scale reaches from one equal share to the highest score of the image, and at least to 16 times 1/n: colours are
comparable within an image, and the legend says what they mean and which scores occur. A model that attends to all
patches alike has no bright patch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyhole.images.geometry import Box
from keyhole.report.drawing import HOTTEST, LINE, SCORE_COLORS, heat, palette
from keyhole.report.predicted import Scores

PATCHES_AT_ONCE = 100_000
OPACITY = 0.45, 0.85
"""Opacity of the lowest and of the highest scores: the image stays visible where nothing was found."""


class ScoreScale(NamedTuple):
    """What the colours of an image's scores mean.

    Attributes:
        patches: n.
        top: times 1/n that get the brightest colour: a power of 2, at least 16, that no score exceeds; at most n.
    """

    patches: int
    top: float

    @staticmethod
    def of(score: NDArray[np.float32]) -> ScoreScale:
        """Return the scale of the scores (n,) of one image.

        >>> ScoreScale.of(np.array([0.01] * 50 + [0.5] + [0.0] * 49, np.float32))
        ScoreScale(patches=100, top=64.0)
        """
        n = len(score)
        highest = float(score.max(initial=0.0)) * n * (1 - 1e-6)
        top = max(float(HOTTEST), 2.0 ** math.ceil(math.log2(max(highest, 1.0))))
        return ScoreScale(n, min(top, float(n)))

    def heat(self, score: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how hot scores are, 0 to 1; NaN stays NaN."""
        hot = heat(score, 1 / self.patches, self.top)
        hot[np.isnan(score)] = np.nan
        return hot


def colored(hot: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return values 0 to 1 (h, w) as pixels (h, w, 4) red, green, blue, opacity; transparent where NaN."""
    low, high = (round(255 * share) for share in OPACITY)
    step = np.rint(np.nan_to_num(hot) * 255).astype(np.uint8)
    out = np.empty((*hot.shape, 4), np.uint8)
    out[..., :3] = palette(SCORE_COLORS)[step]
    out[..., 3] = np.where(np.isnan(hot), 0, low + step * ((high - low) / 255))
    return out


def opaque(hot: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return values 0 to 1 (h, w) as pixels (h, w, 3) where there is no image to see through; grey where NaN."""
    out: NDArray[np.uint8] = palette(SCORE_COLORS)[np.rint(np.nan_to_num(hot) * 255).astype(np.int64)]
    out[np.isnan(hot)] = LINE
    return out


def score_raster(
    scores: Scores, task: str | None, shape: tuple[int, int], downsample: float, window: Box | None = None
) -> NDArray[np.float32]:
    """Return the scores as a picture: each pixel has the highest score of the patches that cover it.

    Args:
        scores: of patches with places.
        task: name of a task; default is the mean over all.
        shape: rows and columns of the picture of the whole image.
        downsample: level-0 pixels per pixel of it.
        window: the part of that picture to return, in its pixels; default is all of it.

    Returns:
        (rows, columns) float32, NaN where no patch was scored. A patch smaller than a pixel colours that pixel.
    """
    limits = np.array([shape[1], shape[0]])
    corner, size = (np.zeros(2, np.int64), limits) if window is None else np.split(np.array(window), 2)
    out = np.full(size[::-1], -np.inf, np.float32)
    values = scores.score if task is None else scores.per_task[task]
    low, high = (corner - 2) * downsample, (corner + size + 2) * downsample
    for start in range(0, len(scores), PATCHES_AT_ONCE):
        some = slice(start, start + PATCHES_AT_ONCE)
        boxes = scores.boxes(scores.index[some])
        near = ((boxes[:, :2] < high) & (boxes[:, :2] + boxes[:, 2:] > low)).all(axis=1)
        near &= True if scores.arrived is None else scores.arrived[some]
        edges = np.concatenate([boxes[near, :2], boxes[near, :2] + boxes[near, 2:]], axis=1) / downsample
        first, last = np.split(np.rint(edges).astype(np.int64), 2, axis=1)
        first = np.clip(first, 0, limits - 1)
        last = np.clip(last, first + 1, limits)
        first, last = np.maximum(first - corner, 0), np.minimum(last - corner, size)
        inside = (first < last).all(axis=1)
        _raise(out, first[inside], last[inside], values[some][near][inside])
    out[np.isneginf(out)] = np.nan
    return out


def _raise(
    out: NDArray[np.float32], first: NDArray[np.int64], last: NDArray[np.int64], values: NDArray[np.float32]
) -> None:
    """Raise pixels to the value of each rectangle from `first` to before `last`, x and y (k, 2)."""
    sizes = (last - first) @ np.array([2**32, 1])
    for size in np.unique(sizes).tolist():
        alike, (width, height) = sizes == size, divmod(size, 2**32)
        (x, y), value = first[alike].T, values[alike]
        if len(x) <= width * height:  # few large ones
            for left, top, score in zip(x.tolist(), y.tolist(), value, strict=True):
                area = out[top : top + height, left : left + width]
                np.maximum(area, score, out=area)
        else:
            for down in range(height):
                for right in range(width):
                    np.maximum.at(out, (y + down, x + right), value)


def folded(score: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scores (n,) without places as a square, row by row in their order; NaN where it is not filled."""
    columns = math.ceil(math.sqrt(len(score)))
    values = np.full(-(-len(score) // columns) * columns, np.nan, np.float32)
    values[: len(score)] = score
    return values.reshape(-1, columns)
