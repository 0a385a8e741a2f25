"""What is written around the pictures of a prediction: its words, and legends of the two palettes."""

from __future__ import annotations

import math
from typing import NamedTuple

from keyhole.report.drawing import (
    ATTENTION_COLORS,
    GREY,
    HOTTEST,
    INK,
    NEUTRAL,
    SCORE_COLORS,
    WRONG,
    Color,
    Page,
    length,
    percent,
    times,
    wrapped,
)
from keyhole.report.predicted import Predicted, Scores
from keyhole.report.score_layer import ScoreScale
from keyhole.tasks.kinds import Task
from keyhole.util.wording import counted

BETWEEN = "  ·  "
"""Separates facts in a line."""
TIED = "all patches have the same score: these are the first"
"""What is said of kept patches for which `Scores.tied` is True."""
NUMBERED = 8
"""Kept patches whose rank by attention is written beside their frame."""


class Words(NamedTuple):
    """What is written above the pictures of a prediction: its name, the answer, and what was looked at."""

    name: str
    answer: str
    about: str
    doubts: tuple[str, ...]

    @staticmethod
    def of(prediction: Predicted, task: Task) -> Words:
        """Put a prediction of one task into words."""
        label, said = prediction.label[task.name], prediction.probability[task.name]
        shares = [f"{name} {percent(said[name])}" for name in sorted(said, key=lambda name: -said[name])[:4]]
        limits = {n: limit for n, limit in prediction.threshold.get(task.name, {}).items() if limit != task.threshold}
        shares += [f"{name} only above {100 * limit:.3g} %" for name, limit in list(limits.items())[:4]]
        answer = f"{task.name}: {label or 'none'}" + (f"   ({', '.join(shares)})" if task.classes else "")
        patch, mpp = prediction.patch, um_per_pixel(prediction)
        size = f"{prediction.size.width:,} x {prediction.size.height:,} px"
        if mpp is not None:
            size += f" ({length(prediction.size.width * mpp)} x {length(prediction.size.height * mpp)})"
        n = None if prediction.scores is None else len(prediction.scores)
        grid = "patches" if n is None else "1 patch" if n == 1 else f"{n:,} patches"
        if patch.get("size"):
            grid += f" of {patch['size']} px" + (f" at {patch['mpp']:.3g} µm/px" if patch.get("mpp") else "")
        about = [size, grid, f"{len(prediction.kept):,} kept", *([prediction.model] if prediction.model else [])]
        doubts = list(prediction.notes)
        if prediction.pictures is not None and prediction.pictures.note:
            doubts.insert(0, prediction.pictures.note)
        if prediction.scores is not None and prediction.scores.tied(prediction.kept.index):
            doubts.append(TIED)
        if prediction.unreadable is not None:
            doubts.append(f"{counted(len(prediction.unreadable), 'patch', 'patches')} could not be read: not coloured")
        return Words(prediction.name, answer, BETWEEN.join(about), tuple(doubts))

    def draw(self, page: Page, left: int, top: int, width: int, u: float) -> int:
        """Draw the lines from `top` on; return where they end. `u` is the unit of sizes in pixels."""
        small = round(13 * u)
        page.text((left, top), self.name, round(20 * u), INK, width, keep_end=True)
        page.text((left, top + round(30 * u)), self.answer, round(16 * u), NEUTRAL, width)
        top += round(56 * u)
        for line, color in self.lines(small, width):
            page.text((left, top), line, small, color, width)
            top += round(21 * u)
        return top + round(8 * u)

    def height(self, u: float, width: int) -> int:
        """Return the height of what `draw` draws."""
        return round(56 * u) + len(self.lines(round(13 * u), width)) * round(21 * u) + round(8 * u)

    def lines(self, size: int, width: int) -> list[tuple[str, Color]]:
        """Return the lines under the answer with their colours: no fact is split or cut as long as it fits a line."""
        lines = [(line, GREY) for line in wrapped(self.about, size, width, BETWEEN)]
        return lines + [(line, WRONG) for doubt in self.doubts for line in wrapped(doubt, size, width)]


