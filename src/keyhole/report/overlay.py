"""A picture of one prediction: the image with its kept patches, and the score of every patch as a layer over it.

It is drawn from what the prediction carries, so that map and number cannot disagree; no image is opened.
"""

from __future__ import annotations

import numpy as np
from PIL import Image as Picture

from keyhole.report.captions import NUMBERED, Words, attention_legend, score_legend, um_per_pixel
from keyhole.report.drawing import WHITE, Frames, Page, as_picture, heat
from keyhole.report.predicted import KeptPatches, Pictures, Predicted, pictures_of
from keyhole.report.score_layer import ScoreScale, colored, opaque, score_raster
from keyhole.tasks.kinds import Task

MIN_SIDE, MAX_SIDE = 560, 1024
"""Longer side of a panel in pixels: that of the thumbnail, within these limits."""
FADED = 0.4
"""Share of white in the grey image under the scores, so that their colours are those of the legend."""


def framed(shown: Pictures, kept: KeptPatches, task: Task, bounds: tuple[int, int]) -> Picture.Image:
    """Return the thumbnail within a width and height, with a frame around every kept patch, by its attention."""
    picture = as_picture(shown.thumbnail)
    zoom = min(bounds[0] / picture.width, bounds[1] / picture.height)
    size = max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom))
    picture = picture.resize(size, Picture.Resampling.LANCZOS if zoom < 1 else Picture.Resampling.BICUBIC)
    placed = kept.boxes[:, 2:].any(axis=1)  # features may have no coordinates
    hot = heat(kept.attention[task.name], 1 / len(kept))
    Frames(picture).add(kept.boxes[placed] * (zoom / shown.downsample), hot[placed])
    return picture


def panel(prediction: Predicted, task: Task, side: int, layer: bool = True) -> Picture.Image:
    """Draw the image with its kept patches outlined, and the score of every patch as a layer over it.

    Args:
        prediction: with pictures.
        task: whose scores and attention are shown.
        side: longer side in pixels.
        layer: draw the scores; where there is no image they are always drawn.

    Returns:
        RGB; the width of a frame and its colour tell the attention weight.
    """
    shown, kept = pictures_of(prediction), prediction.kept
    height, width = shown.thumbnail.shape[:2]
    zoom = side / max(height, width)
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    picture = as_picture(shown.thumbnail).resize(
        size, Picture.Resampling.LANCZOS if zoom < 1 else Picture.Resampling.BICUBIC
    )
    downsample = shown.downsample / zoom
    placed = kept.boxes[:, 2:].any(axis=1)
    scores = prediction.scores
    if scores is not None and placed.any() and (layer or shown.of_scores):
        hot = ScoreScale.of(scores.per_task[task.name]).heat(score_raster(scores, task.name, size[::-1], downsample))
        if shown.of_scores:
            picture = Picture.fromarray(opaque(hot))
        else:
            grey = Picture.blend(picture.convert("L").convert("RGB"), Picture.new("RGB", size, WHITE), FADED)
            picture = Picture.alpha_composite(grey.convert("RGBA"), Picture.fromarray(colored(hot))).convert("RGB")
    attention, numbered = kept.attention[task.name][placed], not layer or shown.of_scores
    frames = Frames(picture, least=max(5, side // 90), width=max(2, side // 360) if numbered else 1)
    boxes = frames.add(kept.boxes[placed] / downsample, heat(attention, 1 / len(kept)))
    if numbered:
        frames.number(boxes, np.argsort(-attention, kind="stable")[:NUMBERED].tolist(), max(11, side // 60))
    return picture


def overlay(prediction: Predicted, task: Task) -> Picture.Image:
    """Draw the picture of a prediction: kept patches, scores, a legend of each, and a scale bar if microns are known.

    Two panels, beside each other or, of a wide image, one above the other; one where there is no image.

    Args:
        prediction: with pictures, and with scores.
        task: one of its tasks.
    """
    shown, scores = pictures_of(prediction), prediction.scores
    side = min(max(max(shown.thumbnail.shape[:2]), MIN_SIDE), MAX_SIDE)
    u, m = side / MIN_SIDE, len(prediction.kept)
    panels = [] if shown.of_scores else [(panel(prediction, task, side, layer=False), [attention_legend(m)])]
    if scores is not None:
        legend = score_legend(ScoreScale.of(scores.per_task[task.name]), scores, task.name)
        legends = [legend, attention_legend(m)] if shown.of_scores else [legend]
        panels.append((panel(prediction, task, side), legends))
    width, height = panels[0][0].size
    margin, gap, legend_height = round(28 * u), round(24 * u), round(104 * u)
    block = max(width, round(470 * u))
    beside = len(panels) > 1 and width <= 1.5 * height
    mpp = um_per_pixel(prediction) if prediction.kept.boxes[:, 2:].any() else None
    under = round((14 if mpp is None else 34) * u)
    words = Words.of(prediction, task)
    across, down = (len(panels), 1) if beside else (1, len(panels))
    inner = across * block + (across - 1) * gap
    top = margin + words.height(u, inner)
    below = under + sum(legend_height for _ in panels[-1][1])
    page = Page(2 * margin + inner, top + down * (height + below) + (down - 1) * gap + margin // 2)
    words.draw(page, margin, margin, inner, u)
    for number, (picture, legends) in enumerate(panels):
        x = margin + number * (block + gap) * beside
        y = top + number * (height + below + gap) * (not beside)
        page.picture.paste(picture, (x, y))
        if mpp is not None:
            downsample = shown.downsample * max(shown.thumbnail.shape[:2]) / side
            page.scale((x, y + height + round(8 * u)), width / 4, mpp * downsample, u)
        at = y + height + under
        for legend in legends:
            legend.draw(page, x, at, block, u)
            at += legend_height
    return page.picture
