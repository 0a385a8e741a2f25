"""The threshold above which an image is called positive: chosen on some images, judged on others.

A threshold is midway between two scores that occur, so that rounding it for print changes no decision.

Letters: n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from keyhole.tasks.intervals import IntervalEstimate, share_interval, units_of

MIN_SENSITIVITY = 0.95
"""The sensitivity that one of the thresholds reaches on the images on which it is chosen."""
DEFAULT, BALANCED, SENSITIVE = "default", "balanced", "sensitive"


@dataclass(frozen=True)
class Threshold:
    """A threshold, and what it reaches on the images on which it was chosen; None for the fixed one.

    Attributes:
        rule: `default`, that of the predicted label; `balanced`, the largest sum of sensitivity and specificity
            (Youden 1950); `sensitive`, the largest with at least `MIN_SENSITIVITY`.
        value: An image is called positive if its score is above it.
    """

    rule: str
    value: float
    sensitivity: float | None = None
    specificity: float | None = None


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold judged on images on which it was not chosen.

    Attributes:
        label: The class that is called positive.
        threshold: The threshold and its rule.
        positive, found: Images of the class, and those of them above the threshold.
        negative, cleared: Other images, and those of them not above it.
        sensitivity, specificity: found / positive and cleared / negative, with Wilson's interval.
    """

    label: str
    threshold: Threshold
    positive: int
    found: int
    negative: int
    cleared: int
    sensitivity: IntervalEstimate
    specificity: IntervalEstimate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_thresholds(truth: Bool[Array, " n"], score: Float[Array, " n"]) -> list[Threshold]:
    """Return the thresholds that these images give; none if they are all of the class, or none of them is.

    Of equal sums of sensitivity and specificity, the one with the higher sensitivity is taken.

    >>> truth, score = np.array([False, False, True, True]), np.array([0.1, 0.3, 0.2, 0.8])
    >>> for each in choose_thresholds(truth, score):
    ...     print(each.rule, round(each.value, 2), each.sensitivity, each.specificity)
    balanced 0.15 1.0 0.5
    sensitive 0.15 1.0 0.5
    """
    if truth.all() or not truth.any():
        return []
    from sklearn.metrics import roc_curve

    false, true, scores = roc_curve(truth, score, drop_intermediate=False)
    below = np.append(scores[1:], 0.0 if scores[-1] > 0 else -1.0)  # the next score that occurs
    scores[0] = 1.0  # no image is positive
    middle = (scores + below) / 2
    values = np.where(middle < scores, middle, below)  # of neighbours in float64 there is no middle
    best = len(true) - 1 - int(np.argmax((true - false)[::-1]))
    sensitive = int(np.argmax(true >= MIN_SENSITIVITY))
    return [
        Threshold(rule, float(values[i]), float(true[i]), float(1 - false[i]))
        for rule, i in ((BALANCED, best), (SENSITIVE, sensitive))
    ]


def judge_threshold(
    label: str,
    threshold: Threshold,
    truth: Bool[Array, " n"],
    score: Float[Array, " n"],
    groups: Sequence[str | None] | None = None,
) -> OperatingPoint:
    """Return sensitivity and specificity of a threshold with 95 % intervals, over groups if there are any.

    >>> truth, score = np.array([True] * 10 + [False] * 10), np.array([0.9] * 20)
    >>> print(judge_threshold("yes", Threshold("default", 0.5), truth, score).sensitivity)
    1.000 [0.722 1.000]
    """
    called, unit = score > threshold.value, units_of(len(truth), groups)

    def share(right: Bool[Array, " n"], among: Bool[Array, " n"]) -> IntervalEstimate:
        interval = share_interval(right, among, unit)
        if interval is None:
            return IntervalEstimate(None, note="no such image")
        if not unit.any():
            return IntervalEstimate(interval.value, note="there is only one image or group")
        return IntervalEstimate(interval.value, interval.low, interval.high, method=interval.method)

    return OperatingPoint(
        label,
        threshold,
        int(truth.sum()),
        int((truth & called).sum()),
        int((~truth).sum()),
        int((~truth & ~called).sum()),
        share(called, truth),
        share(~called, ~truth),
    )
