"""How good the predictions of a task are, with intervals: arrays -> `TaskMetrics` -> JSON or lines to print.

The metrics themselves are in `measures.py`, the intervals in `bootstrap.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.bootstrap import Estimate, bootstrap
from keyhole.errors import RunError
from keyhole.measures import CLASS_METRICS, ECE_BINS, REGRESSION_METRICS, ClassMeasures, Key, RegressionMeasures
from keyhole.tasks import Task


@dataclass(frozen=True, eq=False)
class TaskMetrics:
    """Evaluation of one task.

    Attributes:
        task: what was predicted.
        n: images whose label is known; the others do not count.
        missing: images whose label is not known.
        groups: groups drawn whole for the intervals; None where images were drawn.
        rounds: resamples of the bootstrap.
        seed: of the resamples.
        overall: by metric, for the task as a whole.
        per_class: by class and metric, each class against the rest; empty for regression.
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
                "level": 0.95,
                "method": "percentile bootstrap",
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
    """All metrics of one task with 95 % bootstrap intervals; definitions at `ClassMeasures`, `RegressionMeasures`.

    Args:
        task: what was predicted.
        targets: (n, w) as `Task.encode` gives them; images whose row holds NaN are left out and counted.
        probabilities: (n, k) as `Task.probability` gives them.
        groups: of each image; where at least one is given, groups are drawn whole.
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
        estimates = bootstrap(measure, n, groups, seed, rounds, notes)
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
    """Lines such as `accuracy 0.935 [0.900 0.965]`, after the task's name where there are several tasks."""
    return [
        f"{f'{result.task.name} ' if len(results) > 1 else ''}{metric} {estimate}"
        for result in results
        for metric, estimate in result.overall.items()
    ]


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
    for name, present, mixed in zip(classes, measure.present, measure.mixed, strict=True):
        why = "all images are of this class" if present else "no image is of this class"
        if not mixed:
            notes.update({(name, metric): why for metric in ("balanced_accuracy", "auroc", "average_precision")})
        if not present:
            notes[name, "f1"] = why
    for metric in ("balanced_accuracy", "auroc", "average_precision", "f1"):
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
    if task.kind == "regression":
        return [(None, metric) for metric in REGRESSION_METRICS]
    return [(name, metric) for name in (None, *task.classes) for metric in CLASS_METRICS]