class Legend(NamedTuple):
    """A palette, values at places 0 to 1 along it, and what they are.

    A single value is written beside a patch of its colour.
    """

    colors: tuple[Color, ...]
    ticks: tuple[tuple[float, str], ...]
    text: str

    def draw(self, page: Page, left: int, top: int, width: int, u: float) -> None:
        """Draw the legend."""
        bar, small, gap = (min(width, round(380 * u)), round(14 * u)), round(12 * u), 26
        if len(self.ticks) == 1:
            page.ramp((left, top), (bar[1], bar[1]), self.colors[:1])
            page.text((left + bar[1] + round(8 * u), top), self.ticks[0][1], small, INK, width)
            gap = 8
        else:
            page.ramp((left, top), bar, self.colors)
            for place, tick in self.ticks:
                x, align = left + round(place * (bar[0] - 1)), "l" if place == 0 else "r" if place == 1 else "m"
                page.text((x, top + bar[1] + round(4 * u)), tick, small, INK, bar[0], align=align)
        for number, line in enumerate(wrapped(self.text, small, width)):
            page.text((left, top + bar[1] + round((gap + 17 * number) * u)), line, small, GREY, width)


def attention_legend(m: int, numbered: int = NUMBERED) -> Legend:
    """Return what the colours of the frames around m kept patches mean; the first `numbered` of them have a number."""
    if m == 1:
        return Legend(ATTENTION_COLORS, ((0, "100 %"),), "Frame: the one kept patch (M = 1) has all of the attention.")
    most = min(HOTTEST, m)
    low, high = f"1/M = {percent(1 / m)}", percent(most / m) + (" or more" if most < m else "")
    ticks = ((0, low), (0.5, percent(most**0.5 / m)), (1, high))
    which = f"Numbers 1 to {numbered}: the highest weights" if numbered < m else "Numbers: rank by this weight"
    text = (
        f"Frames: attention weight, the share of a kept patch in the answer; the M = {m:,} kept patches sum to 100 %. "
        f"{which}."
    )
    return Legend(ATTENTION_COLORS, ticks, text)


def score_legend(scale: ScoreScale, scores: Scores, task: str) -> Legend:
    """Return what the colours of the layer mean, and the range of the scores that occur."""
    if scale.patches == 1:
        return Legend(SCORE_COLORS, ((0, "100 %"),), "Colour: score; the one patch (N = 1) has all of the attention.")
    doublings = math.log2(scale.top)
    middle = round(doublings) // 2
    ticks = [(0.0, "1/N or less"), (1.0, f"{times(scale.top)} 1/N")]
    if scale.top > 2:
        ticks.insert(1, (middle / doublings, f"{times(2**middle)} 1/N"))
    text = (
        f"Colours: score, the share of a patch in the attention over all N = {scale.patches:,}, by which the kept ones "
        f"were chosen: here {_range(scale, scores, task)} 1/N. Comparable across this image."
    )
    return Legend(SCORE_COLORS, tuple(ticks), text)


def _range(scale: ScoreScale, scores: Scores, task: str) -> str:
    """Return the lowest and highest score as multiples of an equal share, of the patches that could be read."""
    values = scores.per_task[task]
    values = values if scores.arrived is None else values[scores.arrived]
    low, high = float(values.min()) * scale.patches, float(values.max()) * scale.patches
    least = "less than 0.01 x" if low < 0.01 else times(low)
    return least if least == times(high) else f"{least.removesuffix(' x')} to {times(high)}"


def um_per_pixel(prediction: Predicted) -> float | None:
    """Return microns per level-0 pixel; None where unknown."""
    mpp = prediction.patch.get("mpp")
    return None if mpp is None else float(mpp) / float(prediction.patch["scale"])
