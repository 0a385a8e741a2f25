"""One class per kind of task. To add a kind, add a subclass of `Task` here and list its metrics in `metrics.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from keyhole.errors import ConfigError, DataError
from keyhole.tasks.label_text import (
    SEPARATOR,
    class_order,
    decimal_comma,
    is_number,
    parse_number,
    positive_by_name,
    split_labels,
)
from keyhole.tasks.measures import THRESHOLD, ClassMeasures, RegressionMeasures
from keyhole.tasks.task import KINDS as KINDS
from keyhole.tasks.task import Floats
from keyhole.tasks.task import Task as Task
from keyhole.util.wording import listed, nearest

if TYPE_CHECKING:
    from torch import Tensor


class Multiclass(Task, kind="multiclass"):
    """Exactly one of k classes; cross-entropy."""

    exclusive = True

    @classmethod
    def from_labels(cls, name: str, labels: Sequence[str], positive: str | None = None) -> Task:
        _check_several(name, labels)
        return Task(name, "multiclass", class_order(labels))

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        from torch.nn import functional as F

        return F.cross_entropy(logits, target[:, 0].long(), weight)

    def _probability(self, logits: Floats) -> Floats:
        power = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(power / power.sum(axis=-1, keepdims=True))


class Binary(Task, kind="binary"):
    """The second class, which is the positive one, against the first; binary cross-entropy."""

    exclusive = True
    takes_positive = True
    threshold = THRESHOLD
    class_counts = (2, 2)

    @classmethod
    def from_labels(cls, name: str, labels: Sequence[str], positive: str | None = None) -> Task:
        _check_several(name, labels)
        if len(labels) > 2:
            raise DataError(
                f"{name}: binary, but there are {len(labels)} classes ({listed(labels, 10)}). Use multiclass."
            )
        first, second = class_order(labels)
        if positive is not None and positive not in labels:
            there = f"they are {first}, {second}"
            raise DataError(f"{name}: no label is {positive!r}{nearest(positive, (first, second))}; {there}.")
        swapped = positive == first if positive is not None else positive_by_name((first, second)) == 0
        return Task(name, "binary", (second, first) if swapped else (first, second))

    @property
    def outputs(self) -> int:
        return 1

    @property
    def positive(self) -> str:
        return self.classes[1]

    @property
    def thresholded(self) -> tuple[str, ...]:
        return (self.positive,)

    def label(self, probability: ArrayLike, above: Mapping[str, float] | None = None) -> str:
        if above is None or self.positive not in above:
            return super().label(probability)
        return self.classes[int(np.asarray(probability, np.float64)[1] > above[self.positive])]

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        from torch.nn import functional as F

        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")[:, 0]
        if weight is None:
            return loss.mean()
        each = weight[target[:, 0].long()]
        return (loss * each).sum() / each.sum()

    def _probability(self, logits: Floats) -> Floats:
        return np.concatenate([_sigmoid(-logits), _sigmoid(logits)], axis=-1)


class Multilabel(Task, kind="multilabel"):
    """Any of k classes, several or none; binary cross-entropy of each."""

    threshold = THRESHOLD
    class_counts = (1, np.inf)

    @classmethod
    def from_labels(cls, name: str, labels: Sequence[str], positive: str | None = None) -> Task:
        classes = {part for text in labels for part in split_labels(text)}
        if not classes:
            raise DataError(f"{name}: no image has any of the labels, so there is nothing to learn.")
        return Task(name, "multilabel", class_order(sorted(classes)))

    @property
    def target_width(self) -> int:
        return len(self.classes)

    def _encode(self, text: str) -> ArrayLike:
        target = np.zeros(self.target_width)
        target[[self._class_index(part) for part in self.split(text)]] = 1
        return target

    def split(self, label: str) -> list[str]:
        return split_labels(label)

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)

    def _class_weights(self, known: Tensor) -> Tensor:
        """Ratio of negatives to positives, per class."""
        positive = known.sum(dim=0).clamp(min=1)
        return (len(known) - positive).clamp(min=1) / positive

    def _probability(self, logits: Floats) -> Floats:
        return _sigmoid(logits)

    @property
    def thresholded(self) -> tuple[str, ...]:
        return self.classes

    def label(self, probability: ArrayLike, above: Mapping[str, float] | None = None) -> str:
        said, limit = zip(self.classes, np.asarray(probability, np.float64), strict=True), above or {}
        return SEPARATOR.join(name for name, p in said if p > limit.get(name, THRESHOLD))

    def _credit(self, target: Floats, probability: Floats) -> float:
        return float(np.where(target > 0.5, probability, 1 - probability).mean())

    def certainty(self, probability: Floats) -> float | None:
        return float(np.abs(probability - THRESHOLD).min())

    def measure(self, targets: Floats, probabilities: Floats) -> ClassMeasures:
        return ClassMeasures(self.classes, targets > 0.5, probabilities > THRESHOLD, probabilities, exclusive=False)


class Regression(Task, kind="regression"):
    """A number; squared error of the standardised value."""

    default_metric = "mae"
    class_counts = (0, 0)

    @classmethod
    def from_labels(cls, name: str, labels: Sequence[str], positive: str | None = None) -> Task:
        for text in labels:
            cls.check_label(name, text)
        return Task(name, "regression")

    @classmethod
    def check_label(cls, name: str, text: str) -> None:
        if text.strip():
            parse_number(name, text.strip())

    def encode(self, text: str) -> Floats:
        text = text.strip()
        return np.array([parse_number(self.name, text) if text else np.nan])

    def fit(self, targets: ArrayLike) -> Task:
        known = np.asarray(targets, np.float64).ravel()
        known = known[~np.isnan(known)]
        if not len(known):
            raise DataError(f"{self.name}: no training image has a value, so there is nothing to learn.")
        std = float(known.std())
        # Equal values have no spread to divide by; rounding can leave a spread of the order of the last digit.
        return replace(self, mean=float(known.mean()), std=std if std > 1e-14 * np.abs(known).max() else 1.0)

    @property
    def outputs(self) -> int:
        return 1

    def loss_target(self, target: Tensor) -> Tensor:
        # In float32 the mean would cancel the differences.
        return ((target.double() - self.mean) / self.std).float()

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        from torch.nn import functional as F

        return F.mse_loss(logits, target)

    def _probability(self, logits: Floats) -> Floats:
        return logits * self.std + self.mean

    @property
    def columns(self) -> tuple[str, ...]:
        return ("value",)

    def label(self, probability: ArrayLike, above: Mapping[str, float] | None = None) -> str:
        value = float(np.asarray(probability, np.float64)[0])
        shared_digits = np.log10(max(abs(value), self.std) / self.std)
        return f"{value:.{int(np.clip(5 + np.ceil(shared_digits), 6, 17))}g}"

    def table_cell(self, label: str, probability: Mapping[str, float]) -> str:
        return repr(probability["value"])

    def _credit(self, target: Floats, probability: Floats) -> float:
        return -abs(float(probability[0] - target[0]))

    def certainty(self, probability: Floats) -> float | None:
        return None

    def measure(self, targets: Floats, probabilities: Floats) -> RegressionMeasures:
        return RegressionMeasures(targets, probabilities)


def _check_several(name: str, labels: Sequence[str]) -> None:
    if len(labels) == 1:
        raise DataError(f"{name}: all labels are {labels[0]!r}; at least two classes are needed to learn.")


def _sigmoid(x: Floats) -> Floats:
    # of a negative number, which cannot overflow
    power = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, power) / (1.0 + power))


# A column of labels -> its task

MAX_NUMBERED_CLASSES = 20
"""A column of whole numbers with more distinct values is a quantity."""

_WORDS_FOR_MISSING = {"na", "n/a", "nan", "none", "null", "inf", "-inf", "?", "-"}


def infer_task(name: str, texts: Iterable[str], kind: str | None = None) -> Task:
    """Infer the task of a column of labels; empty texts are unknown labels.

    Without a `kind`, any `|` makes it multilabel, numbers with a fraction or with more than `MAX_NUMBERED_CLASSES`
    distinct values regression, two distinct values binary, and everything else multiclass. The positive class of a
    binary task is the one that `binary:CLASS` names, else the one that is positive by its name, else the second.

    >>> infer_task("state", ["defect", "ok", ""]).describe()
    'state (binary, positive: defect)'
    """
    chosen, positive = _kind_and_positive(name, kind)
    distinct = sorted({text.strip() for text in texts} - {""})
    if not distinct:
        raise DataError(f"{name}: no image has a label. Fill the column or choose other tasks.")
    if kind is None and (comma := decimal_comma(name, distinct)):
        raise DataError(f"{comma} with a point, or say {name}=multiclass if these are classes.")
    return KINDS[chosen or _inferred_kind(name, distinct)].from_labels(name, distinct, positive)


def check_label(name: str, text: str, kind: str | None) -> None:
    """Raise DataError where a label cannot be of the kind that the user named, whatever the classes are."""
    if kind in KINDS:
        KINDS[kind].check_label(name, text)


def positive_note(task: Task, kind: str | None = None) -> str | None:
    """Return what to say where neither the user (`kind`) nor the class names decide which class is positive."""
    if task.positive is None or ":" in (kind or "") or positive_by_name(task.classes) is not None:
        return None
    negative, positive = task.classes
    return (
        f"{task.name}: the positive class is {positive!r}, the second in order; "
        f"--data.tasks {task.name}=binary:{negative} takes the other"
    )


def _kind_and_positive(name: str, text: str | None) -> tuple[str | None, str | None]:
    if text is None:
        return None, None
    kind, colon, positive = (part.strip() for part in text.partition(":"))
    if kind not in KINDS:
        raise ConfigError(f"{name}={text}: no such kind{nearest(kind, KINDS)}; the kinds are {', '.join(KINDS)}")
    if colon and not (KINDS[kind].takes_positive and positive):
        raise ConfigError(f"{name}={text}: expected {name}=binary:CLASS; only a binary task has a positive class")
    return kind, positive or None


def _inferred_kind(name: str, distinct: Sequence[str]) -> str:
    if any(SEPARATOR in text for text in distinct):
        return "multilabel"
    numbers = [text for text in distinct if is_number(text)]
    words = [text for text in distinct if not is_number(text)]
    values = {float(text) for text in numbers}
    quantity = len(values) > MAX_NUMBERED_CLASSES or any(value != int(value) for value in values)
    if quantity and not words:
        return "regression"
    if quantity and all(word.lower() in _WORDS_FOR_MISSING for word in words):
        raise DataError(f"{name}: {words[0]!r} among numbers. Leave the cell empty where the value is unknown.")
    if not words and len(values) < len(numbers):
        twice = next(text for text in numbers if sum(float(other) == float(text) for other in numbers) > 1)
        alike = [text for text in numbers if float(text) == float(twice)]
        raise DataError(
            f"{name}: {listed(alike, 10)} are one number written differently. "
            f"Write them alike, or say {name}=multiclass if they are different classes."
        )
    return "binary" if len(distinct) == 2 else "multiclass"
