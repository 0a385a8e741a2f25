"""95 % intervals by resampling images, or whole groups of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)

MAX_WEIGHTS_TOGETHER = 2_000_000
"""Weights held at once; bounds memory, not the result."""


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
            return f"{_short(self.value)} (no interval: {self.note})"
        return f"{_short(self.value)} [{_short(self.low)} {_short(self.high)}]"


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
        return IntervalEstimate(value, note=_joined(note, f"there is only one {unit}"))
    defined = drawn[~np.isnan(drawn)]
    lost = len(drawn) - len(defined)
    if 2 * lost > len(drawn) or not len(defined):
        return IntervalEstimate(value, note=_joined(note, f"undefined in {lost} of {len(drawn)} resamples"))
    low, high = np.percentile(defined, [2.5, 97.5])
    if high - low <= 1e-12 * max(1.0, abs(value)):
        return IntervalEstimate(value, note=_joined(note, "all resamples give the same value, so they show no spread"))
    dropped = f"undefined in {lost} of {len(drawn)} resamples, which do not count" if lost else None
    return IntervalEstimate(value, float(low), float(high), _joined(note, dropped), "bootstrap")


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
