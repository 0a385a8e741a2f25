"""The plots of `scaling.py`: time of a step over one factor a panel, with what would be proportional beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaling import Factor, Point

STEP, LEARNING, PROPORTIONAL = "#0b5394", "#b45f06", "#8a8a8a"


def draw(found: Mapping[Factor, Sequence[Point]], folder: Path, hardware: str, date: str) -> Path:
    """Writes `scaling_HARDWARE.svg`; the same figures give the same file."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"font.size": 11, "svg.hashsalt": "keyhole", "axes.spines.top": False})
    mpl.rcParams.update({"axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 12})
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.5 * rows + 0.6), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (factor, points) in zip(axes.flat, found.items(), strict=False):
        panel(axis, factor, points)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=11)
    figure.suptitle(f"Time of a training step, one factor at a time ({hardware}, {date})", fontsize=13)
    figure.tight_layout(rect=(0, 0.06, 1, 0.99))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"scaling_{hardware}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path


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
    axis.grid(color="#e0e0e0", linewidth=0.6)
