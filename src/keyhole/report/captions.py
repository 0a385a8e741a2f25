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
from keyhole.report.predicted import Predicted
from keyhole.report.score_layer import ScoreScale
from keyhole.tasks.kinds import Task
from keyhole.util.wording import counted


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
        count = "" if prediction.scores is None else f"{len(prediction.scores):,} "
        grid = f"{count}patches"
        if patch.get("size"):
            grid += f" of {patch['size']} px" + (f" at {patch['mpp']:.3g} µm/px" if patch.get("mpp") else "")
        about = [size, grid, f"{len(prediction.kept):,} kept", *([prediction.model] if prediction.model else [])]
        doubts = list(prediction.notes)
        if prediction.pictures is not None and prediction.pictures.note:
            doubts.insert(0, prediction.pictures.note)
        if prediction.unreadable is not None:
            doubts.append(f"{counted(len(prediction.unreadable), 'patch', 'patches')} could not be read: not coloured")
        return Words(prediction.name, answer, "  ·  ".join(about), tuple(doubts))

    def draw(self, page: Page, left: int, top: int, width: int, u: float) -> int:
        """Draw the lines from `top` on; return where they end. `u` is the unit of sizes in pixels."""
        small = round(13 * u)
        page.text((left, top), self.name, round(20 * u), INK, width, keep_end=True)
        page.text((left, top + round(30 * u)), self.answer, round(16 * u), NEUTRAL, width)
        page.text((left, top + round(56 * u)), self.about, small, GREY, width)
        top += round(78 * u)
        for doubt in self.doubts:
            page.text((left, top), doubt, small, WRONG, width)
            top += round(20 * u)
        return top + round(8 * u)

    def height(self, u: float) -> int:
        """Return the height of what `draw` draws."""
        return round(78 * u) + len(self.doubts) * round(20 * u) + round(8 * u)


class Legend(NamedTuple):
    """A palette, values at places 0 to 1 along it, and what they are."""

    colors: tuple[Color, ...]
    ticks: tuple[tuple[float, str], ...]
    text: str

    def draw(self, page: Page, left: int, top: int, width: int, u: float) -> None:
        """Draw the legend."""
        bar, small = (min(width, round(380 * u)), round(14 * u)), round(12 * u)
        page.ramp((left, top), bar, self.colors)
        for place, tick in self.ticks:
            align = "l" if place == 0 else "r" if place == 1 else "m"
            page.text(
                (left + round(place * (bar[0] - 1)), top + bar[1] + round(4 * u)), tick, small, INK, bar[0], align=align
            )
        for number, line in enumerate(wrapped(self.text, small, width)):
            page.text((left, top + bar[1] + round((26 + 17 * number) * u)), line, small, GREY, width)


def attention_legend(m: int) -> Legend:
    """Return what the colours of the frames around m kept patches mean."""
    most = min(HOTTEST, m)
    low, high = f"1/M = {percent(1 / m)}", percent(most / m) + (" or more" if most < m else "")
    ticks = ((0, low), (0.5, percent(most**0.5 / m)), (1, high)) if m > 1 else ((0, "100 %"),)
    text = (
        f"Frames: attention weight, the share of a kept patch in the answer; the M = {m:,} kept patches sum to 100 %. "
        "Numbers: rank by this weight."
    )
    return Legend(ATTENTION_COLORS, ticks, text)


def score_legend(scale: ScoreScale) -> Legend:
    """Return what the colours of the layer mean."""
    steps = round(math.log2(scale.top))
    middle = (steps // 2 / steps, f"{times(2 ** (steps // 2))} 1/N") if scale.top > 2 else (0, "")
    ticks = ((0, "1/N or less"), middle, (1, f"{times(scale.top)} 1/N"))
    text = (
        f"Colours: score, the share of a patch in the attention over all N = {scale.patches:,}, by which the kept ones "
        "were chosen. Comparable across this image."
    )
    return Legend(SCORE_COLORS, ticks, text)


def um_per_pixel(prediction: Predicted) -> float | None:
    """Return microns per level-0 pixel; None where unknown."""
    mpp = prediction.patch.get("mpp")
    return None if mpp is None else float(mpp) / float(prediction.patch["scale"])
