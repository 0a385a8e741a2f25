"""95 % intervals: in closed form where there is one, else by resampling images or whole groups of them.

The closed forms hold for few images and at the ends of the scale, where resamples do not vary: a model that is right on
all 10 images has an accuracy of 1 in every resample; Wilson's interval is [0.72 1].

Shares of images (accuracy, recall, precision, specificity): Wilson (1927). F1 is a function of a share, of the right
    among the images that are of the class or called so: J = TP / (TP + FP + FN) and F1 = 2 J / (1 + J).
AUROC: the score-type interval of Newcombe (2006, Statistics in Medicine 25:559, method 5), with the variance of
    Hanley and McNeil at each candidate value.
Means over classes (balanced accuracy, AUROC): the limits of the classes joined by MOVER (Zou and Donner 2008,
    Statistics in Medicine 27:1693).

Images of one group (a patient) are not independent. The number of images is then divided by the design effect, the
variance between groups over that of independent images (Korn and Graubard 1998; for AUROC the clustered variance of
Obuchowski 1997); where all images are decided alike it cannot be measured, and each group counts once.

Letters: n images, k classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from numpy.typing import NDArray

from keyhole.tasks.measures import ClassMeasures

LEVEL = 0.95
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)
MAX_WEIGHTS_TOGETHER = 2_000_000
"""Weights held at once; bounds memory, not the result."""

Weights = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class IntervalEstimate:
    """A value with its 95 % interval; None where undefined. The note says why, or what the value leaves out."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str | None = None
    method: str | None = None

    def __str__(self) -> str:
        if self.value is None:
            return f"undefined ({self.note})"
        if self.low is None or self.high is None:
            return f"{short(self.value)} (no interval: {self.note})"
        return f"{short(self.value)} [{short(self.low)} {short(self.high)}]"


class Interval(NamedTuple):
    """Limits of a value, the name of their method, and the value."""

    low: float
    high: float
    method: str
    value: float


class ClassIntervals:
    """Intervals in closed form of the metrics of a task with classes; c is the index of a class.

    Args:
        of: Measures of at least two units.
        unit: Group of each image, 0 and up; a number of its own where images stand alone.
    """

    def __init__(self, of: ClassMeasures, unit: Int[Array, " n"]) -> None:
        self.of, self.unit = of, unit

    def all_right(self) -> Interval | None:
        right = self.of.all_right
        return share_interval(right, np.ones_like(right), self.unit)

    def accuracy(self, c: int) -> Interval | None:
        right = self.of.truth[:, c] == self.of.decided[:, c]
        return share_interval(right, np.ones_like(right), self.unit)

    def recall(self, c: int) -> Interval | None:
        return share_interval(self.of.decided[:, c], self.of.truth[:, c], self.unit)

    def specificity(self, c: int) -> Interval | None:
        return share_interval(~self.of.decided[:, c], ~self.of.truth[:, c], self.unit)

    def precision(self, c: int) -> Interval | None:
        return share_interval(self.of.truth[:, c], self.of.decided[:, c], self.unit)

    def f1(self, c: int) -> Interval | None:
        true, called = self.of.truth[:, c], self.of.decided[:, c]
        jaccard = share_interval(true & called, true | called, self.unit) if true.any() else None
        if jaccard is None:
            return None
        low, high, value = (2 * limit / (1 + limit) for limit in (jaccard.low, jaccard.high, jaccard.value))
        return Interval(low, high, "Wilson", value)

    def balanced_accuracy(self, c: int) -> Interval | None:
        return _mean_interval([self.recall(c), self.specificity(c)])

    def mean_recall(self) -> Interval | None:
        return _mean_interval([self.recall(c) for c in np.flatnonzero(self.of.present).tolist()])

    def auroc(self, c: int) -> Interval | None:
        return self._rankings[c].interval if c in self._rankings else None

    def mean_auroc(self) -> Interval | None:
        rankings = list(self._rankings.values())
        if not rankings:
            return None
        if self.of.exclusive and len(self.of.classes) == 2:
            return rankings[0].interval  # that of the other class is the same
        # The AUROCs are correlated as their influences are. One of 0 or 1 has no influences; 1 is the safe correlation.
        influence = np.stack([np.bincount(self.unit, each.influence) for each in rankings])
        covariance = influence @ influence.T
        spread = np.sqrt(np.diag(covariance))
        scale = np.outer(spread, spread)
        correlation = np.divide(covariance, scale, out=np.ones_like(scale), where=scale > 0)
        return _joined([each.interval for each in rankings], correlation)

    @cached_property
    def _rankings(self) -> dict[int, Ranking]:
        truth, score = self.of.truth, self.of.probability
        mixed = np.flatnonzero(self.of.mixed).tolist()
        return {c: auroc_interval(truth[:, c], score[:, c], self.unit) for c in mixed}


