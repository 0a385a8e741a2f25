"""What the metrics of a task are computed from: counts and rates of its images under many weightings at once.

A weighting says how often each image counts. With weights of one these are the textbook values, with the counts of a
resample those of the resample: the bootstrap never copies the data, and a metric has one definition. An undefined value
is NaN.

Letters: r weightings, n images, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

ECE_BINS = 15
THRESHOLD = 0.5
"""Probability above which a binary or multilabel task says that an image is of the class."""


@dataclass(eq=False)
class ClassMeasures:
    """Truth, decision and probability (n, k) of each class. Call it with weights (r, n) to get `WeightedClasses`.

    `exclusive` is True where an image is of exactly one class.
    """

    classes: tuple[str, ...]
    truth: Bool[Array, "n k"]
    decided: Bool[Array, "n k"]
    probability: Float[Array, "n k"]
    exclusive: bool

    def __post_init__(self) -> None:
        self.present: Bool[Array, " k"] = np.asarray(self.truth.any(axis=0))
        self.mixed: Bool[Array, " k"] = self.present & ~self.truth.all(axis=0)
        self.all_right: Bool[Array, " n"] = np.asarray((self.truth == self.decided).all(axis=1))
        self.rankings = [_Ranking(self.truth[:, c], self.probability[:, c]) for c in range(len(self.classes))]

    def __call__(self, weights: Float[Array, "r n"]) -> WeightedClasses:
        return WeightedClasses(self, weights)

    @property
    def support(self) -> dict[str, int]:
        """Images of each class."""
        return dict(zip(self.classes, self.truth.sum(axis=0).tolist(), strict=True))

    @property
    def confusion(self) -> Array:
        """(k, k) counts, true class by row; where not exclusive (k, 2, 2), one table per label with "no" first."""
        truth, decided = self.truth.astype(np.int64), self.decided.astype(np.int64)
        if self.exclusive:
            return np.asarray(truth.T @ decided)
        both, true, chosen = (truth * decided).sum(axis=0), truth.sum(axis=0), decided.sum(axis=0)
        neither = len(truth) - true - chosen + both
        return np.stack([np.stack([neither, chosen - both], axis=1), np.stack([true - both, both], axis=1)], axis=1)


class WeightedClasses:
    """Rates (r, k) of each class under each weighting; costly ones are computed when they are first used."""

    def __init__(self, of: ClassMeasures, weights: Float[Array, "r n"]) -> None:
        self.of, self.weights = of, weights
        self.total = weights.sum(axis=1, keepdims=True)
        self.positive = weights @ of.truth
        self.decided = weights @ of.decided
        self.both = weights @ (of.truth & of.decided)
        self.neither = self.total - self.positive - self.decided + self.both
        self.accuracy = np.asarray((self.both + self.neither) / self.total)
        self.share_right = np.asarray(weights @ of.all_right / self.total[:, 0])
        self.recall = _ratio(self.both, self.positive)
        self.specificity = _ratio(self.neither, self.total - self.positive)
        self.balanced_accuracy = np.asarray((self.recall + self.specificity) / 2)
        self.precision = _ratio(self.both, self.decided)
        self.f1 = np.where(self.positive > 0, _ratio(2 * self.both, self.positive + self.decided), np.nan)

    @cached_property
    def auroc(self) -> Float[Array, "r k"]:
        return np.stack([ranking.auroc(self.weights) for ranking in self.of.rankings], axis=1)

    @cached_property
    def average_precision(self) -> Float[Array, "r k"]:
        return np.stack([ranking.average_precision(self.weights) for ranking in self.of.rankings], axis=1)

    @cached_property
    def ece(self) -> Float[Array, "r k"]:
        certainty = np.where(self.of.decided, self.of.probability, 1 - self.of.probability)
        right = self.of.truth == self.of.decided
        errors = [_calibration_error(self.weights, certainty[:, c], right[:, c]) for c in range(right.shape[1])]
        return np.stack(errors, axis=1)

    def decision_ece(self) -> Float[Array, " r"]:
        """Calibration error of the one class decided."""
        return _calibration_error(self.weights, self.of.probability.max(axis=1), self.of.all_right)


@dataclass(eq=False)
class RegressionMeasures:
    """Targets and predicted values (n, 1) of a regression. Call it with weights (r, n) to get `WeightedErrors`."""

    targets: Float[Array, "n 1"]
    values: Float[Array, "n 1"]

    def __post_init__(self) -> None:
        self.truth, self.said = np.asarray(self.targets[:, 0]), np.asarray(self.values[:, 0])
        self.error = self.said - self.truth
        self.centred = self.truth - self.truth.mean() if len(self.truth) else self.truth

    def __call__(self, weights: Float[Array, "r n"]) -> WeightedErrors:
        total, square = weights.sum(axis=1), weights @ self.centred**2
        spread = square - (weights @ self.centred) ** 2 / total
        # Equal targets leave a spread of the order of rounding, by which nothing may be divided.
        spread = np.where(spread > 1e-12 * square, spread, 0.0)
        return WeightedErrors(
            mae=np.asarray(weights @ np.abs(self.error) / total), r2=1 - _ratio(weights @ self.error**2, spread)
        )

    support: ClassVar[dict[str, int]] = {}
    confusion: ClassVar[None] = None


class WeightedErrors(NamedTuple):
    """Errors (r,) of a regression under each weighting."""

    mae: Float[Array, " r"]
    r2: Float[Array, " r"]


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
        """Sum of (R_i - R_i-1) P_i over the thresholds."""
        positive, negative = self._steps(weights)
        true, false = positive.cumsum(axis=1), negative.cumsum(axis=1)
        chosen = true + false
        precision = np.divide(true, chosen, out=np.zeros_like(true), where=chosen > 0)
        mixed = (true[:, -1] > 0) & (false[:, -1] > 0)
        return np.where(mixed, _ratio((positive * precision).sum(axis=1), true[:, -1]), np.nan)


def _calibration_error(
    weights: Float[Array, "r n"], certainty: Float[Array, " n"], right: Bool[Array, " n"]
) -> Float[Array, " r"]:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599) in bins (a, b] of equal width."""
    place = np.clip(np.ceil(certainty * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gap = np.zeros((len(certainty), ECE_BINS))
    gap[np.arange(len(certainty)), place] = right - certainty
    return np.asarray(np.abs(weights @ gap).sum(axis=1) / weights.sum(axis=1))


def _ratio(above: Float[Array, "..."], below: Float[Array, "..."]) -> Float[Array, "..."]:
    return np.asarray(np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0))
