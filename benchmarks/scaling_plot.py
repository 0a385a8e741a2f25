"""The plots of `scaling.py`: time of a step over one factor a panel, with what would be proportional beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plotting import COLORS, GREY, PLOTS, panels, save

if TYPE_CHECKING:
    from scaling import Factor, Point

STEP, LEARNING, PROPORTIONAL = *COLORS[:2], GREY


def draw(found: Mapping[Factor, Sequence[Point]], hardware: str, date: str) -> Path:
    """Write `scaling_HARDWARE.svg` into the documents' plots."""
    figure, axes = panels(len(found), 3)
    for axis, (factor, points) in zip(axes, found.items(), strict=True):
        panel(axis, factor, points)
    title = f"Time of a training step, one factor at a time ({hardware}, {date})"
    return save(figure, title, PLOTS / f"scaling_{hardware}.svg")


def panel(axis: Any, factor: Factor, points: Sequence[Point]) -> None:
    """One factor: whole step, the part of it that learns, and the line of what grows with the factor itself."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = [point.value for point in points]
    seconds = [point.seconds for point in points]
    axis.plot(values, seconds, "o-", color=STEP, linewidth=2, label="whole step")
    learning = [point.seconds * point.shares["learning"] for point in points]
    axis.plot(values, learning, "s--", color=LEARNING, linewidth=1.5, label="of it learning from the kept")
    start = next(place for place, point in enumerate(points) if abs(point.times - 1) < 1e-9)
    if factor.letter != "I":  # the same patches in larger or smaller helpings
        power = {"threads": -1, "patch": 2}.get(factor.letter, 1)
        line = [seconds[start] * (value / values[start]) ** power for value in values]
        axis.plot(values, line, ":", color=PROPORTIONAL, linewidth=1.5, label="in proportion")
    axis.set(xscale="log", yscale="log", xlabel=factor.label, ylabel="seconds")
    axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_title({"patch": "patch side (dotted: pixels)", "threads": "threads"}.get(factor.letter, factor.letter))
