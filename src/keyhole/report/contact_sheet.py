"""A PNG that shows, image by image, what a model predicts and the patches that the prediction rests on.

A row has the image with the kept patches outlined, the prediction, and the best of the kept patches enlarged.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from keyhole.data.item import Item
from keyhole.report.captions import TIED
from keyhole.report.drawing import (
    ATTENTION_COLORS,
    GREY,
    GROUND,
    HOTTEST,
    INK,
    LINE,
    NEUTRAL,
    RIGHT,
    WRONG,
    Page,
    color_at,
    heat,
    percent,
    text_width,
    times,
    wrapped,
)
from keyhole.report.overlay import framed
from keyhole.report.predicted import Pictures, Predicted, pictures_of
from keyhole.tasks.kinds import Task
from keyhole.util.files import write_atomic

MAX_ROWS = 16
"""Largest number of images on the sheet of an evaluation."""

MARGIN, GAP = 32, 28
IMAGE_SIDE, TEXT_WIDTH = 340, 260
PATCH_SIDE, PATCH_GAP, CAPTION, PER_LINE, PATCHES = 142, 10, 23, 4, 8
ROW, HEAD = 2 * (PATCH_SIDE + CAPTION) + PATCH_GAP, 92
TEXT_LEFT = MARGIN + IMAGE_SIDE + GAP
PATCHES_LEFT = TEXT_LEFT + TEXT_WIDTH + GAP
WIDTH = PATCHES_LEFT + PER_LINE * PATCH_SIDE + (PER_LINE - 1) * PATCH_GAP + MARGIN


@dataclass(frozen=True, eq=False)
class SheetEntry:
    """One row: a prediction with pictures, the label as in the CSV, and what is known of the scores of all patches.

    Attributes:
        patch_count: Number of patches.
        tied: Whether the kept patches are only the first of equal ones.
    """

    prediction: Predicted
    truth: str | None = None
    patch_count: int | None = None
    tied: bool = False

    @staticmethod
    def of(prediction: Predicted, truth: str | None = None) -> SheetEntry:
        """Return the row of a prediction without its scores, which need not stay in memory."""
        scores = prediction.scores
        if scores is None:
            return SheetEntry(prediction, truth)
        return SheetEntry(replace(prediction, scores=None), truth, len(scores), scores.tied(prediction.kept.index))

    @property
    def pictures(self) -> Pictures:
        return pictures_of(self.prediction)


class Examples:
    """The first predictions of an evaluation, at most half of them wrong.

    The task decides which predictions are wrong; predictions of numbers and of several labels never are.
    """

    def __init__(self, task: Task, most: int = MAX_ROWS) -> None:
        self.task, self.most = task, most
        self._wrong: list[SheetEntry] = []
        self._others: list[SheetEntry] = []

    def wants(self, item: Item, prediction: Predicted) -> bool:
        """Return whether `add` would hold this prediction; it then needs pictures."""
        if self._is_wrong(item, prediction):
            return len(self._wrong) < self.most // 2
        return len(self._wrong) + len(self._others) < self.most

    def add(self, item: Item, prediction: Predicted) -> None:
        """Hold a prediction if it carries pictures."""
        if prediction.pictures is None:
            return
        entry = SheetEntry.of(prediction, item.labels.get(self.task.name) or None)
        (self._wrong if self._is_wrong(item, prediction) else self._others).append(entry)
        if len(self._wrong) + len(self._others) > self.most:
            self._others.pop()

    def entries(self) -> list[SheetEntry]:
        """Return the entries of the sheet, wrong ones first."""
        return [*self._wrong, *self._others]

    def _is_wrong(self, item: Item, prediction: Predicted) -> bool:
        truth, label = item.labels.get(self.task.name), prediction.label[self.task.name]
        return self.task.exclusive and self.task.is_right(truth, label) is False


def contact_sheet(
    entries: Sequence[SheetEntry],
    path: str | Path,
    title: str = "Predictions and what they rest on",
    task: str | None = None,
) -> Path:
    """Write the sheet of at least one entry; label, truth and attention are those of `task`, by default the first."""
    if not entries:
        raise ValueError("a contact sheet needs at least one entry")
    page = Page(WIDTH, HEAD + len(entries) * (ROW + 2 * GAP) + MARGIN // 2)
    tasks = entries[0].prediction.tasks
    shown = next(each for each in tasks if task in (None, each.name))
    _draw_head(page, title, f" of {shown.name}" if len(tasks) > 1 else "")
    for i, entry in enumerate(entries):
        top = HEAD + i * (ROW + 2 * GAP) + GAP
        page.draw.line([(MARGIN, top - GAP), (WIDTH - MARGIN - 1, top - GAP)], fill=LINE)
        _draw_entry(page, entry, shown, top)
    data = io.BytesIO()
    page.picture.save(data, "PNG")
    return write_atomic(path, data.getvalue())


def _draw_head(page: Page, title: str, which: str) -> None:
    """Draw the title, the scale of colours, and the headings of the columns; `which` names one of several tasks."""
    bar_width = 120
    least, most = "attention: equal share 1/M", f"{HOTTEST}/M, or all"
    right = WIDTH - MARGIN - text_width(most, 14) - 8
    bar_left = right - bar_width
    left = bar_left - text_width(least, 14) - 8
    page.text((left, 24), least, 14, GREY, bar_left - left)
    page.ramp((bar_left, 26), (bar_width, 14), ATTENTION_COLORS)
    page.text((WIDTH - MARGIN - 1, 24), most, 14, GREY, WIDTH - MARGIN - right, align="r")
    page.text((MARGIN, 20), title, 20, INK, left - MARGIN - GAP)
    for left, width, heading in (
        (MARGIN, IMAGE_SIDE, "image with the kept patches"),
        (TEXT_LEFT, TEXT_WIDTH, f"what the model says{which}"),
        (PATCHES_LEFT, WIDTH, "kept patches with the highest attention: its share, and times 1/M"),
    ):
        page.text((left, HEAD - 27), heading, 14, GREY, width)


def _draw_entry(page: Page, entry: SheetEntry, task: Task, top: int) -> None:
    attention = entry.prediction.kept.attention[task.name]
    hot = heat(attention, 1 / len(attention))
    picture = framed(entry.pictures, entry.prediction.kept, task, (IMAGE_SIDE, ROW))
    left = MARGIN + (IMAGE_SIDE - picture.width) // 2
    page.draw.rectangle([MARGIN, top, MARGIN + IMAGE_SIDE - 1, top + ROW - 1], fill=GROUND)
    page.picture.paste(picture, (left, top + (ROW - picture.height) // 2))

    _draw_words(page, entry, task, top)

    pictures = entry.pictures
    for cell, carried in enumerate(np.argsort(-attention[pictures.place], kind="stable")[:PATCHES]):
        i = int(pictures.place[carried])
        x = PATCHES_LEFT + cell % PER_LINE * (PATCH_SIDE + PATCH_GAP)
        y = top + cell // PER_LINE * (PATCH_SIDE + CAPTION + PATCH_GAP)
        page.patch((x, y), PATCH_SIDE, pictures.patches[carried], color_at(ATTENTION_COLORS, float(hot[i])))
        share = f"{percent(float(attention[i]))}  ({times(float(attention[i]) * len(attention))})"
        page.text((x + 1, y + PATCH_SIDE + 3), share, 13, GREY, PATCH_SIDE)


def _draw_words(page: Page, entry: SheetEntry, task: Task, top: int) -> None:
    """Write the name, the true and predicted label, the likeliest classes as bars, and the number of kept patches."""
    prediction, label, left = entry.prediction, entry.prediction.label[task.name], TEXT_LEFT
    page.text((left, top - 2), prediction.name, 18, INK, TEXT_WIDTH, keep_end=True)
    y = top + 36
    if entry.truth:
        page.text((left, y), "true", 14, GREY, 78)
        page.text((left + 80, y - 3), entry.truth, 18, INK, TEXT_WIDTH - 80)
        y += 30
    right = task.is_right(entry.truth, label)
    color = NEUTRAL if right is None else RIGHT if right else WRONG
    page.text((left, y), "predicted", 14, GREY, 78)
    page.text((left + 80, y - 3), label or "none", 18, color, TEXT_WIDTH - 80)
    y += 42
    said = prediction.probability[task.name] if task.classes else {}
    for name in sorted(said, key=lambda name: -said[name])[: 3 if entry.tied else 4]:
        page.text((left, y), name, 15, INK, TEXT_WIDTH - 70)
        page.text((left + TEXT_WIDTH, y), percent(said[name]), 15, GREY, 66, align="r")
        page.draw.rectangle([left, y + 22, left + TEXT_WIDTH - 1, y + 26], fill=GROUND)
        if said[name] * TEXT_WIDTH >= 1:
            shade = color if name in task.split(label) else GREY
            page.draw.rectangle([left, y + 22, left + round(said[name] * TEXT_WIDTH) - 1, y + 26], fill=shade)
        y += 39
    count = entry.patch_count if prediction.scores is None else len(prediction.scores)
    m, of = len(prediction.kept), "" if count is None else f" of {count:,}"
    patches = "patch" if (m if count is None else count) == 1 else "patches"
    lines = [(line, WRONG) for line in wrapped(TIED, 14, TEXT_WIDTH) if entry.tied] + [
        (entry.pictures.note, GREY),
        (f"{prediction.size.width:,} x {prediction.size.height:,} pixels", GREY),
        (f"kept {m:,}{of} {patches}; 1/M is {percent(1 / m)}", GREY),
    ]
    for line, (text, shade) in enumerate(lines):
        page.text((left, top + ROW - 22 * (len(lines) - line)), text, 14, shade, TEXT_WIDTH)
