"""Plot, table and sentences of `head_to_head.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plotting import COLORS, PLOTS, panels, save

TITLES = {
    "majority": "majority: the digit that is there three times",
    "max": "max: the largest digit",
    "top": "top: the topmost digit",
    "multi": "multi: all digits that are there",
}
LABELS = {
    "published": "published procedure",
    "recipe": "recipe megapixel-mnist",
    "advised": "advised settings",
    "advised-short": "advised settings in two thirds of the epochs",
}
THIRD = 1 / 3
"""The share of the published procedure's time in which the advised settings should reach what it reaches."""


@dataclass(frozen=True)
class Arm:
    """The runs of an arm.

    Attributes:
        name: In `LABELS`.
        runs: By seed, by task: the accuracy after each epoch.
        seconds: Of an epoch on a machine with nothing else to do, evaluation included; several turns.
    """

    name: str
    runs: Mapping[int, Mapping[str, Sequence[float]]]
    seconds: Sequence[float]

    @property
    def pace(self) -> float:
        return statistics.median(self.seconds)

    @property
    def epochs(self) -> int:
        return min(len(curve) for run in self.runs.values() for curve in run.values())

    def at(self, task: str, epoch: int) -> list[float]:
        """Return the accuracy of each seed after an epoch, counted from 1."""
        return [run[task][epoch - 1] for run in self.runs.values()]

    def final(self, task: str) -> list[float]:
        return self.at(task, self.epochs)

    def reaches(self, other: Arm) -> int | None:
        """Return the first epoch from which on the mean of the seeds stays, in every task, at the other's last mean."""
        goal = {task: statistics.mean(other.final(task)) for task in TITLES}
        reached = None
        for epoch in range(self.epochs, 0, -1):
            if any(statistics.mean(self.at(task, epoch)) < goal[task] for task in TITLES):
                break
            reached = epoch
        return reached


def table(arms: Sequence[Arm]) -> list[str]:
    columns = ("arm", "seeds", "epochs", *TITLES, "s an epoch", "minutes")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for arm in arms:
        cells = [spread(arm.final(task)) for task in TITLES]
        turns = f"{arm.pace:.1f} ({min(arm.seconds):.1f} to {max(arm.seconds):.1f})"
        minutes = f"{arm.pace * arm.epochs / 60:.1f}"
        row = (LABELS[arm.name], str(len(arm.runs)), str(arm.epochs), *cells, turns, minutes)
        lines.append(f"| {' | '.join(row)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Show a mean, and the range of the seeds.

    >>> spread([0.5, 0.7])
    '.600 (.500 to .700)'
    """
    shown = [f"{value:.3f}".removeprefix("0") for value in (statistics.mean(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def sentences(arms: Mapping[str, Arm]) -> list[str]:
    """Return what the runs say of the two questions, as they fell out."""
    published, recipe = arms.get("published"), arms.get("recipe")
    if published is None:
        return []
    found = []
    if recipe:
        outside = [
            task
            for task in TITLES
            if not min(published.final(task)) <= statistics.mean(recipe.final(task)) <= max(published.final(task))
        ]
        where = (
            f"outside the range of the published seeds in {', '.join(outside)}"
            if outside
            else "within the range of the published seeds"
        )
        found.append(f"The recipe's mean is {where}.")
    return found + [beside(arm, published) for name, arm in arms.items() if name.startswith("advised")]


def beside(advised: Arm, published: Arm) -> str:
    """Return how high the seeds of an arm end, and what share of the published procedure's time it takes to its end."""
    above = [task for task in TITLES if min(advised.final(task)) > max(published.final(task))]
    said = (
        f"With the {LABELS[advised.name]} each seed ends above each seed of the published procedure in "
        f"{', '.join(above) or 'no task'}. "
    )
    epoch = advised.reaches(published)
    if epoch is None:
        return said + "They do not reach its last accuracy in all tasks."
    minutes, whole = epoch * advised.pace / 60, published.epochs * published.pace / 60
    verdict = "at most" if minutes <= THIRD * whole else "more than"
    return said + (
        f"They are at its last accuracy in all tasks, and stay there, from epoch {epoch} on: after {minutes:.1f} of "
        f"its {whole:.1f} minutes, a share of {minutes / whole:.2f}, which is {verdict} a third."
    )


def draw(arms: Sequence[Arm], name: str) -> Path:
    """Draw accuracy by epoch and by minute: the mean of the seeds, and their range."""
    figure, axes = panels(2 * len(TITLES), len(TITLES))
    for column, (task, title) in enumerate(TITLES.items()):
        for row, scale in enumerate(("epoch", "minutes")):
            axis = axes[row * len(TITLES) + column]
            for arm, color in zip(arms, COLORS, strict=False):
                x = [epoch * (1 if row == 0 else arm.pace / 60) for epoch in range(1, arm.epochs + 1)]
                each = [arm.at(task, epoch) for epoch in range(1, arm.epochs + 1)]
                axis.fill_between(x, [*map(min, each)], [*map(max, each)], color=color, alpha=0.15, linewidth=0)
                axis.plot(x, [*map(statistics.mean, each)], color=color, label=LABELS[arm.name])
            axis.set_xlabel(scale)
            axis.set_ylim(bottom=0)
            if row == 0:
                axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("accuracy on the test canvases")
    return save(figure, "Generated canvases of Megapixel MNIST, 750 px: mean and range of the seeds", PLOTS / name)
