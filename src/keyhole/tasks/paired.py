"""Differences between models on the same images: the paired bootstrap.

Letters: n images, w width of the targets, k columns of a task, r resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keyhole.tasks.evaluation import evaluate_task, groups_of
from keyhole.tasks.intervals import IntervalEstimate, Weights, bootstrap
from keyhole.tasks.kinds import Task
from keyhole.tasks.metrics import higher_is_better, task_metrics

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedMetric:
    """One metric of several models on the same images.

    Attributes:
        task, metric: Their names.
        values: One per model.
        differences: Of each model but the first, its value minus that of the first.
    """

    task: str
    metric: str
    values: tuple[IntervalEstimate, ...]
    differences: tuple[IntervalEstimate, ...]

    def verdict(self, number: int) -> str:
        """Return `better` or `worse` for a difference (0 and up) whose interval excludes 0, else an empty text."""
        each = self.differences[number]
        if each.low is None or each.high is None or each.low <= 0 <= each.high:
            return ""
        return "better" if (each.low > 0) == higher_is_better(self.metric) else "worse"


def compare_task(
    task: Task,
    targets: Floats,
    probabilities: Sequence[Floats],
    groups: Sequence[str | None] | None = None,
    seed: int = 0,
    rounds: int = 1000,
) -> list[PairedMetric]:
    """Compare models on the metrics of a task as a whole.

    Every resample of images, or of whole groups, is the same for all models, so that a difference is measured on the
    same images.

    Args:
        task, targets: (n, w) as for `evaluate_task`; images whose target holds NaN are left out.
        probabilities: (n, k) of each model, at least two.
        groups, seed, rounds: As for `evaluate_task`.

    Returns:
        The metrics in the order of `task_metrics`; none if no image has a label.

    >>> task = Task("tumor", "binary", ("no", "yes"))
    >>> sure, unsure = [[0.9, 0.1], [0.2, 0.8]] * 10, [[0.9, 0.1], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8]] * 5
    >>> accuracy = compare_task(task, np.array([[0], [1]] * 10), [np.array(unsure), np.array(sure)])[0]
    >>> print(accuracy.differences[0], accuracy.verdict(0))
    0.250 [0.050 0.450] better
    """
    known = np.asarray(~np.isnan(targets).any(axis=1))
    n, groups = int(known.sum()), groups_of(groups, known)
    if not n:
        return []
    measures = [task.measure(targets[known], each[known]) for each in probabilities]
    metrics = task_metrics(task)

    def differences(weights: Weights) -> dict[tuple[int, str], Weights]:
        first, *others = (
            {metric.name: metric.value(weighted) for metric in metrics}
            for weighted in (each(weights) for each in measures)
        )
        return {(i, name): other[name] - first[name] for i, other in enumerate(others) for name in first}

    found = bootstrap(differences, n, groups, seed, rounds)
    results = [evaluate_task(task, targets[known], each[known], groups, seed, rounds) for each in probabilities]
    return [
        PairedMetric(
            task.name,
            metric.name,
            tuple(result.overall[metric.name] for result in results),
            tuple(found[i, metric.name] for i in range(len(probabilities) - 1)),
        )
        for metric in metrics
    ]
