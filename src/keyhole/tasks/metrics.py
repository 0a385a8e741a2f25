"""The metrics: one entry each.

To add a metric, write its formula in `measures.py` and an entry here. Reports have the order of the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from keyhole.tasks.intervals import ClassIntervals, Interval
from keyhole.tasks.kinds import Binary, Multiclass, Multilabel, Regression, Task
from keyhole.tasks.measures import ClassMeasures, RegressionMeasures, WeightedClasses

Measures: TypeAlias = ClassMeasures | RegressionMeasures
Key: TypeAlias = tuple[str | None, str]
"""Class, or None for the task as a whole, and metric."""
CLASSED = (Multiclass, Binary, Multilabel)
EXCLUSIVE = (Multiclass, Binary)
NO_MIXED_CLASS = "no class that only some of the images have"


@dataclass(frozen=True)
class Metric:
    """A figure of a task as a whole, or of each of its classes, whose index `interval` and `note` then get too."""

    name: str  # as in reports; several entries may share one if they suit different kinds of tasks
    kinds: tuple[type[Task], ...]
    # weighted measures -> values (r,), or (r, k) for a metric of classes; NaN where undefined
    value: Callable[[Any], Float[Array, "..."]]
    # `ClassIntervals` -> an interval in closed form; None where the bootstrap has to find it
    interval: Callable[..., Interval | None] = lambda *_: None
    # measures -> why the value is undefined, or what it leaves out
    note: Callable[..., str | None] = lambda *_: None
    # measures -> the value of a model that guesses; None where that has no fixed value
    chance: Callable[[ClassMeasures], float] | None = None
    higher_is_better: bool = True


# Of each class


def _needs_images(of: ClassMeasures, c: int) -> str | None:
    return None if of.present[c] else "no image is of this class"


def _needs_both(of: ClassMeasures, c: int) -> str | None:
    return _needs_images(of, c) or _needs_others(of, c)


def _needs_others(of: ClassMeasures, c: int) -> str | None:
    return "all images are of this class" if of.truth[:, c].all() else None


def _needs_decisions(of: ClassMeasures, c: int) -> str | None:
    return None if of.decided[:, c].any() else "no image is predicted as this class"


CLASS_METRICS = (
    Metric("accuracy", (Multilabel,), lambda w: w.accuracy, ClassIntervals.accuracy),
    Metric(
        "balanced_accuracy", (Multilabel,), lambda w: w.balanced_accuracy, ClassIntervals.balanced_accuracy, _needs_both
    ),
    Metric("specificity", (Multilabel,), lambda w: w.specificity, ClassIntervals.specificity, _needs_others),
    Metric("recall", CLASSED, lambda w: w.recall, ClassIntervals.recall, _needs_images),
    Metric("precision", CLASSED, lambda w: w.precision, ClassIntervals.precision, _needs_decisions),
    Metric("f1", CLASSED, lambda w: w.f1, ClassIntervals.f1, _needs_images),
    Metric("auroc", CLASSED, lambda w: w.auroc, ClassIntervals.auroc, _needs_both),
    Metric("average_precision", CLASSED, lambda w: w.average_precision, note=_needs_both),
    Metric("ece", CLASSED, lambda w: w.ece, higher_is_better=False),
)
"""Metrics of deciding whether an image is of a class. Recall is the share of its images that are found."""


# Of a task


def _positive(name: str, value: Callable[[WeightedClasses], Float[Array, "r k"]], note: Any, interval: Any) -> Metric:
    """A metric of the positive class of a binary task."""

    def explain(of: ClassMeasures) -> str | None:
        text: str | None = note(of, 1)
        return None if text is None else text.replace("this class", of.classes[1])

    return Metric(name, (Binary,), lambda w: value(w)[:, 1], lambda i: interval(i, 1), explain)


def _mean(
    name: str,
    kinds: tuple[type[Task], ...],
    value: Callable[[WeightedClasses], Float[Array, "r k"]],
    over: Callable[[ClassMeasures], Bool[Array, " k"]],
    **more: Any,
) -> Metric:
    """The mean over some of the classes; undefined where a weighting leaves out all images of one of them."""

    def mean(w: WeightedClasses) -> Float[Array, " r"]:
        used = over(w.of)
        return np.asarray(value(w)[:, used].mean(axis=1) if used.any() else np.full(len(w.weights), np.nan))

    def explain(of: ClassMeasures) -> str | None:
        used = over(of)
        if used.all() or not used.any():
            return None if used.all() else NO_MIXED_CLASS
        left_out = np.array(of.classes)[~used].tolist()
        names = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        return f"mean over {used.sum()} of {len(of.classes)} classes, without {names}"

    return Metric(name, kinds, mean, note=explain, **more)


def _mixed(of: ClassMeasures) -> Bool[Array, " k"]:
    return of.mixed


def _needs_spread(of: RegressionMeasures) -> str | None:
    return "all values are equal" if len(np.unique(of.truth)) < 2 else None


def _needs_mixed(of: ClassMeasures) -> str | None:
    return None if of.mixed.any() else NO_MIXED_CLASS


METRICS = (
    Metric("accuracy", CLASSED, lambda w: w.share_right, ClassIntervals.all_right),
    _mean(
        "balanced_accuracy",
        EXCLUSIVE,
        lambda w: w.recall,
        lambda of: of.present & (of.present.sum() > 1),  # the mean recall of a single class is the accuracy
        interval=ClassIntervals.mean_recall,
        chance=lambda of: 1 / int(of.present.sum()),
    ),
    _mean("balanced_accuracy", (Multilabel,), lambda w: w.balanced_accuracy, _mixed),
    _mean("auroc", CLASSED, lambda w: w.auroc, _mixed, interval=ClassIntervals.mean_auroc, chance=lambda _: 0.5),
    Metric("average_precision", (Binary,), lambda w: w.average_precision[:, 1], note=_needs_mixed),
    _mean("average_precision", (Multiclass, Multilabel), lambda w: w.average_precision, _mixed),
    _positive("f1", lambda w: w.f1, _needs_images, ClassIntervals.f1),
    _mean("f1", (Multiclass, Multilabel), lambda w: w.f1, lambda of: of.present),
    _positive("precision", lambda w: w.precision, _needs_decisions, ClassIntervals.precision),
    _positive("recall", lambda w: w.recall, _needs_images, ClassIntervals.recall),
    _positive("specificity", lambda w: w.specificity, _needs_others, ClassIntervals.specificity),
    Metric("ece", EXCLUSIVE, WeightedClasses.decision_ece, higher_is_better=False),
    Metric("ece", (Multilabel,), lambda w: w.ece.mean(axis=1), higher_is_better=False),
    Metric("mae", (Regression,), lambda w: w.mae, higher_is_better=False),
    Metric("r2", (Regression,), lambda w: w.r2, note=_needs_spread),
)
"""Metrics of a task as a whole.

