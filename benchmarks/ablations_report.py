"""Tables, plots and sentences of `ablations.py`: accuracy over one setting at a time, and the claims of the paper."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_steps import SLACK_BYTES, SORTING
from plotting import COLORS, GREY, panels, save
from result import Figure, Result
from results import shown
from small_data import SETTINGS

SETTING = SETTINGS["canvases"]
TASKS = ("majority", "max", "top", "multi")
SMALL_LOSS = 0.05
"""The largest loss of accuracy that counts as small."""
SIGNIFICANT = 0.05
"""Differences less probable than this by the spread of the seeds are not by chance."""
LOGITS = 2 * 32 + SORTING
"""Bytes a patch under the rule `global`; see memory_steps.py."""
PATCHES = 64
"""Of a canvas, as the recipe cuts them."""


@dataclass(frozen=True, eq=False)
class Factor:
    """A setting, and by its values as an axis shows them the changes of the configuration; none is the base."""

    name: str
    label: str
    values: Mapping[str, Mapping[str, Any]]


def recipe_of(variant: str, changes: Mapping[str, Any]) -> str:
    """Return the name of a configuration in the table of results.

    >>> recipe_of("advised", {"select.m": 5})
    'advised; select.m 5'
    """
    return "; ".join([variant, *(f"{name} {value}" for name, value in changes.items())])


@dataclass(frozen=True)
class Point:
    """The runs of one value of a factor."""

    value: str
    runs: Sequence[Result]

    def of(self, task: str) -> list[Figure]:
        """Return the accuracy of each run in a task."""
        return [run.metrics[f"{task}.accuracy"] for run in self.runs]

    @property
    def accuracies(self) -> list[float]:
        """The mean accuracy over the tasks of each run."""
        return [mean_accuracy(run) for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def learned(self) -> bool:
        """Whether `majority` is clearly better than guessing, in the mean of the runs."""
        return statistics.mean(each.value for each in self.of("majority")) > 2 * SETTING.chance


def mean_accuracy(run: Result) -> float:
    return statistics.mean(run.metrics[f"{task}.accuracy"].value for task in TASKS)


def points(factor: Factor, variant: str, results: Iterable[Result]) -> list[Point]:
    """Return the values of a factor that have runs."""
    by_recipe: dict[str, list[Result]] = {}
    for result in results:
        by_recipe.setdefault(result.recipe, []).append(result)
    named = {value: recipe_of(variant, changes) for value, changes in factor.values.items()}
    return [Point(value, by_recipe[recipe]) for value, recipe in named.items() if recipe in by_recipe]


def peaks() -> list[tuple[int, int]]:
    """Return patches of an image and peak MB, over N alone, from the newest result of `memory.py` on a CPU."""
    newest = max(Path(__file__).parent.glob("memory_*cpu_*.md"), key=lambda path: path.stem.rpartition("_")[2])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in newest.read_text().splitlines() if "|" in line]
    n, m, b, measured = (rows[0].index(name) for name in ("N", "M", "B", "measured MB"))
    base = rows[2]  # the first row varies N
    found = [
        (int(row[n].replace(",", "")), int(row[measured])) for row in rows[2:] if (row[m], row[b]) == (base[m], base[b])
    ]
    return sorted(found)


def claims(found: Mapping[Factor, Sequence[Point]]) -> list[str]:
    """Return a sentence or two on each claim of the paper, made from the figures."""
    by_name = {factor.name: values for factor, values in found.items()}
    return [
        flat_memory(peaks()),
        small_loss(by_name.get("M", ())),
        *(independent(rule, by_name.get(f"I, {rule}", ())) for rule in ("streaming", "global")),
    ]


def flat_memory(peaks: Sequence[tuple[int, int]]) -> str:
    (fewest, base), (most, peak) = peaks[0], peaks[-1]
    allowed = (most - fewest) * LOGITS / 1e6 + SLACK_BYTES / 1e6
    verdict = "confirmed" if peak - base <= allowed else "contradicted"
    return (
        f"Memory is flat in the size of the image: {verdict}. From {fewest:,} to {most:,} patches the peak of the "
        f"process grows from {base} to {peak} MB; it may by {allowed:.0f} MB for the logits of rule `global`, their "
        "order and what two runs differ by (`benchmarks/memory.py`)."
    )


def small_loss(points: Sequence[Point]) -> str:
    claim = "A small M loses little accuracy"
    by_value = {point.value: point for point in points}
    every = by_value.pop(str(PATCHES), None)
    if every is None or not by_value:
        return f"{claim}: not measured."
    if not every.learned:
        return f"{claim}: not decided, since the runs with all {PATCHES} patches stayed at chance."
    losses = {int(value): every.mean - point.mean for value, point in by_value.items()}
    enough = min((m for m, loss in losses.items() if loss <= SMALL_LOSS), default=None)
    verdict = "confirmed" if enough is not None and enough <= PATCHES / 4 else "contradicted"
    lost = ", ".join(f"{loss:+.3f} with M = {m}" for m, loss in losses.items())
    least = "No smaller M loses" if enough is None else f"M = {enough} is the smallest that loses"
    return (
        f"{claim}: {verdict}. All {PATCHES} patches reach {every.mean:.3f} in the mean of the tasks; the loss is "
        f"{lost}. {least} at most {SMALL_LOSS}."
    )


def independent(rule: str, points: Sequence[Point]) -> str:
    from scipy.stats import f_oneway

    claim = f"Accuracy does not depend on I, rule `{rule}`"
    if len(points) < 2 or min(len(point.runs) for point in points) < 2:
        return f"{claim}: not measured with two seeds or more."
    if not any(point.learned for point in points):
        return f"{claim}: not decided, since the runs stayed at chance."
    if all(list(point.accuracies) == list(points[0].accuracies) for point in points):
        every = ", ".join(point.value for point in points)
        return f"{claim}: confirmed. Each seed reaches the same with I = {every}, {points[0].mean:.3f} on average."
    low, high = (pick(points, key=lambda point: point.mean) for pick in (min, max))
    p = f_oneway(*(point.accuracies for point in points)).pvalue if high.mean > low.mean else 1.0
    return (
        f"{claim}: {'contradicted' if p < SIGNIFICANT else 'confirmed'}. The mean of the tasks is lowest with "
        f"I = {low.value} ({low.mean:.3f}) and highest with I = {high.value} ({high.mean:.3f}), "
        f"{high.mean - low.mean:.3f} apart; by the spread of the {min(len(point.runs) for point in points)} seeds such "
        f"differences have a probability of {p:.2g} where I does not matter (analysis of variance)."
    )


def draw(found: Mapping[Factor, Sequence[Point]], peaks: Sequence[tuple[int, int]], path: Path) -> Path:
    """Write the plot: a panel for each factor, and one of memory."""
    figure, axes = panels(len(found) + 1, 4)
    for axis, (factor, values) in zip(axes, found.items(), strict=False):
        line = "-" if all(point.value[0].isdigit() for point in values) else ""
        for task, color, marker in zip(TASKS, COLORS, "osD^", strict=True):
            figures = [[each.value for each in point.of(task)] for point in values]
            means = [statistics.mean(each) for each in figures]
            deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in figures]
            look = {"color": color, "marker": marker, "linestyle": line, "capsize": 3, "label": task}
            axis.errorbar(range(len(values)), means, deviations, **look)
        axis.set_xticks(range(len(values)), [point.value for point in values])
        axis.set(title=factor.name, xlabel=factor.label, ylabel="accuracy", ylim=(0, 1.02))
    axes[-1].plot(*zip(*peaks, strict=True), "o-", color=GREY)
    axes[-1].set(title="memory", xlabel="patches of an image, N", ylabel="peak of the process, MB", xscale="log")
    axes[-1].set_ylim(0, 1.2 * max(peak for _, peak in peaks))
    title = f"One setting changed at a time ({path.stem.rpartition('_')[2]}); bars: standard deviation of seeds"
    return save(figure, title, path)


def report(found: Mapping[Factor, Sequence[Point]], variant: str, plot: Path) -> list[str]:
    """Return the lines of the dated file: the claims, the plot, and a table for each factor."""
    counts = ", ".join(f"{count:,} {split}" for split, count in SETTING.counts.items())
    lines = [
        f"Data: {SETTING.about.partition(';')[0]}; {counts}. Base: `{variant}` of `benchmarks/leaving_chance.yaml`, "
        f"{PATCHES} patches of 50 px, M = I = 10, rule `global`, position code 1d. One setting at a time is changed; "
        "under `patch` M with it, in proportion to the number of patches. Accuracy on the test canvases; of `multi` "
        "the share of canvases whose digits are all right. Several seeds: mean ± standard deviation.",
        "",
        "The claims of the paper:",
        "",
        *(f"- {claim}" for claim in claims(found)),
        "",
        f"![Accuracy over each setting, and peak memory over the number of patches](../docs/plots/{plot.name})",
    ]
    for factor, values in found.items():
        head = [factor.label, *TASKS, "mean", "seeds", "s an epoch", "peak GB"]
        lines += ["", f"## {factor.name}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for point in values:
            cells = [" ".join(point.value.split()), *(shown(point.of(task)) for task in TASKS)]
            cells += [f"{point.mean:.3f}", ", ".join(str(run.seed) for run in point.runs)]
            cells.append(f"{statistics.median(run.epoch_seconds for run in point.runs):.3g}")
            cells.append(f"{statistics.median(run.peak_gb for run in point.runs):.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines
