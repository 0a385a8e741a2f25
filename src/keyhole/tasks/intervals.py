"""95 % intervals that hold for few images and at the ends of the scale, where resampling has nothing to vary.

A model that is right on all 10 images has an accuracy of 1 in every resample; Wilson's interval says [0.72 1].

Shares of images (accuracy, recall, precision, specificity): Wilson (1927). F1 is a function of a share, the right
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

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from keyhole.tasks.measures import ClassMeasures, Key

LEVEL = 0.95


class Interval(NamedTuple):
    """Limits of a value, and the name of the method they are from."""

    low: float
    high: float
    method: str


class _Effective(NamedTuple):
    """A number of images as if independent, and the quantile that belongs to it."""

    n: float
    quantile: float


def class_intervals(measure: ClassMeasures, unit: Int[Array, " n"]) -> dict[Key, Interval]:
    """Intervals of the metrics that have one in closed form; bootstrap the others.

    Args:
        measure: of at least two units.
        unit: the group of each image, 0 and up; a number of its own where images stand alone.
    """
    truth, decided, classes = measure.truth, measure.decided, measure.task.classes
    right = (truth == decided).all(axis=1)
    found: dict[Key, Interval | None] = {(None, "accuracy"): share_interval(right, np.ones_like(right), unit)}
    recalls, specificities = [], []
    for c, name in enumerate(classes):
        true, called = truth[:, c], decided[:, c]
        recall, specificity = share_interval(called, true, unit), share_interval(~called, ~true, unit)
        recalls.append((_share(called, true), recall))
        specificities.append((_share(~called, ~true), specificity))
        found |= {
            (name, "recall"): recall,
            (name, "specificity"): specificity,
            (name, "precision"): share_interval(true, called, unit),
            (name, "accuracy"): share_interval(true == called, np.ones_like(true), unit),
            (name, "balanced_accuracy"): mean_interval([recalls[-1], specificities[-1]]),
            (name, "f1"): _of_f1(share_interval(true & called, true | called, unit)) if true.any() else None,
        }
    if measure.exclusive:
        found[None, "balanced_accuracy"] = mean_interval(
            [pair for pair, use in zip(recalls, measure.present, strict=True) if use]
        )
    rankings = [
        auroc_interval(truth[:, c], measure.probability[:, c], unit) if mixed else None
        for c, mixed in enumerate(measure.mixed)
    ]
    found |= {(name, "auroc"): each and each.interval for name, each in zip(classes, rankings, strict=True)}
    used = [each for each in rankings if each is not None]
    if used:
        found[None, "auroc"] = (
            _mean_auroc(used, unit) if len(classes) > 2 or not measure.exclusive else used[0].interval
        )
    if measure.task.positive is not None:
        for metric in ("recall", "specificity", "precision", "f1"):
            found[None, metric] = found[measure.task.positive, metric]
    return {key: interval for key, interval in found.items() if interval is not None}


# Shares


def share_interval(success: Bool[Array, " n"], counted: Bool[Array, " n"], unit: Int[Array, " n"]) -> Interval | None:
    """Wilson's interval of the share of `success` among the images `counted`; None where none is."""
    n = int(counted.sum())
    if not n:
        return None
    share = _share(success, counted)
    return Interval(*wilson(share, *_effective(success[counted], share, unit[counted])), "Wilson")


def wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """Limits of a share of n images: where |p - share| = quantile * sqrt(p (1 - p) / n).

    >>> [round(limit, 3) for limit in wilson(1.0, 10, 1.96)]
    [0.722, 1.0]
    """
    squared = quantile**2 / n
    middle, half = (share + squared / 2) / (1 + squared), quantile * np.sqrt(share * (1 - share) / n + squared / n / 4)
    half /= 1 + squared
    low = 0.0 if share == 0 else max(0.0, float(middle - half))
    high = 1.0 if share == 1 else min(1.0, float(middle + half))
    return low, high


def _share(success: Bool[Array, " n"], counted: Bool[Array, " n"]) -> float:
    return float(success[counted].mean()) if counted.any() else float("nan")


