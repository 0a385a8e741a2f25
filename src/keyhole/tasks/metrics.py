"""How good the predictions of a task are, with intervals: arrays -> `TaskMetrics` -> JSON or lines to print.

The metrics themselves are in `measures.py`, the intervals in `intervals.py` and `bootstrap.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import RunError
from keyhole.tasks.bootstrap import Estimate, bootstrap, units_of
from keyhole.tasks.intervals import LEVEL, class_intervals
from keyhole.tasks.kinds import Task
from keyhole.tasks.measures import (
    ECE_BINS,
    THRESHOLD,
    ClassMeasures,
    Key,
    RegressionMeasures,
    class_metrics,
    task_metrics,
)


@dataclass(frozen=True, eq=False)
class TaskMetrics:
    """Evaluation of one task.

    Attributes:
        task: what was predicted.
        n: images whose label is known; the others do not count.
        missing: images whose label is not known.
        groups: how many there are, taken whole for the intervals; None where the images stand alone.
        rounds: resamples of the bootstrap.
        seed: of the resamples.
        overall: by metric, for the task as a whole.
        per_class: by class and metric; empty for regression.
        support: images of each class.
        confusion: (k, k) counts, true class by row, predicted by column; for multilabel (k, 2, 2), one such table per
            label with "no" first; None for regression.
    """

    task: Task
    n: int
    missing: int
    groups: int | None
    rounds: int
    seed: int
    overall: dict[str, Estimate]
    per_class: dict[str, dict[str, Estimate]]
    support: dict[str, int]
    confusion: NDArray[np.int64] | None

    def to_json(self) -> dict[str, Any]:
        """A plain dict without NaN: what has no value is None, with a note that says why."""
        return {
            "task": self.task.name,
            "kind": self.task.kind,
            "images": self.n,
            "images_without_label": self.missing,
            "positive_class": self.task.positive,
            "threshold": THRESHOLD if self.task.kind in ("binary", "multilabel") else None,
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
                "order": "label, true (no, yes), predicted (no, yes)"
                if self.task.kind == "multilabel"
                else "true, predicted",
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
    """All metrics of one task with 95 % intervals; definitions at `ClassMeasures`, `RegressionMeasures`.

    Shares and AUROC have an interval in closed form (`intervals.py`), the other metrics the bootstrap's.

    Args:
        task: what was predicted.
        targets: (n, w) as `Task.encode` gives them; images whose row holds NaN are left out and counted.
        probabilities: (n, k) as `Task.probability` gives them.
        groups: of each image; where at least one is given, groups and not images are independent of each other.
        seed: of the bootstrap.
        rounds: of the bootstrap.

    Raises:
        RunError: the model's output is not a number.
    """
    targets, probabilities, known = _known(task, targets, probabilities)
    groups = (
        None if groups is None or not any(groups) else [group for group, use in zip(groups, known, strict=True) if use]
    )
    n = len(targets)
    measure, notes = _measure(task, targets, probabilities)
    keys = _keys(task)
    if n:
        estimates = bootstrap(measure, n, groups, seed, rounds, notes) | _closed_form(measure, n, groups, notes)
    else:
        estimates = {key: Estimate(None, note="no image has a label") for key in keys}
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
        support=dict(zip(task.classes, measure.truth.sum(axis=0).tolist(), strict=True))
        if isinstance(measure, ClassMeasures)
        else {},
        confusion=_confusion(measure) if isinstance(measure, ClassMeasures) else None,
    )


def _closed_form(
    measure: ClassMeasures | RegressionMeasures, n: int, groups: Sequence[str | None] | None, notes: dict[Key, str]
) -> dict[Key, Estimate]:
    """The metrics that have an interval without resampling."""
    unit = units_of(n, groups)
    if not isinstance(measure, ClassMeasures) or unit.max() == 0:
        return {}
    values = measure(np.ones((1, n)))
    return {
        key: Estimate(float(values[key][0]), interval.low, interval.high, notes.get(key), interval.method)
        for key, interval in class_intervals(measure, unit).items()
        if key in values and not np.isnan(values[key][0])
    }


def point_metrics(task: Task, targets: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """The metrics of the task as a whole without intervals; NaN where undefined. Arguments as of `evaluate_task`."""
    targets, probabilities, _ = _known(task, targets, probabilities)
    if not len(targets):
        return {metric: float("nan") for name, metric in _keys(task) if name is None}
    measure, _ = _measure(task, targets, probabilities)
    values = measure(np.ones((1, len(targets))))
    return {metric: float(values[name, metric][0]) for name, metric in values if name is None}


def defined_metrics(task: Task, targets: ArrayLike) -> set[str]:
    """The metrics of the task as a whole that these labels define, whatever is predicted; targets as `evaluate_task`.

    AUROC, say, needs images of at least two classes.
    """
    targets = np.asarray(targets, np.float64)
    ideal = targets
    if task.kind in ("multiclass", "binary"):
        ideal = np.eye(len(task.classes))[np.nan_to_num(targets[:, 0]).astype(np.int64)]
    return {metric for metric, value in point_metrics(task, targets, ideal).items() if not np.isnan(value)}


def evaluation_json(results: Sequence[TaskMetrics], **about: Any) -> dict[str, Any]:
    """All tasks of an evaluation, and what else is to be kept with it (model, split), ready for `json.dumps`."""
    return {**about, "ece_bins": ECE_BINS, "tasks": {result.task.name: result.to_json() for result in results}}


def format_lines(results: Sequence[TaskMetrics]) -> list[str]:
    """How many images each task's figures are from, then lines such as `accuracy 0.935 [0.900 0.965]`.

    The lines begin with the task's name where there are several tasks.
    """
    lines = []
    for result in results:
        start = f"{result.task.name} " if len(results) > 1 else ""
        lines.append(f"{result.task.name}: {_counts(result)}")
        lines += [f"{start}{metric} {estimate}" for metric, estimate in result.overall.items()]
        if result.task.kind == "multiclass" and result.n:
            lines.append(f"{start}recall by class: {_recalls(result)}")
    return lines


SHOWN = 10
"""Classes of a multiclass task whose recall is printed; metrics.json has all."""


def _counts(result: TaskMetrics) -> str:
    """`20 images, 7 of them yes (the positive class, above probability 0.5); 95 % intervals over 9 groups`."""
    task, parts = result.task, [f"{result.n} image{'s' * (result.n != 1)}"]
    if task.positive is not None:
        count = result.support[task.positive]
        parts.append(f"{count} of them {task.positive} (the positive class, above probability {THRESHOLD:g})")
    if result.missing:
        parts.append(f"{result.missing} more without a label")
    over = "" if result.groups is None else f"; {100 * LEVEL:g} % intervals over {result.groups} groups"
    return ", ".join(parts) + (over or f"; {100 * LEVEL:g} % intervals")


def _recalls(result: TaskMetrics) -> str:
    """`cat 0.900 of 10, dog 0.000 of 3`."""
    found = {name: result.per_class[name]["recall"].value for name in result.task.classes if result.support[name]}
    shown = [f"{name} {value:.3f} of {result.support[name]}" for name, value in found.items() if value is not None]
    more = f" and {len(shown) - SHOWN} more classes in metrics.json" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def _known(
    task: Task, targets: ArrayLike, probabilities: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """The rows whose target is known, and which these are."""
    targets, probabilities = np.asarray(targets, np.float64), np.asarray(probabilities, np.float64)
    outputs = 1 if task.kind == "regression" else len(task.classes)
    if targets.shape != (len(targets), task.target_width) or probabilities.shape != (len(targets), outputs):
        raise ValueError(
            f"{task.name}: targets {targets.shape} and probabilities {probabilities.shape} must be "
            f"(n, {task.target_width}) and (n, {outputs})"
        )
    known = ~np.isnan(targets).any(axis=1)
    if not np.isfinite(probabilities[known]).all():
        bad = int((~np.isfinite(probabilities[known])).any(axis=1).sum())
        raise RunError(
            f"{task.name}: the model gives no number for {bad} of {known.sum()} images. "
            "Its weights are damaged or its training diverged; train with a lower rate."
        )
    return targets[known], probabilities[known], known


def _measure(
    task: Task, targets: NDArray[np.float64], probabilities: NDArray[np.float64]
) -> tuple[ClassMeasures | RegressionMeasures, dict[Key, str]]:
    if task.kind == "regression":
        equal = len(np.unique(targets)) < 2
        return RegressionMeasures(targets, probabilities), {(None, "r2"): "all values are equal"} if equal else {}
    measure = ClassMeasures(task, targets, probabilities)
    return measure, _class_notes(measure)


def _class_notes(measure: ClassMeasures) -> dict[Key, str]:
    """What the data do not allow to say: why a metric is undefined, or which classes a mean leaves out."""
    notes: dict[Key, str] = {}
    classes = measure.task.classes
    called = np.asarray(measure.decided.any(axis=0))
    for name, present, mixed, any_called in zip(classes, measure.present, measure.mixed, called, strict=True):
        why = "all images are of this class" if present else "no image is of this class"
        if not mixed:
            notes.update({(name, metric): why for metric in ("balanced_accuracy", "auroc", "average_precision")})
        if not present:
            notes |= {(name, "f1"): why, (name, "recall"): why}
        elif not mixed:
            notes[name, "specificity"] = why
        if not any_called:
            notes[name, "precision"] = "no image is predicted as this class"
    means = ["balanced_accuracy", "auroc"]
    if (positive := measure.task.positive) is None:
        means += ["average_precision", "f1"]
    else:
        of_positive = ("f1", "precision", "recall", "specificity")
        notes |= {
            (None, metric): notes[positive, metric].replace("this class", positive)
            for metric in of_positive
            if (positive, metric) in notes
        }
        if not measure.mixed.any():
            notes[None, "average_precision"] = "no class that only some of the images have"
    for metric in means:
        recall = metric == "balanced_accuracy" and measure.exclusive
        used = measure.present if metric == "f1" or recall else measure.mixed
        left_out = [name for name, use in zip(classes, used, strict=True) if not use]
        if not used.any() or (recall and used.sum() < 2):
            notes[None, metric] = "no class that only some of the images have"
        elif left_out:
            names = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
            notes[None, metric] = f"mean over {used.sum()} of {len(classes)} classes, without {names}"
    return notes


def _confusion(measure: ClassMeasures) -> NDArray[np.int64]:
    truth, decided = measure.truth.astype(np.int64), measure.decided.astype(np.int64)
    if measure.exclusive:
        return truth.T @ decided
    both, true, chosen = (truth * decided).sum(axis=0), truth.sum(axis=0), decided.sum(axis=0)
    neither = len(truth) - true - chosen + both
    return np.stack([np.stack([neither, chosen - both], axis=1), np.stack([true - both, both], axis=1)], axis=1)


def _keys(task: Task) -> list[Key]:
    return [
        *((None, metric) for metric in task_metrics(task)),
        *((name, metric) for name in task.classes for metric in class_metrics(task)),
    ]
