"""How good the predictions of a task are, with intervals: arrays -> `TaskMetrics` -> JSON or lines to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import RunError
from keyhole.tasks.intervals import LEVEL, IntervalEstimate, bootstrap, units_of
from keyhole.tasks.kinds import Task
from keyhole.tasks.measures import ECE_BINS, THRESHOLD
from keyhole.tasks.metrics import closed_intervals, each_metric, metric_notes, metric_values, task_metrics

MAX_RECALLS = 10
"""Classes of a multiclass task whose recall is printed; metrics.json has all."""


@dataclass(frozen=True, eq=False)
class TaskMetrics:
    """Evaluation of one task."""

    task: Task
    n: int  # images whose label is known; the others do not count
    missing: int  # images whose label is unknown
    groups: int | None  # that are resampled whole; None where images are independent
    rounds: int  # of the bootstrap
    seed: int
    overall: dict[str, IntervalEstimate]  # by metric
    per_class: dict[str, dict[str, IntervalEstimate]]  # by class and metric; empty for regression
    support: dict[str, int]  # images of each class
    # (k, k) counts, true class by row, predicted by column; for multilabel (k, 2, 2), one such table per label with
    # "no" first; None for regression
    confusion: NDArray[np.int64] | None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict without NaN."""
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "images": self.n,
            "images_without_label": self.missing,
            "classes": list(self.task.classes),
            "positive_class": self.task.positive,
            "threshold": self.task.threshold,
            "overall": {metric: asdict(estimate) for metric, estimate in self.overall.items()},
            "per_class": {
                name: {"support": self.support[name]}
                | {metric: asdict(estimate) for metric, estimate in estimates.items()}
                for name, estimates in self.per_class.items()
            },
            "confusion": None
            if self.confusion is None
            else {
                "classes": list(self.task.classes),
                "order": "true, predicted" if self.task.exclusive else "label, true (no, yes), predicted (no, yes)",
                "counts": self.confusion.tolist(),
            },
            "interval": {
                "level": LEVEL,
                "over": "images" if self.groups is None else "groups",
                "groups": self.groups,
                "rounds": self.rounds,
                "seed": self.seed,
            },
        }


def evaluate_task(
    task: Task,
    targets: ArrayLike,
    probabilities: ArrayLike,
    groups: Sequence[str | None] | None = None,
    seed: int = 0,
    rounds: int = 1000,
) -> TaskMetrics:
    """Compute all metrics of one task with 95 % intervals.

    Args:
        task, targets, probabilities: What was predicted, (n, w) as `Task.encode` and (n, k) as `Task.probability`
            return them; images whose target holds NaN are left out and counted.
        groups: Group of each image. Where at least one is given, groups and not images are independent.
        seed, rounds: Of the bootstrap.

    >>> task = Task("tumor", "binary", ("no", "yes"))
    >>> print(evaluate_task(task, [[0], [1], [1]], [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]]).overall["accuracy"])
    0.667 [0.208 0.939]
    """
    targets, probabilities, known = _known(task, targets, probabilities)
    groups, n = groups_of(groups, known), len(targets)
    measures = task.measure(targets, probabilities)
    keys = [key for key, _, _ in each_metric(task)]
    estimates = dict.fromkeys(keys, IntervalEstimate(None, note="no image has a label"))
    if n:
        notes = metric_notes(task, measures)
        estimates = bootstrap(lambda weights: metric_values(task, measures, weights), n, groups, seed, rounds, notes)
        for key, interval in closed_intervals(task, measures, units_of(n, groups)).items():
            if (value := estimates[key].value) is not None:
                estimates[key] = IntervalEstimate(value, interval.low, interval.high, notes.get(key), interval.method)
    return TaskMetrics(
        task=task,
        n=n,
        missing=int((~known).sum()),
        groups=None if groups is None else len({group or i for i, group in enumerate(groups)}),
        rounds=rounds,
        seed=seed,
        overall={metric: estimates[name, metric] for name, metric in keys if name is None},
        per_class={
            label: {metric: estimates[name, metric] for name, metric in keys if name == label} for label in task.classes
        },
        support=measures.support,
        confusion=measures.confusion,
    )


