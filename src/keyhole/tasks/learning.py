"""Compares predictions with guessing, and says in words whether a model has learned anything and what to try next.

A run can end with exit code 0 though its model is no better than guessing, whether by its loss, its AUROC or its
balanced accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.config.auto import SCRATCH_LR, number, settle_learning
from keyhole.config.settings import Config
from keyhole.tasks.evaluation import groups_of
from keyhole.tasks.intervals import ClassIntervals, student, units_of
from keyhole.tasks.kinds import Task
from keyhole.tasks.measures import ClassMeasures, RegressionMeasures
from keyhole.tasks.metrics import task_metrics

EVEN_MARGIN = 0.05
"""Attention is even if no patch has more than this share above 1 / M."""
PROMISING_LOSS = 0.95
"""A model with a loss below this share of the loss of guessing may have learned, though too few images show it."""
PROMISING_METRIC = 0.8
"""The same of a model with at least this AUROC or balanced accuracy."""
MIN_NUMBERS = 4
"""Fewest images of a regression for a verdict."""


@dataclass(frozen=True)
class TaskLearning:
    """What the predictions of one task say about a model."""

    task: str  # its name
    images: int  # with a known label
    loss: float | None = None  # mean cross-entropy of the labels, or mean squared error as a share of the variance
    guessing: float | None = (
        None  # the same of the best constant prediction: the frequencies of the classes, or the mean
    )
    learned: bool | None = None  # whether it is better than guessing by more than chance; None where that is open
    only: str | None = None  # the one prediction that all images get, though their labels differ
    even: bool | None = None  # all kept patches of every image have the same attention; None where one patch was kept

    @property
    def judged(self) -> bool:
        """Whether the labels could tell, which those of one class cannot."""
        return self.loss is not None

    def facts(self) -> list[str]:
        found = []
        if self.learned is False and self.loss is not None and self.guessing is not None:
            found.append(f"its loss is {self.loss:.3f}, and guessing gives {self.guessing:.3f}")
        if self.only is not None:
            found.append(f"it says {self.only} for all {self.images} images")
        if self.even:
            found.append("it gives all kept patches of an image the same attention")
        return found


@dataclass(frozen=True)
class Learning:
    """What the predictions of all tasks say about a model on images such as `the 18 validation images`."""

    where: str
    tasks: tuple[TaskLearning, ...]

    @property
    def learned(self) -> bool | None:
        """Whether the model is better than guessing in any task; None if that is open in one, or no task can tell."""
        told = [task.learned for task in self.tasks if task.judged]
        return True if True in told else None if None in told or not told else False

    @property
    def judged(self) -> bool:
        """Whether the labels of any task could tell."""
        return any(task.judged for task in self.tasks)

    def lines(self, config: Config | None = None) -> list[str]:
        """Return warnings and what to try next, which depends on the run's settings; empty where all is well."""
        odd = [task for task in self.tasks if task.facts()]
        if not odd:
            return []
        nothing = f"warning: the model has learned nothing that shows on {self.where}"
        lines = [nothing] if self.learned is False else []
        for task in odd:
            start = f"{task.task}: " if len(self.tasks) > 1 else ""
            lines.append(f"warning: {start}on {self.where}, {'; '.join(task.facts())}")
        return [*lines, f"try next: {'; '.join(what_to_try(self, config))}"]

    def to_json(self, config: Config | None = None) -> dict[str, Any]:
        tasks = [asdict(task) for task in self.tasks]
        return {"learned": self.learned, "images": self.where, "tasks": tasks, "lines": self.lines(config)}


