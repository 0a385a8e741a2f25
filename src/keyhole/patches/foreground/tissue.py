"""Find stained tissue in a small picture of a slide, without glass, pen, black borders and specks.

Works on the mean colours of cells, with three facts about slides in bright light. Glass is bright and nearly without
colour. Tissue is stained: its colour passes Otsu's threshold. Pen is dye of a purity that histological stains do not
have: H&E and DAB with haematoxylin absorb in all three channels, marker pens hardly at all in one of them.

The optical density (OD) of a channel is -log(value / glass). Twice the dye has twice the OD, so that the proportions of
the three channels identify a dye, however thin it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageFilter

Cells = NDArray[np.uint8]
"""Mean colour (rows, cols, 3) of each cell."""
Mask = NDArray[np.bool_]

MIN_COLOR_THRESHOLD = 13
"""Otsu's threshold splits even an empty slide in two; glass stays below 5 % of 255, stained tissue above."""
MAX_COLOR_THRESHOLD = 24
"""Where dense stain is next to pale stain, or nothing is glass, Otsu's threshold would split the tissue itself."""
MIN_GLASS, MIN_UNSCANNED = 205, 254
"""Glass is at least this bright in every channel; from 254 on the scanner did not scan."""
MAX_FALL_OFF = 12
"""Grey values by which the light on glass may differ over a slide."""
MIN_BRIGHTNESS = 50
"""Below this brightness colours cannot be told apart: borders, unscanned areas, black pen."""
MAX_DARK, MAX_DARK_COLOR = 120, 0.25
"""A darker cell whose channels differ by less than this share of the brightest is black pen or shadow, not stain."""
PEN_REACH = 3
"""Cells around certain pen that are pen too if they have its hue: the pale edge of a stroke."""
MIN_TISSUE_NEIGHBOURS = 3
"""Tissue cells in the 3 x 3 neighbourhood of a tissue cell, itself included; smaller specks are dust and noise."""
_BAND_CELLS = 2**18
"""Cells computed at a time, so that fractions do not take ten times the memory of the picture."""
_DENSITY = -np.log(np.maximum(np.arange(256, dtype=np.float32), 1) / 255)
"""OD of each value on white glass."""


def find_tissue(mean: Cells, spread: NDArray[np.uint8]) -> Mask:
    """Find the cells with stained tissue.

    A cell is tissue if its colour (max - min over the channels, of 255, with glass made white) is above Otsu's
    threshold over all cells that are not pen or black, clipped to 13 ... 24. Specks of one or two cells are left out;
    anything larger stays, because a small biopsy must not vanish.

    Made for H&E and for DAB with haematoxylin. It may mistake special stains of pure green or blue (trichrome, Alcian
    blue) for pen, unstained fat for glass, and navy or very pale pens for haematoxylin: give such slides a mask file.

    `mean` is the mean colour (rows, cols, 3) of each cell, and `spread` the mean (rows, cols) of max - min over the
    channels of its pixels, which shows colours side by side: the mean of brown and blue is grey.
    """
    glass = glass_color(mean)
    color = _colors(mean, spread, glass)
    usable = ~find_pen(mean, color, glass)
    for rows in _bands(mean):
        usable[rows] &= extremes(mean[rows])[0] >= MIN_BRIGHTNESS
    # Dense stain counts as no more than twice the highest threshold, so that it does not outweigh all that is pale.
    split = otsu(np.minimum(color[usable], 2 * MAX_COLOR_THRESHOLD))
    tissue = usable & (color > np.clip(split, MIN_COLOR_THRESHOLD, MAX_COLOR_THRESHOLD))
    padded = np.pad(tissue, 1).astype(np.uint8)
    across = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    kept: Mask = tissue & (across[:-2] + across[1:-1] + across[2:] >= MIN_TISSUE_NEIGHBOURS)
    return kept


def glass_color(mean: Cells) -> NDArray[np.float32]:
    """Return red, green and blue of the slide's glass, or white if there is hardly any glass."""
    brightest, darkest = extremes(mean)
    bright = mean[(darkest >= MIN_GLASS) & (darkest < MIN_UNSCANNED)]
    if len(bright) < max(1, 0.01 * np.count_nonzero(brightest >= MIN_BRIGHTNESS)):
        return np.full(3, 255, np.float32)
    light = bright @ np.ones(3, np.int16)
    glass: NDArray[np.float32] = np.median(bright[light >= np.percentile(light, 99) - 3 * MAX_FALL_OFF], axis=0)
    return glass.astype(np.float32)