def _effective(success: Bool[Array, " n"], share: float, unit: Int[Array, " n"]) -> _Effective:
    """How many independent images say as much of a share as these, which may be of the same groups."""
    number, place = np.unique(unit, return_inverse=True)
    groups, n = len(number), len(unit)
    if groups == n or share in (0, 1):
        return _Effective(groups, _normal())
    if groups == 1:
        return _Effective(1.0, _normal())
    apart = np.bincount(place, success - share, groups)
    variance = groups / (groups - 1) * float(apart @ apart) / n**2
    independent = share * (1 - share)
    return _Effective(min(n, max(1.0, independent / variance)) if variance > 0 else n, _student(groups - 1))


def _of_f1(jaccard: Interval | None) -> Interval | None:
    if jaccard is None:
        return None
    low, high = (2 * limit / (1 + limit) for limit in jaccard[:2])
    return Interval(low, high, "Wilson")


# AUROC


class Ranking(NamedTuple):
    """An AUROC with its interval, and by how much each image moves it."""

    value: float
    interval: Interval
    influence: Float[Array, " n"]


def auroc_interval(truth: Bool[Array, " n"], score: Float[Array, " n"], unit: Int[Array, " n"]) -> Ranking:
    """Newcombe's interval of the probability that an image of the class scores above another.

    Args:
        truth: of the class; both kinds must be there.
        score: of each image.
        unit: of each image.
    """
    positive, negative = score[truth], score[~truth]
    m, n = len(positive), len(negative)
    above = _wins(positive, negative)
    value = float(above.mean())
    influence = np.empty(len(score))
    influence[truth] = (above - value) / m
    influence[~truth] = (1 - _wins(negative, positive) - value) / n
    groups, quantile = len(np.unique(unit)), _normal()
    effective_m, effective_n = float(m), float(n)
    if groups < len(unit):
        independent = float(influence @ influence)
        if independent > 0 and groups > 1:
            between = np.bincount(unit, influence)
            effect = max(1.0, groups / (groups - 1) * float(between @ between) / independent)
            effective_m, effective_n, quantile = m / effect, n / effect, _student(groups - 1)
        else:
            effective_m, effective_n = float(len(np.unique(unit[truth]))), float(len(np.unique(unit[~truth])))
    low, high = newcombe(value, max(1.0, effective_m), max(1.0, effective_n), quantile)
    return Ranking(value, Interval(low, high, "Newcombe"), influence)


def newcombe(value: float, m: float, n: float, quantile: float) -> tuple[float, float]:
    """The values a with |a - value| = quantile * sqrt(V(a)), where, with N = (m + n) / 2,

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
    """Share of the others that each score is above; a tie counts half."""
    ranked = np.sort(others)
    below, up_to = np.searchsorted(ranked, score, "left"), np.searchsorted(ranked, score, "right")
    return np.asarray((below + up_to) / 2 / len(others))


def _mean_auroc(rankings: Sequence[Ranking], unit: Int[Array, " n"]) -> Interval:
    """Interval of the mean over classes, whose AUROCs vary together because they are of the same images.

    The correlations are those of the influences; where an AUROC is 0 or 1 it has none, and 1 is the safe value.
    """
    influence = np.stack([np.bincount(unit, each.influence) for each in rankings])
    covariance = influence @ influence.T
    spread = np.sqrt(np.diag(covariance))
    scale = np.outer(spread, spread)
    correlation = np.divide(covariance, scale, out=np.ones_like(scale), where=scale > 0)
    return _joined([(each.value, each.interval) for each in rankings], correlation)


# Means over classes


def mean_interval(parts: Sequence[tuple[float, Interval | None]]) -> Interval | None:
    """Interval of the mean of independent values; None where one has no interval."""
    known = [(value, interval) for value, interval in parts if interval is not None]
    return _joined(known, np.eye(len(known))) if known and len(known) == len(parts) else None


def _joined(parts: Sequence[tuple[float, Interval]], correlation: Float[Array, "k k"]) -> Interval:
    value = np.array([value for value, _ in parts])
    below = value - [interval.low for _, interval in parts]
    above = np.array([interval.high for _, interval in parts]) - value
    low, high = (float(np.sqrt(max(0.0, float(gap @ correlation @ gap)))) / len(parts) for gap in (below, above))
    mean = float(value.mean())
    return Interval(max(0.0, mean - low), min(1.0, mean + high), "MOVER")


# Quantiles


def _normal() -> float:
    return NormalDist().inv_cdf((1 + LEVEL) / 2)


def _student(degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + LEVEL) / 2))