def unevenness(attention: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
    """Return by task by which share of 1 / m the largest attention of the m kept patches exceeds 1 / m.

    0 is equal attention for all, m - 1 all attention on one patch, and -1 a single kept patch.
    """
    return {
        task: float(len(weights) * weights.astype(np.float64).max() - 1) if len(weights) > 1 else -1.0
        for task, weights in attention.items()
    }


def judge_task(
    task: Task,
    targets: ArrayLike,
    probabilities: ArrayLike,
    uneven: Sequence[float],
    groups: Sequence[str | None] | None = None,
) -> TaskLearning:
    """Compare the predictions of one task with guessing; arguments as for `evaluate_task` and `unevenness`."""
    targets, probabilities = np.asarray(targets, np.float64), np.asarray(probabilities, np.float64)
    known = ~np.isnan(targets).any(axis=1)
    spread = np.asarray(uneven, np.float64)
    spread = spread[spread >= 0]
    even = bool((spread < EVEN_MARGIN).all()) if len(spread) else None
    n = int(known.sum())
    nothing = TaskLearning(task.name, n, even=even)
    if not n:
        return nothing
    measures = task.measure(targets[known], probabilities[known])
    if isinstance(measures, RegressionMeasures):
        return _judge_numbers(nothing, measures)
    return _judge_classes(nothing, measures, task, units_of(n, groups_of(groups, known)))


def _judge_classes(nothing: TaskLearning, measures: ClassMeasures, task: Task, unit: NDArray[np.int64]) -> TaskLearning:
    if not measures.mixed.any() or unit.max() == 0:
        return nothing  # labels of one class, or images of one group: anything fits them
    truth, decided = measures.truth, measures.decided
    probability = np.clip(measures.probability, 1e-12, 1 - 1e-12)
    frequency = truth.mean(axis=0)
    if task.exclusive:
        right = truth.argmax(axis=1)
        loss, guess = -np.log(probability[np.arange(len(right)), right]), -np.log(frequency[right])
        alike = bool(decided.any(axis=0).sum() == 1)
    else:
        frequency = np.broadcast_to(np.clip(frequency, 1e-12, 1 - 1e-12), truth.shape)
        loss, guess = (-np.log(np.where(truth, p, 1 - p)).mean(axis=1) for p in (probability, frequency))
        alike = bool((decided == decided[0]).all() and not (truth == truth[0]).all())
    said = " and ".join(np.array(task.classes)[decided[0]].tolist()) or "none of the labels"
    weighted, limits = measures(np.ones((1, len(loss)))), ClassIntervals(measures, unit)
    compared = [
        (metric.value(weighted)[0], interval.low > metric.chance(measures))
        for metric in task_metrics(task)
        if metric.chance is not None and (interval := metric.interval(limits)) is not None
    ]
    shown = _is_below(loss - guess, unit) or any(above for _, above in compared)
    promising = loss.mean() < PROMISING_LOSS * guess.mean() or any(value >= PROMISING_METRIC for value, _ in compared)
    learned = _verdict(shown, bool(promising))
    only = said if alike else None
    return replace(nothing, loss=float(loss.mean()), guessing=float(guess.mean()), learned=learned, only=only)


def _judge_numbers(nothing: TaskLearning, measures: RegressionMeasures) -> TaskLearning:
    truth, said = measures.truth, measures.said
    variance = float(truth.var())
    if len(truth) < MIN_NUMBERS or variance <= 1e-24 * float((truth**2).max()):
        return nothing
    loss = float(((said - truth) ** 2).mean()) / variance
    flat = bool(said.std() < 1e-3 * truth.std())
    shown = False
    if not flat:  # is the correlation above 0 by more than chance? Fisher's z, 97.5 %
        r = float(np.clip(np.corrcoef(truth, said)[0, 1], -0.999999, 0.999999))
        shown = bool(np.arctanh(r) > 1.96 / np.sqrt(len(truth) - 3))
    learned = _verdict(shown, loss < PROMISING_LOSS)
    only = f"nearly the same number ({said.mean():.6g})" if flat else None
    return replace(nothing, loss=loss, guessing=1.0, learned=learned, only=only)


def _verdict(shown: bool, promising: bool) -> bool | None:
    """Return whether a model has learned; None for one that looks as if it had, on too few images to tell."""
    return True if shown else None if promising else False


def _is_below(difference: NDArray[np.float64], unit: NDArray[np.int64]) -> bool:
    """Return whether the mean over images is below 0 by more than chance, between units (one-sided t, 97.5 %)."""
    mean, units = float(difference.mean()), int(unit.max()) + 1
    apart = np.bincount(unit, difference - mean)
    error = np.sqrt(units / (units - 1) * float(apart @ apart)) / len(difference)
    return bool(mean + student(units - 1) * error < 0)


def what_to_try(learning: Learning, config: Config | None) -> list[str]:
    """Return changes of a run that may help, the likeliest first."""
    if config is None:
        return ["more epochs, another --train.lr, an encoder with pretrained weights, a larger --select.m"]
    train = config.train
    found = first_steps(config) if learning.learned is False else []
    if learning.learned is False:
        found.append(f"more epochs: --train.epochs {max(2 * train.epochs, 30)}")
    if any(task.only is not None for task in learning.tasks) and train.balance == "none":
        found.append("--train.balance loss, if some classes are rare")
    features, even = config.model.feature_width is not None, any(task.even for task in learning.tasks)
    new = config.model.learned_before and config.model.start is None and not features  # attention, on a known encoder
    if even and new and train.explore in (0, "auto"):
        epochs = max(1, round(train.epochs / 3))
        found.append(f"--train.explore {epochs}, so that attention learns from patches that it did not choose")
    if learning.learned is False or even:
        other = "patches of another size, by keyhole embed" if features else "a --patch.size that shows what decides"
        found.append(f"more patches, where images have them: --select.m {2 * config.select.m}; or {other}")
    return found or ["more epochs, or another --train.lr"]


def first_steps(config: Config) -> list[str]:
    """Return changes of the settings of a run that learns nothing, the likeliest first."""
    config, _ = settle_learning(config, config.model.feature_width is not None)
    lr = number(config.train.lr, "train.lr")
    if config.model.feature_width is not None or config.model.learned_before:
        return [f"another rate than --train.lr {lr:g}, such as {lr / 3:.1g} or {lr * 3:.1g}"]
    found = []
    if not config.train.explore:
        epochs = max(1, config.train.epochs // 2)
        found.append(f"--train.explore {epochs}, so that the encoder learns before it selects")
    if lr < SCRATCH_LR:
        found.append(f"--train.lr {SCRATCH_LR:g}, a rate for encoders that start from random weights")
    return [*found, "pretrained weights: --model.encoder lite0, or --model.weights FILE"]
