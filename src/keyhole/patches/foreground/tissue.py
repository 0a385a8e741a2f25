"""Which cells of a small picture of a slide show stained tissue: not glass, pen, black borders or specks.

Works on mean colours, cell by cell, with three facts about slides in bright light. Glass is bright and nearly without
colour. Tissue is stained: its colour passes Otsu's threshold. Pen is dye of a purity that histological stains do not
have: H&E and DAB with haematoxylin absorb in all three channels, marker pens hardly at all in one of them.

Optical density (OD) of a channel is -log(value / glass): twice the dye, twice the OD, so that the proportions of the
three tell which dye it is, however thin.
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

LEAST_COLOR = 13
"""Otsu's threshold splits even an empty slide in two; glass stays below 5 % of 255, stained tissue above."""
SURELY_STAINED = 24
"""Where dense stain is next to pale, or nothing is glass, Otsu splits the tissue itself: never above this."""
GLASS, WHITE = 205, 254
"""Glass is at least this bright in every channel; from 254 on it is no glass but what the scanner did not scan."""
FALL_OFF = 12
"""Grey values by which the light on glass may differ over a slide: cells as bright as the brightest but for this."""
NEARLY_BLACK = 50
"""Below this brightness there is no telling colours: borders, unscanned areas, black pen."""
DARK, DARK_COLOR = 120, 0.25
"""A darker cell whose channels differ by less than this share of the brightest is black pen or shadow, not stain."""
PEN_REACH = 3
"""Cells around sure pen that are pen too if their hue is: the pale edge of a stroke."""
SPECK = 3
"""A cell is kept if its 3 x 3 neighbourhood has so many of tissue: specks of one or two cells are dust and noise."""
_BAND = 2**18
"""Cells worked on at a time, so that fractions do not take ten times the memory of the picture."""
_DENSITY = -np.log(np.maximum(np.arange(256, dtype=np.float32), 1) / 255)
"""OD of each value on white glass."""


def find_tissue(mean: Cells, spread: NDArray[np.uint8]) -> Mask:
    """Cells with stained tissue, bool (rows, cols).

    A cell is tissue if its colour (max - min over the channels, of 255, with glass made white) is above Otsu's
    threshold over all cells that are not pen or black, held between 13 and 24. Pen in blue, green, red or black, what
    is nearly black, and specks of one or two cells are left out; anything larger stays, for a small biopsy must not
    vanish.

    Made for H&E and for DAB with haematoxylin. Special stains of pure green or blue (trichrome, Alcian blue) may be
    taken for pen, unstained fat for glass, and navy or very pale pens for haematoxylin: give such slides a mask file.

    Args:
        mean: mean colour (rows, cols, 3) of each cell.
        spread: mean (rows, cols) of max - min over the channels of the pixels in each cell. More than that of the mean
            colour where colours lie side by side: brown and blue together would make grey.
    """
    glass = glass_color(mean)
    color = _colors(mean, spread, glass)
    usable = ~find_pen(mean, color, glass)
    for rows in _bands(mean):
        usable[rows] &= extremes(mean[rows])[0] >= NEARLY_BLACK
    # Dense stain counts as no more than twice the highest threshold, so that it does not outweigh all that is pale.
    threshold = np.clip(otsu(np.minimum(color[usable], 2 * SURELY_STAINED)), LEAST_COLOR, SURELY_STAINED)
    return _without_specks(usable & (color > threshold))


def glass_color(mean: Cells) -> NDArray[np.float32]:
    """Red, green and blue of the slide's glass, or white where hardly any glass is to be seen."""
    brightest, darkest = extremes(mean)
    bright = mean[(darkest >= GLASS) & (darkest < WHITE)]
    if len(bright) < max(1, 0.01 * np.count_nonzero(brightest >= NEARLY_BLACK)):
        return np.full(3, 255, np.float32)
    light = bright @ np.ones(3, np.int16)
    glass: NDArray[np.float32] = np.median(bright[light >= np.percentile(light, 99) - 3 * FALL_OFF], axis=0)
    return glass.astype(np.float32)