# Shares


def share_interval(success: Bool[Array, " n"], counted: Bool[Array, " n"], unit: Int[Array, " n"]) -> Interval | None:
    """Return Wilson's interval of the share of `success` among the images `counted`; None where there are none."""
    n = int(counted.sum())
    if not n:
        return None
    share = float(success[counted].mean())
    return Interval(*wilson(share, *_effective(success[counted], share, unit[counted])), "Wilson", share)


def wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """Return the limits of a share of n images: the p with |p - share| = quantile * sqrt(p (1 - p) / n).

    >>> [round(limit, 3) for limit in wilson(1.0, 10, 1.96)]
    [0.722, 1.0]
    """
    squared = quantile**2 / n
    middle, half = (share + squared / 2) / (1 + squared), quantile * np.sqrt(share * (1 - share) / n + squared / n / 4)
    half /= 1 + squared
    low = 0.0 if share == 0 else max(0.0, float(middle - half))
    high = 1.0 if share == 1 else min(1.0, float(middle + half))
    return low, high


def _effective(success: Bool[Array, " n"], share: float, unit: Int[Array, " n"]) -> tuple[float, float]:
    """Return how many independent images say as much about a share as these, and the quantile to use."""
    number, place = np.unique(unit, return_inverse=True)
    groups, n = len(number), len(unit)
    if groups == n or share in (0, 1):
        return groups, NORMAL
    if groups == 1:
        return 1.0, NORMAL
    apart = np.bincount(place, success - share, groups)
    variance = groups / (groups - 1) * float(apart @ apart) / n**2
    independent = share * (1 - share)
    return min(n, max(1.0, independent / variance)) if variance > 0 else n, student(groups - 1)


# AUROC


class Ranking(NamedTuple):
    """The interval of an AUROC, and by how much each image moves it."""

    interval: Interval
    influence: Float[Array, " n"]


def auroc_interval(truth: Bool[Array, " n"], score: Float[Array, " n"], unit: Int[Array, " n"]) -> Ranking:
    """Return Newcombe's interval of the probability that an image of the class scores above another."""
    positive, negative = score[truth], score[~truth]
    m, n = len(positive), len(negative)
    above = _wins(positive, negative)
    value = float(above.mean())
    influence = np.empty(len(score))
    influence[truth] = (above - value) / m
    influence[~truth] = (1 - _wins(negative, positive) - value) / n
    groups, quantile, effective_m, effective_n = len(np.unique(unit)), NORMAL, float(m), float(n)
    if groups < len(unit):
        independent = float(influence @ influence)
        if independent > 0 and groups > 1:
            between = np.bincount(unit, influence)
            effect = max(1.0, groups / (groups - 1) * float(between @ between) / independent)
            effective_m, effective_n, quantile = m / effect, n / effect, student(groups - 1)
        else:
            effective_m, effective_n = float(len(np.unique(unit[truth]))), float(len(np.unique(unit[~truth])))
    low, high = newcombe(value, max(1.0, effective_m), max(1.0, effective_n), quantile)
    return Ranking(Interval(low, high, "Newcombe", value), influence)


def newcombe(value: float, m: float, n: float, quantile: float) -> tuple[float, float]:
    """Return the values a with |a - value| = quantile * sqrt(V(a)), where, with N = (m + n) / 2,

    V(a) = a (1 - a) (1 + (N - 1) ((1 - a) / (2 - a) + a / (1 + a))) / (m n).

    >>> [round(limit, 3) for limit in newcombe(1.0, 5, 5, 1.96)]
    [0.643, 1.0]
    """
    middle = (m + n) / 2

    def beyond(a: float) -> bool:
        spread = a * (1 - a) * (1 + (middle - 1) * ((1 - a) / (2 - a) + a / (1 + a))) / (m * n)
        return abs(a - value) > quantile * float(np.sqrt(spread))

    def limit(end: float) -> float:
        inside, outside = value + (end - value) * 1e-12, end
        for _ in range(60):
            half = (inside + outside) / 2
            inside, outside = (inside, half) if beyond(half) else (half, outside)
        return inside

    return 0.0 if value == 0 else limit(0.0), 1.0 if value == 1 else limit(1.0)


