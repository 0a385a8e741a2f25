"""Every metric as a function of how often each image counts, for many such weightings at once.

With weights of one these are the textbook values, with the counts of a resample those of the resample:
a bootstrap never copies the data, and a metric has one definition. An undefined value is NaN.

Letters: r weightings, n images, k classes.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from keyhole.tasks.kinds import Task

ECE_BINS = 15
THRESHOLD = 0.5
"""Probability above which a binary or multilabel task says that an image is of the class."""
CLASS_METRICS = ("accuracy", "balanced_accuracy", "auroc", "average_precision", "f1", "ece")
BINARY_METRICS = (*CLASS_METRICS[:-1], "precision", "recall", "specificity", "ece")
REGRESSION_METRICS = ("mae", "r2")
PER_CLASS = ("recall", "precision", "f1", "auroc", "average_precision", "ece")
PER_LABEL = ("accuracy", "balanced_accuracy", "specificity", *PER_CLASS)

Key: TypeAlias = tuple[str | None, str]
"""Class, or None for the task as a whole, and metric."""


def task_metrics(task: Task) -> tuple[str, ...]:
    """Names of the metrics of a task as a whole."""
    if task.kind == "regression":
        return REGRESSION_METRICS
    return BINARY_METRICS if task.kind == "binary" else CLASS_METRICS


def class_metrics(task: Task) -> tuple[str, ...]:
    """Names of the metrics of each class of a task."""
    if task.kind == "regression":
        return ()
    return PER_LABEL if task.kind == "multilabel" else PER_CLASS


class ClassMeasures:
    """Metrics of a task with classes.

    The decision is the class of the largest probability; for multilabel each label above one half. For the task:

    accuracy: share of images decided right; for multilabel with all labels right.
    balanced_accuracy: mean recall over classes; for multilabel, mean of the labels' balanced accuracies.
    auroc: mean over classes, each against the rest; of two classes both are the same.
    average_precision, f1: of the positive class of a binary task, else mean over classes. Average precision is the
        sum of (R_i - R_i-1) P_i.
    precision, recall, specificity: binary alone, of the positive class. Recall is the sensitivity.
    ece: expected calibration error (Guo et al. 2017, arXiv:1706.04599) of the decision, in 15 bins of equal width
        (a, b] of its probability; for multilabel the mean over labels.

    Per class: recall (share of its images that are found), precision, f1, auroc, average_precision, and ece of deciding
    whether an image is of it; per label of a multilabel task also accuracy, balanced_accuracy and specificity.

    Means are over the classes that the images have, and undefined where a weighting leaves one of those out.

    Args:
        task: of kind multiclass, binary or multilabel.
        targets: (n, 1) class indices, or (n, k) of 0 and 1 for multilabel; none missing.
        probabilities: (n, k), as `Task.probability` gives them.
    """

    def __init__(self, task: Task, targets: Float[Array, "n w"], probabilities: Float[Array, "n k"]) -> None:
        self.task = task
        self.exclusive = task.kind != "multilabel"
        self.probability = np.asarray(probabilities, np.float64)
        self.decided: Bool[Array, "n k"]
        self.truth: Bool[Array, "n k"]
        if self.exclusive:
            names = np.arange(len(task.classes))
            self.truth = np.asarray(targets.astype(np.int64) == names)
            self.decided = np.asarray(self.probability.argmax(axis=1)[:, None] == names)
        else:
            self.truth = targets > 0.5
            self.decided = self.probability > THRESHOLD
        self.present: Bool[Array, " k"] = np.asarray(self.truth.any(axis=0))
        self.mixed: Bool[Array, " k"] = self.present & ~self.truth.all(axis=0)
        self._ranks = [_Ranking(self.truth[:, c], self.probability[:, c]) for c in range(len(task.classes))]

    def __call__(self, weights: Float[Array, "r n"]) -> dict[Key, Float[Array, " r"]]:
        total = weights.sum(axis=1, keepdims=True)
        positive = weights @ self.truth
        decided = weights @ self.decided
        both = weights @ (self.truth & self.decided)
        neither = total - positive - decided + both
        recall, specificity = _ratio(both, positive), _ratio(neither, total - positive)
        certainty = np.where(self.decided, self.probability, 1 - self.probability)
        per_class = {
            "accuracy": (both + neither) / total,
            "balanced_accuracy": (recall + specificity) / 2,
            "recall": recall,
            "specificity": specificity,
            "precision": _ratio(both, decided),
            "auroc": np.stack([ranking.auroc(weights) for ranking in self._ranks], axis=1),
            "average_precision": np.stack([ranking.average_precision(weights) for ranking in self._ranks], axis=1),
            "f1": np.where(positive > 0, _ratio(2 * both, positive + decided), np.nan),
            "ece": np.stack(
                [
                    _calibration_error(weights, certainty[:, c], self.truth[:, c] == self.decided[:, c])
                    for c in range(len(self.task.classes))
                ],
                axis=1,
            ),
        }
        right = (self.truth == self.decided).all(axis=1)
        whole = {
            "accuracy": weights @ right / total[:, 0],
            "balanced_accuracy": self._balanced(recall, per_class["balanced_accuracy"]),
            "auroc": _mean(per_class["auroc"], self.mixed),
            "average_precision": _mean(per_class["average_precision"], self.mixed),
            "f1": _mean(per_class["f1"], self.present),
            "ece": (
                _calibration_error(weights, self.probability.max(axis=1), right)
                if self.exclusive
                else per_class["ece"].mean(axis=1)
            ),
        }
        if self.task.positive is not None:
            of_positive = ("average_precision", "f1", "precision", "recall", "specificity")
            whole |= {metric: per_class[metric][:, 1] for metric in of_positive}
        out: dict[Key, Float[Array, " r"]] = {(None, metric): whole[metric] for metric in task_metrics(self.task)}
        for c, name in enumerate(self.task.classes):
            out.update({(name, metric): per_class[metric][:, c] for metric in class_metrics(self.task)})
        return out

    def _balanced(self, recall: Float[Array, "r k"], of_labels: Float[Array, "r k"]) -> Float[Array, " r"]:
        if not self.exclusive:
            return _mean(of_labels, self.mixed)
        # Of a single class it would be the accuracy under another name.
        return _mean(recall, self.present & (self.present.sum() > 1))


class RegressionMeasures:
    """Mean absolute error, and the share of the variance that is explained (R2).

    Args:
        targets: (n, 1) values, none missing.
        values: (n, 1) predicted, in the same unit.
    """

    def __init__(self, targets: Float[Array, "n 1"], values: Float[Array, "n 1"]) -> None:
        truth = np.asarray(targets[:, 0], np.float64)
        self.error = np.asarray(values[:, 0], np.float64) - truth
        self.centred = truth - truth.mean() if len(truth) else truth

    def __call__(self, weights: Float[Array, "r n"]) -> dict[Key, Float[Array, " r"]]:
        total = weights.sum(axis=1)
        square = weights @ self.centred**2
        spread = square - (weights @ self.centred) ** 2 / total
        # Equal targets leave a spread of the order of rounding, by which nothing may be divided.
        spread = np.where(spread > 1e-12 * square, spread, 0.0)
        return {
            (None, "mae"): weights @ np.abs(self.error) / total,
            (None, "r2"): 1 - _ratio(weights @ self.error**2, spread),
        }


class _Ranking:
    """Images in the order of one score, sorted once; equal scores are one threshold."""

    def __init__(self, truth: Bool[Array, " n"], score: Float[Array, " n"]) -> None:
        self.order = np.argsort(-score, kind="stable")
        self.truth = truth[self.order]
        descending = score[self.order]
        self.starts = np.flatnonzero(np.diff(descending, prepend=np.inf))

    def _steps(self, weights: Float[Array, "r n"]) -> tuple[Float[Array, "r u"], Float[Array, "r u"]]:
        """Weight of the positive and of the negative images at each of the u thresholds, highest first."""
        ranked = weights[:, self.order]
        positive, negative = ranked * self.truth, ranked * ~self.truth
        if len(self.starts) < ranked.shape[1]:
            positive = np.add.reduceat(positive, self.starts, axis=1)
            negative = np.add.reduceat(negative, self.starts, axis=1)
        return positive, negative

    def auroc(self, weights: Float[Array, "r n"]) -> Float[Array, " r"]:
        """Probability that a positive image scores above a negative one; a tie counts half."""
        positive, negative = self._steps(weights)
        at_or_above = positive.cumsum(axis=1)
        pairs = at_or_above[:, -1] * negative.sum(axis=1)
        return _ratio(((at_or_above - positive / 2) * negative).sum(axis=1), pairs)

    def average_precision(self, weights: Float[Array, "r n"]) -> Float[Array, " r"]:
        positive, negative = self._steps(weights)
        true, false = positive.cumsum(axis=1), negative.cumsum(axis=1)
        chosen = true + false
        precision = np.divide(true, chosen, out=np.zeros_like(true), where=chosen > 0)
        mixed = (true[:, -1] > 0) & (false[:, -1] > 0)
        return np.where(mixed, _ratio((positive * precision).sum(axis=1), true[:, -1]), np.nan)


def _calibration_error(
    weights: Float[Array, "r n"], certainty: Float[Array, " n"], right: Bool[Array, " n"]
) -> Float[Array, " r"]:
    """Sum over bins of |images right - their summed certainty|, per image."""
    place = np.clip(np.ceil(certainty * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gap = np.zeros((len(certainty), ECE_BINS))
    gap[np.arange(len(certainty)), place] = right - certainty
    return np.asarray(np.abs(weights @ gap).sum(axis=1) / weights.sum(axis=1))


def _ratio(above: Float[Array, "..."], below: Float[Array, "..."]) -> Float[Array, "..."]:
    return np.asarray(np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0))


def _mean(values: Float[Array, "r k"], over: Bool[Array, " k"]) -> Float[Array, " r"]:
    if not over.any():
        return np.full(len(values), np.nan)
    return np.asarray(values[:, over].mean(axis=1))