def _colors(mean: Cells, spread: NDArray[np.uint8], glass: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return how coloured each cell is: its mean on white glass, plus what its pixels have beyond that and noise."""
    excess, color = np.empty((2, *mean.shape[:2]), np.int16)
    bright = np.empty(mean.shape[:2], bool)
    for rows in _bands(mean):
        brightest, darkest = extremes(mean[rows])
        excess[rows] = spread[rows].astype(np.int16) - (brightest - darkest)
        brightest, darkest = extremes(_whitened(mean[rows], glass))
        color[rows] = brightest - darkest
        bright[rows] = darkest >= 255 - MAX_FALL_OFF
    noise = np.median(excess[bright]) if bright.any() else 0
    found: NDArray[np.uint8] = (color + np.maximum(excess - int(noise), 0)).clip(0, 255).astype(np.uint8)
    return found


def find_pen(mean: Cells, color: NDArray[np.uint8], glass: NDArray[np.float32]) -> Mask:
    """Find strokes of blue, green, red and black marker, including their pale edges."""
    found = np.zeros(mean.shape[:2], bool)
    for sure, hue in _pens(mean, color, glass):
        # Single cells are nuclei, pigment or noise: a stroke fills most of every neighbourhood.
        stroke = _filtered(sure, ImageFilter.MedianFilter(3))
        if not stroke.any():
            continue
        for _ in range(PEN_REACH):
            stroke |= hue & _filtered(stroke, ImageFilter.MaxFilter(3))
        found |= _filtered(stroke, ImageFilter.MaxFilter(3))
    return found


def _pens(mean: Cells, color: NDArray[np.uint8], glass: NDArray[np.float32]) -> Iterator[tuple[Mask, Mask]]:
    """Yield for each pen where it certainly is, and where the hue is its own, however pale."""
    shape = mean.shape[:2]
    sure, hue = np.zeros((4, *shape), bool), np.zeros((4, *shape), bool)
    for rows in _bands(mean):
        white = _whitened(mean[rows], glass)
        red, green, blue = np.moveaxis(white.astype(np.int16), -1, 0)
        od_red, od_green, od_blue = np.moveaxis(_DENSITY[white], -1, 0)
        brightest, darkest = (extreme.astype(np.int16) for extreme in extremes(white))
        colored = brightest - darkest >= MIN_COLOR_THRESHOLD
        purity = (brightest - darkest) / np.maximum(brightest, 1)
        # Haematoxylin absorbs blue at least a third as much as red; blue dyes a tenth to a fifth.
        bluish = colored & (od_blue < 0.3 * od_red) & (red < blue)
        greenish = colored & (green > red) & (green > blue)
        # Eosin absorbs half as much blue as green, brown (DAB) more blue than green but red too.
        reddish = colored & (od_red < 0.25 * od_green) & (od_blue > 0.62 * od_green) & (red > blue)
        blackish = (brightest < MAX_DARK) & (color[rows] < MAX_DARK_COLOR * brightest)
        hue[:, rows] = bluish, greenish, reddish, blackish
        sure[:, rows] = (
            bluish & (purity > 0.5),
            greenish & (green - np.maximum(red, blue) >= 15) & (purity > 0.3),
            reddish & (purity > 0.72),
            blackish & (brightest >= MIN_BRIGHTNESS),
        )
    yield from zip(sure, hue, strict=True)


def otsu(values: Cells) -> int:
    """Return the t that best splits `values` into <= t and > t: greatest variance between the two (Otsu 1979)."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = counts.cumsum()
    moment = (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return int(np.nanargmax(between)) if np.isfinite(between).any() else 255


def _whitened(mean: Cells, glass: NDArray[np.float32]) -> Cells:
    """Return the colours as they would be on white glass."""
    white: Cells = np.minimum(mean * (255 / glass), 255).astype(np.uint8)
    return white


def extremes(pixels: Cells) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the greatest and least channel (...) of colours (..., 3), five times as fast as max and min."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def _filtered(mask: Mask, rank: ImageFilter.RankFilter) -> Mask:
    """Apply a rank filter; the border is repeated."""
    return np.asarray(PIL.Image.fromarray(mask.astype(np.uint8)).filter(rank)).astype(bool)


def _bands(mean: Cells) -> Iterator[slice]:
    high = max(1, _BAND_CELLS // max(1, mean.shape[1]))
    for top in range(0, len(mean), high):
        yield slice(top, top + high)