def _wins(score: Float[Array, " a"], others: Float[Array, " b"]) -> Float[Array, " a"]:
    """Return the share of the others that each score is above; a tie counts half."""
    ranked = np.sort(others)
    below, up_to = np.searchsorted(ranked, score, "left"), np.searchsorted(ranked, score, "right")
    return np.asarray((below + up_to) / 2 / len(others))


# Means over classes


def _mean_interval(parts: Sequence[Interval | None]) -> Interval | None:
    """Return the interval of the mean of independent values; None where one of them has no interval."""
    known = [interval for interval in parts if interval is not None]
    return _joined(known, np.eye(len(known))) if known and len(known) == len(parts) else None


def _joined(parts: Sequence[Interval], correlation: Float[Array, "k k"]) -> Interval:
    value = np.array([part.value for part in parts])
    below = value - [part.low for part in parts]
    above = np.array([part.high for part in parts]) - value
    low, high = (float(np.sqrt(max(0.0, float(gap @ correlation @ gap)))) / len(parts) for gap in (below, above))
    mean = float(value.mean())
    return Interval(max(0.0, mean - low), min(1.0, mean + high), "MOVER", mean)


def student(degrees: int) -> float:
    """Return the quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + LEVEL) / 2))


# By resampling


def bootstrap(
    measure: Callable[[Weights], Mapping[K, Weights]],
    n: int,
    groups: Sequence[str | None] | None = None,
    seed: int = 0,
    rounds: int = 1000,
    notes: Mapping[K, str] | None = None,
) -> dict[K, IntervalEstimate]:
    """Percentile bootstrap (Efron 1979) of all metrics of `measure` on the same resamples.

    `measure` turns weights (r, n), how often each image counts, into metrics (r,), NaN where undefined. Groups
    are drawn whole; an image without one (None or empty) is one by itself. A round in which a metric is undefined
    does not count for it. There is no interval where that is more than half of the rounds, or where all agree.

    >>> values = np.arange(20.0)
    >>> print(bootstrap(lambda w: {"mean": w @ values / w.sum(axis=1)}, n=20)["mean"])
    9.500 [6.950 11.9]
    """
    notes = notes or {}
    points = {key: float(values[0]) for key, values in measure(np.ones((1, n))).items()}
    unit = units_of(n, groups)
    units, rng, block = int(unit.max()) + 1, np.random.default_rng(seed), max(1, MAX_WEIGHTS_TOGETHER // n)
    drawn: dict[K, list[Weights]] = {key: [] for key in points}
    for start in range(0, rounds if units > 1 else 0, block):
        draws = [rng.integers(0, units, units) for _ in range(start, min(start + block, rounds))]
        counts = np.stack([np.bincount(draw, minlength=units) for draw in draws]).astype(np.float64)
        for key, values in measure(counts[:, unit]).items():
            drawn[key].append(values)
    what = "image" if groups is None else "group"
    return {
        key: _estimate(value, np.concatenate(drawn[key]) if units > 1 else None, what, notes.get(key))
        for key, value in points.items()
    }


def units_of(n: int, groups: Sequence[str | None] | None) -> NDArray[np.int64]:
    """Return the number of the unit that each image is drawn with, 0 and up."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"groups (={len(groups)}) must be as many as images (={n})")
    number: dict[str | int, int] = {}
    return np.array([number.setdefault(group or image, len(number)) for image, group in enumerate(groups)], np.int64)


def _estimate(value: float, drawn: Weights | None, unit: str, note: str | None) -> IntervalEstimate:
    if np.isnan(value):
        return IntervalEstimate(None, note=note or "undefined on these images")
    if drawn is None:
        return IntervalEstimate(value, note=_notes(note, f"there is only one {unit}"))
    defined = drawn[~np.isnan(drawn)]
    lost = len(drawn) - len(defined)
    if 2 * lost > len(drawn) or not len(defined):
        return IntervalEstimate(value, note=_notes(note, f"undefined in {lost} of {len(drawn)} resamples"))
    low, high = np.percentile(defined, [2.5, 97.5])
    if high - low <= 1e-12 * max(1.0, abs(value)):
        return IntervalEstimate(value, note=_notes(note, "all resamples give the same value, so they show no spread"))
    dropped = f"undefined in {lost} of {len(drawn)} resamples, which do not count" if lost else None
    return IntervalEstimate(value, float(low), float(high), _notes(note, dropped), "bootstrap")


def _notes(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def short(value: float) -> str:
    """Return a figure with three decimals, or with four digits from 10 on."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
