"""What a model keeps of a few fixed images, epoch by epoch, so that one sees the selection learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as Picture

from keyhole.errors import RunError
from keyhole.report.drawing import (
    ATTENTION_COLORS,
    GREY,
    GROUND,
    INK,
    LINE,
    NEUTRAL,
    RIGHT,
    WRONG,
    Page,
    color_at,
    heat,
    percent,
)
from keyhole.report.overlay import framed
from keyhole.report.predicted import KeptPatches, Predicted, pictures_of
from keyhole.tasks.kinds import Task

MARGIN, GAP, HEAD, CAPTION = 28, 14, 84, 26
TEXT_WIDTH, SIDE = 190, 196
MIN_WIDTH = 700
MAX_EARLIER = 4
"""Largest number of earlier epochs beside the last one."""
PATCHES, PER_LINE, CELL = 6, 3, (SIDE - 6) // 2


@dataclass(frozen=True, eq=False)
class Look:
    """What a model said of an image after an epoch, and the patches that it kept, for one task."""

    epoch: int
    label: str
    share: float | None
    kept: KeptPatches

    @staticmethod
    def of(prediction: Predicted, task: Task, epoch: int) -> Look:
        label = prediction.label[task.name]
        return Look(epoch, label, prediction.probability[task.name].get(label), prediction.kept)

    def to_json(self, task: Task) -> dict[str, Any]:
        attention = [round(float(weight), 5) for weight in self.kept.attention[task.name]]
        boxes = self.kept.boxes.tolist()
        return {"epoch": self.epoch, "label": self.label, "share": self.share, "boxes": boxes, "attention": attention}

    @staticmethod
    def from_json(data: dict[str, Any], task: Task) -> Look:
        """Return the look that `to_json` wrote, or raise RunError."""
        try:
            boxes = np.array(data["boxes"], np.int64).reshape(-1, 4)
            attention = np.array(data["attention"], np.float32)
            kept = KeptPatches(
                np.arange(len(boxes)), boxes, attention / attention.sum(), {task.name: attention / attention.sum()}
            )
            share = None if data["share"] is None else float(data["share"])
            return Look(int(data["epoch"]), str(data["label"]), share, kept)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise RunError(f"what was kept in an earlier epoch is damaged ({error!r})") from error


class SampleRow(NamedTuple):
    """One image: its prediction after the last epoch, with pictures, its true label, and earlier looks."""

    prediction: Predicted
    truth: str | None
    earlier: Sequence[Look]


def shown_epochs(epochs: Sequence[int]) -> list[int]:
    """Return those of the earlier epochs that are shown, spread evenly over the given ones.

    >>> shown_epochs([1, 2, 4, 8, 16, 32])
    [1, 4, 8, 32]
    """
    if len(epochs) <= MAX_EARLIER:
        return list(epochs)
    return [epochs[round(place)] for place in np.linspace(0, len(epochs) - 1, MAX_EARLIER)]


def sample_sheet(samples: Sequence[SampleRow], task: Task, epoch: int, title: str, blind: float = 0) -> Picture.Image:
    """Draw a row for each sample: what it is, what was kept in earlier epochs and in this one, and the best patches.

    In the first `blind` epochs attention is uniform, so that the first patches are kept; the heading says so.
    """
    columns = shown_epochs(sorted({look.epoch for sample in samples for look in sample.earlier}))
    patches_left = MARGIN + TEXT_WIDTH + GAP + (len(columns) + 1) * (SIDE + GAP)
    with_patches = any(len(pictures_of(sample.prediction).patches) for sample in samples)  # stored features have none
    right = patches_left + (PER_LINE * (CELL + 6) - 6 if with_patches else -GAP)
    width = max(right, MIN_WIDTH) + MARGIN
    row = SIDE + CAPTION + 2 * GAP
    page = Page(width, HEAD + len(samples) * row + MARGIN // 2)
    page.text((MARGIN, 18), title, 18, INK, width - 2 * MARGIN - 330)
    page.ramp((width - MARGIN - 120, 22), (120, 14), ATTENTION_COLORS)
    page.text((width - MARGIN - 128, 20), "attention from 1/M to 16/M, or all", 12, GREY, 240, align="r")
    for number, shown in enumerate([*columns, epoch]):
        x = MARGIN + TEXT_WIDTH + GAP + number * (SIDE + GAP)
        page.text((x, HEAD - 24), f"epoch {shown}{', not selecting yet' if shown <= blind else ''}", 13, GREY, SIDE)
    if with_patches:
        page.text((patches_left, HEAD - 24), f"most attended, epoch {epoch}", 13, GREY, width - patches_left)
    for number, sample in enumerate(samples):
        top = HEAD + number * row + GAP
        page.draw.line([(MARGIN, top - GAP), (width - MARGIN - 1, top - GAP)], fill=LINE)
        _draw_sample(page, sample, task, (top, columns, epoch))
        _draw_patches(page, sample.prediction, task, (patches_left, top))
    return page.picture


def _draw_sample(page: Page, sample: SampleRow, task: Task, place: tuple[int, list[int], int]) -> None:
    (top, columns, epoch), prediction = place, sample.prediction
    page.text((MARGIN, top), prediction.name, 15, INK, TEXT_WIDTH, keep_end=True)
    if sample.truth:
        page.text((MARGIN, top + 28), "true", 13, GREY, TEXT_WIDTH)
        page.text((MARGIN, top + 46), sample.truth, 15, INK, TEXT_WIDTH)
    size, m = prediction.size, len(prediction.kept)
    count = "" if prediction.scores is None else f" of {len(prediction.scores):,}"
    page.text((MARGIN, top + SIDE - 40), f"{size.width:,} x {size.height:,} px", 12, GREY, TEXT_WIDTH)
    page.text((MARGIN, top + SIDE - 20), f"kept {m:,}{count} patches", 12, GREY, TEXT_WIDTH)
    by_epoch = {look.epoch: look for look in sample.earlier} | {epoch: Look.of(prediction, task, epoch)}
    for number, shown in enumerate([*columns, epoch]):
        x = MARGIN + TEXT_WIDTH + GAP + number * (SIDE + GAP)
        page.draw.rectangle([x, top, x + SIDE - 1, top + SIDE - 1], fill=GROUND)
        if (look := by_epoch.get(shown)) is None:
            continue
        picture = framed(pictures_of(prediction), look.kept, task, (SIDE, SIDE))
        page.picture.paste(picture, (x + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        right = task.is_right(sample.truth, look.label)
        color, mark = (NEUTRAL, "") if right is None else (RIGHT, "\u2713 ") if right else (WRONG, "\u2717 ")
        share = "" if look.share is None else f"  {percent(look.share)}"
        page.text((x, top + SIDE + 5), f"{mark}{look.label or 'none'}{share}", 13, color, SIDE)


def _draw_patches(page: Page, prediction: Predicted, task: Task, place: tuple[int, int]) -> None:
    (left, top), shown = place, pictures_of(prediction)
    attention = prediction.kept.attention[task.name]
    hot = heat(attention, 1 / len(attention))
    for number, carried in enumerate(np.argsort(-attention[shown.place], kind="stable")[:PATCHES].tolist()):
        at = left + number % PER_LINE * (CELL + 6), top + number // PER_LINE * (CELL + 6)
        color = color_at(ATTENTION_COLORS, float(hot[shown.place[carried]]))
        page.patch(at, CELL, shown.patches[carried], color)