accuracy: share of images decided right; for multilabel with all labels right.
balanced_accuracy: mean recall over classes; for multilabel, mean of the labels' balanced accuracies.
auroc: mean over classes, each against the rest; of two classes both are the same.
average_precision, f1: of the positive class of a binary task, else mean over classes.
precision, recall, specificity: of the positive class. Recall is the sensitivity.
ece: expected calibration error of the decision; for multilabel the mean over labels.
mae, r2: mean absolute error, and the share of the variance that is explained.
"""


def task_metrics(task: Task) -> tuple[Metric, ...]:
    """Return the metrics of a task as a whole."""
    return tuple(metric for metric in METRICS if isinstance(task, metric.kinds))


def higher_is_better(name: str) -> bool:
    """Return whether a higher value of the metric, or of `loss`, is better."""
    return any(metric.name == name and metric.higher_is_better for metric in METRICS)


def each_metric(task: Task) -> Iterator[tuple[Key, Metric, tuple[int, ...]]]:
    """Yield each metric of a task, then each of its classes with the index of the class."""
    for metric in task_metrics(task):
        yield (None, metric.name), metric, ()
    of_classes = [metric for metric in CLASS_METRICS if isinstance(task, metric.kinds)]
    for c, name in enumerate(task.classes):
        for metric in of_classes:
            yield (name, metric.name), metric, (c,)


def metric_values(task: Task, measures: Measures, weights: Float[Array, "r n"]) -> dict[Key, Float[Array, " r"]]:
    """Return every metric of a task and of its classes under each weighting of the images."""
    weighted = measures(weights)
    return {key: metric.value(weighted).T[at] for key, metric, at in each_metric(task)}


def metric_notes(task: Task, measures: Measures) -> dict[Key, str]:
    """Return why metrics are undefined, or which classes a mean leaves out."""
    notes = {key: metric.note(measures, *at) for key, metric, at in each_metric(task)}
    return {key: note for key, note in notes.items() if note is not None}


def closed_intervals(task: Task, measures: Measures, unit: Array) -> dict[Key, Interval]:
    """Return the intervals that need no resampling; of a single unit (see `ClassIntervals`) there are none."""
    if not isinstance(measures, ClassMeasures) or unit.max() == 0:
        return {}
    of = ClassIntervals(measures, unit)
    found = {key: metric.interval(of, *at) for key, metric, at in each_metric(task)}
    return {key: interval for key, interval in found.items() if interval is not None}