def point_metrics(task: Task, targets: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """Compute the metrics of the task as a whole without intervals; NaN where undefined."""
    targets, probabilities, _ = _known(task, targets, probabilities)
    if not len(targets):
        return {metric.name: float("nan") for metric in task_metrics(task)}
    weighted = task.measure(targets, probabilities)(np.ones((1, len(targets))))
    return {metric.name: float(metric.value(weighted)[0]) for metric in task_metrics(task)}


def defined_metrics(task: Task, targets: ArrayLike) -> set[str]:
    """Return the metrics that these labels define, whatever is predicted: AUROC needs two classes."""
    targets = np.asarray(targets, np.float64)
    return {name for name, value in point_metrics(task, targets, task.ideal(targets)).items() if not np.isnan(value)}


def evaluation_json(results: Sequence[TaskMetrics], **about: Any) -> dict[str, Any]:
    return {**about, "ece_bins": ECE_BINS, "tasks": {result.task.name: result.to_json() for result in results}}


def format_lines(results: Sequence[TaskMetrics]) -> list[str]:
    """Return how many images each task's figures are from, then lines such as `accuracy 0.935 [0.900 0.965]`."""
    lines = []
    for result in results:
        start = f"{result.task.name} " if len(results) > 1 else ""
        lines.append(f"{result.task.name}: {describe_counts(result)}")
        lines += [f"{start}{metric} {estimate}" for metric, estimate in result.overall.items()]
        if result.n and result.task.exclusive and result.task.positive is None:
            lines.append(f"{start}recall by class: {_recalls(result)}")
    return lines


def describe_counts(result: TaskMetrics) -> str:
    """Return in words how many images the figures of a task are from."""
    task, parts = result.task, [f"{result.n} image{'s' * (result.n != 1)}"]
    if task.positive is not None:
        count = result.support[task.positive]
        parts.append(f"{count} of them {task.positive} (the positive class, above probability {THRESHOLD:g})")
    if result.missing:
        parts.append(f"{result.missing} more without a label")
    over = "" if result.groups is None else f" over {result.groups} groups"
    return f"{', '.join(parts)}; {100 * LEVEL:g} % intervals{over}"


def _recalls(result: TaskMetrics) -> str:
    found = {name: result.per_class[name]["recall"].value for name in result.task.classes if result.support[name]}
    shown = [f"{name} {value:.3f} of {result.support[name]}" for name, value in found.items() if value is not None]
    more = f" and {len(shown) - MAX_RECALLS} more classes in metrics.json" if len(shown) > MAX_RECALLS else ""
    return ", ".join(shown[:MAX_RECALLS]) + more


def groups_of(groups: Sequence[str | None] | None, known: NDArray[np.bool_]) -> list[str | None] | None:
    """Return the groups of the known images; None where no image has one."""
    return [group for group, use in zip(groups, known, strict=True) if use] if groups and any(groups) else None


def _known(
    task: Task, targets: ArrayLike, probabilities: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """The rows whose target is known, and which these are."""
    targets, probabilities = np.asarray(targets, np.float64), np.asarray(probabilities, np.float64)
    if targets.shape != (len(targets), task.target_width) or probabilities.shape != (len(targets), len(task.columns)):
        raise ValueError(
            f"{task.name}: targets {targets.shape} and probabilities {probabilities.shape} must be "
            f"(n, {task.target_width}) and (n, {len(task.columns)})"
        )
    known = ~np.isnan(targets).any(axis=1)
    if not np.isfinite(probabilities[known]).all():
        bad = int((~np.isfinite(probabilities[known])).any(axis=1).sum())
        raise RunError(
            f"{task.name}: the output of the model is NaN for {bad} of {known.sum()} images. "
            "Its weights are damaged or its training diverged; train with a lower rate."
        )
    return targets[known], probabilities[known], known
