"""A contact sheet of one prediction: its kept patches by attention weight, each with its weight and its place."""

from __future__ import annotations

import numpy as np
from PIL import Image as Picture

from keyhole.report.captions import Words, attention_legend, um_per_pixel
from keyhole.report.drawing import ATTENTION_COLORS, GREY, INK, Page, color_at, heat, percent, times
from keyhole.report.pictures import MAX_PATCHES
from keyhole.report.predicted import Predicted, pictures_of
from keyhole.tasks.kinds import Task

MARGIN, CELL, GAP, CAPTION = 28, 142, 12, 40
MIN_COLUMNS, MAX_COLUMNS = 5, 8
LEGEND_HEIGHT = 130


def kept_sheet(prediction: Predicted, task: Task) -> Picture.Image:
    """Draw the kept patches with the highest attention, at most `MAX_PATCHES`, the highest first.

    Args:
        prediction: with pictures. Patches without pixels, such as stored features without a slide, are grey.
        task: whose attention is shown.
    """
    shown, kept = pictures_of(prediction), prediction.kept
    attention, m = kept.attention[task.name], len(kept)
    hot, order = heat(attention, 1 / m), np.argsort(-attention, kind="stable")[:MAX_PATCHES]
    pixels = dict(zip(shown.place.tolist(), shown.patches, strict=True))
    columns = min(max(len(order), MIN_COLUMNS), MAX_COLUMNS)
    width = columns * (CELL + GAP) - GAP
    words = Words.of(prediction, task)
    top, row = MARGIN + words.height(1, width) + 6, CELL + CAPTION + GAP
    page = Page(width + 2 * MARGIN, top + -(-len(order) // columns) * row + LEGEND_HEIGHT)
    words.draw(page, MARGIN, MARGIN, width, 1)
    for number, i in enumerate(order.tolist()):
        x, y = MARGIN + number % columns * (CELL + GAP), top + number // columns * row
        page.patch((x, y), CELL, pixels.get(i), color_at(ATTENTION_COLORS, float(hot[i])))
        weight = f"{number + 1}:  {percent(float(attention[i]))}  ({times(float(attention[i]) * m)})"
        page.text((x, y + CELL + 3), weight, 12, INK, CELL)
        left, upper, *sides = kept.boxes[i].tolist()
        place = f"x {left:,}  y {upper:,}" if any(sides) else f"number {kept.index[i]:,}"
        page.text((x, y + CELL + 20), place, 11, GREY, CELL)
    bottom = page.picture.height - LEGEND_HEIGHT + 6
    legend, mpp = attention_legend(m, len(order)), um_per_pixel(prediction)
    hidden = " Only these are shown." if len(order) < m else ""
    text = f"{legend.text} In brackets times 1/M. x, y: upper left corner in pixels of the full resolution.{hidden}"
    legend._replace(text=text).draw(page, MARGIN, bottom, width, 1)
    um = None if mpp is None else float(kept.boxes[order[0], 2]) * mpp
    if um and shown.patches.size:
        page.scale((MARGIN + 420, bottom), CELL - 8, um / (CELL - 8), 1)
    return page.picture