def _colors(mean: Cells, spread: NDArray[np.uint8], glass: NDArray[np.float32]) -> NDArray[np.uint8]:
    """How coloured each cell is: of its mean on white glass, and what its pixels have over that beyond noise."""
    excess = np.empty(mean.shape[:2], np.int16)
    color = np.empty(mean.shape[:2], np.int16)
    bright = np.empty(mean.shape[:2], bool)
    for rows in _bands(mean):
        brightest, darkest = extremes(mean[rows])
        excess[rows] = spread[rows].astype(np.int16) - (brightest - darkest)
        brightest, darkest = extremes(_whitened(mean[rows], glass))
        color[rows] = brightest - darkest
        bright[rows] = darkest >= 255 - FALL_OFF
    noise = np.median(excess[bright]) if bright.any() else 0
    found: NDArray[np.uint8] = (color + np.maximum(excess - int(noise), 0)).clip(0, 255).astype(np.uint8)
    return found


def find_pen(mean: Cells, color: NDArray[np.uint8], glass: NDArray[np.float32]) -> Mask:
    """Strokes of blue, green, red and black marker, their pale edges included."""
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
    """Per pen: where it surely is, and where the hue is its own, however pale."""
    shape = mean.shape[:2]
    sure, hue = np.zeros((4, *shape), bool), np.zeros((4, *shape), bool)
    for rows in _bands(mean):
        white = _whitened(mean[rows], glass)
        red, green, blue = np.moveaxis(white.astype(np.int16), -1, 0)
        od_red, od_green, od_blue = np.moveaxis(_DENSITY[white], -1, 0)
        brightest, darkest = (extreme.astype(np.int16) for extreme in extremes(white))
        colored = brightest - darkest >= LEAST_COLOR
        purity = (brightest - darkest) / np.maximum(brightest, 1)
        # Haematoxylin absorbs blue at least a third as much as red; blue dyes a tenth to a fifth.
        bluish = colored & (od_blue < 0.3 * od_red) & (red < blue)
        greenish = colored & (green > red) & (green > blue)
        # Eosin absorbs half as much blue as green, brown (DAB) more blue than green but red too.
        reddish = colored & (od_red < 0.25 * od_green) & (od_blue > 0.62 * od_green) & (red > blue)
        blackish = (brightest < DARK) & (color[rows] < DARK_COLOR * brightest)
        hue[:, rows] = bluish, greenish, reddish, blackish
        sure[:, rows] = (
            bluish & (purity > 0.5),
            greenish & (green - np.maximum(red, blue) >= 15) & (purity > 0.3),
            reddish & (purity > 0.72),
            blackish & (brightest >= NEARLY_BLACK),
        )
    yield from zip(sure, hue, strict=True)


def otsu(values: Cells) -> int:
    """The t that best splits `values` into <= t and > t: greatest variance between the two (Otsu 1979)."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    below = counts.cumsum()
    moment = (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return int(np.nanargmax(between)) if np.isfinite(between).any() else 255


def _whitened(mean: Cells, glass: NDArray[np.float32]) -> Cells:
    """The colours as they would be on white glass."""
    white: Cells = np.minimum(mean * (255 / glass), 255).astype(np.uint8)
    return white


def extremes(pixels: Cells) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Greatest and least channel (...) of colours (..., 3); five times as fast as max and min over an axis of three."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def _without_specks(mask: Mask) -> Mask:
    padded = np.pad(mask, 1).astype(np.uint8)
    across = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    kept: Mask = mask & (across[:-2] + across[1:-1] + across[2:] >= SPECK)
    return kept


def _filtered(mask: Mask, rank: ImageFilter.RankFilter) -> Mask:
    """A rank filter by Pillow; the border is repeated."""
    return np.asarray(PIL.Image.fromarray(mask.astype(np.uint8)).filter(rank)).astype(bool)


def _bands(mean: Cells) -> Iterator[slice]:
    high = max(1, _BAND // max(1, mean.shape[1]))
    for top in range(0, len(mean), high):
        yield slice(top, top + high)
