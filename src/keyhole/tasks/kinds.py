"""What a label column means: one class per kind of task.

A kind encodes labels, gives the width of the head, the loss, the probabilities, the label to show and what its
metrics are computed from. To add a kind, add a subclass of `Task` here and list the metrics that suit it in
`metrics.py`.

Torch is imported inside the methods that need it, so that reading a manifest does not load it.

Letters: b image, n images, k classes, w width of an encoded label, o outputs of the head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import DataError, RunError
from keyhole.tasks.label_text import SEPARATOR, class_order, parse_number, positive_by_name, split_labels
from keyhole.tasks.measures import THRESHOLD, ClassMeasures, RegressionMeasures
from keyhole.util.wording import listed, nearest

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]

KINDS: dict[str, type[Task]] = {}
"""The class of each kind of task, by name."""
MAX_SUMMARY_CLASSES = 10


@dataclass(frozen=True)
class Task:
    """One thing to predict about an image. `Task(name, kind, ...)` returns an instance of the class of that kind.

    Attributes:
        name: The CSV column.
        kind: `multiclass` (one of k), `binary` (second class against first), `multilabel` (any of k) or `regression`.
        classes: Class names in index order; empty for regression. For binary exactly (negative, positive).
        mean: Mean of a regression target in the training split; the logit is standardised.
        std: Standard deviation of the same targets, above 0.

    Raises:
        ValueError: The kind is unknown, or the classes or the scale do not fit it.

    Example:
        >>> task = Task("tumor", "binary", ("no", "yes"))
        >>> type(task).__name__, task.outputs, task.positive
        ('Binary', 1, 'yes')
        >>> task.label(task.probability([2.0]))
        'yes'
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    exclusive: ClassVar[bool] = False
    """True where an image has exactly one of the classes."""
    threshold: ClassVar[float | None] = None
    """Probability above which an image is said to be of a class; None where the largest probability decides."""
    default_metric: ClassVar[str] = "auroc"
    """The metric that names the best model where the user names none."""
    fewest_classes: ClassVar[int] = 2
    most_classes: ClassVar[int | None] = None

    def __init_subclass__(cls, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        KINDS[kind] = cls

    def __new__(cls, name: str = "", kind: str = "", *_args: Any, **_options: Any) -> Task:
        if cls is not Task:
            return super().__new__(cls)
        if kind not in KINDS:
            raise ValueError(f"kind (={kind!r}) must be one of {', '.join(KINDS)}")
        return super().__new__(KINDS[kind])

    def __post_init__(self) -> None:
        k = len(self.classes)
        if KINDS.get(self.kind) is not type(self):
            raise ValueError(f"kind (={self.kind!r}) is not the kind of {type(self).__name__}")
        if k < self.fewest_classes or (self.most_classes is not None and k > self.most_classes):
            raise ValueError(f"classes (={self.classes}) are not as many as a {self.kind} task has")
        if len(set(self.classes)) != k:
            raise ValueError(f"classes (={self.classes}) must differ from each other")
        if not (np.isfinite(self.mean) and np.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean (={self.mean}) and std (={self.std}) must be finite, and std above 0")

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict that `from_json` reads."""
        return {"name": self.name, "kind": self.kind, "classes": list(self.classes), "mean": self.mean, "std": self.std}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Task:
        """Return the task that `to_json` wrote.

        Raises:
            RunError: A key is missing or has a value that no task has.
        """
        try:
            return Task(
                name=str(data["name"]),
                kind=data["kind"],
                classes=tuple(str(name) for name in data["classes"]),
                mean=float(data["mean"]),
                std=float(data["std"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise RunError(f"a task is described wrongly: {what}. The model was not written by keyhole.") from error

    # Labels

    @classmethod
    def from_labels(cls, name: str, labels: Sequence[str], positive: str | None = None) -> Task:
        """Return the task that a column poses.

        Args:
            name: The column.
            labels: Its distinct labels, sorted; at least one.
            positive: The positive class that the user named; only where `takes_positive`.

        Raises:
            DataError: The labels do not fit the kind.
        """
        raise NotImplementedError

    @classmethod
    def check_label(cls, name: str, text: str) -> None:
        """Raise DataError where a label cannot be of this kind, whatever the classes are."""

    takes_positive: ClassVar[bool] = False

    def encode(self, text: str) -> NDArray[np.float32] | Floats:
        """Encode a label as written in the CSV.

        Args:
            text: The label; empty where it is unknown.

        Returns:
            The target (w,): the class index, a vector of 0 and 1 for multilabel, the number itself for regression; all
            NaN where the label is unknown. Numbers are float64, since float32 keeps only the hundreds of 1.7e9.

        Raises:
            DataError: The task does not have the class, or the text is not a number.

        Example:
            >>> Task("tags", "multilabel", ("bird", "fish", "horse")).encode("horse|bird")
            array([1., 0., 1.], dtype=float32)
        """
        text = text.strip()
        return np.asarray(self._encode(text) if text else np.full(self.target_width, np.nan), np.float32)

    def _encode(self, text: str) -> ArrayLike:
        return [self._class_index(text)]

    def fit(self, targets: ArrayLike) -> Task:
        """Return the task scaled to its training targets (n, w); only regression has a scale.

        Raises:
            DataError: No target is known.
        """
        return self

    def classes_of(self, text: str) -> tuple[str, ...]:
        """Return the classes that a label names; empty where it is unknown."""
        text = text.strip()
        index = {self._class_index(part) for part in self.split(text)} if text else ()
        return tuple(self.classes[i] for i in sorted(index))

    def split(self, label: str) -> list[str]:
        """Return the parts of a label: the label itself, or the labels that a multilabel text joins."""
        return [label]

    def _class_index(self, label: str) -> int:
        try:
            return self.classes.index(label)
        except ValueError:
            known = f"the classes are {listed(self.classes, 10)}"
            raise DataError(f"{self.name}: unknown class {label!r}{nearest(label, self.classes)}; {known}") from None

    # Model

    @property
    def outputs(self) -> int:
        """Width of the task's head."""
        return len(self.classes)

    @property
    def target_width(self) -> int:
        """Width of an encoded label."""
        return 1

    def loss_target(self, target: Tensor) -> Tensor:
        """Return what `loss` compares the logits with, from encoded labels (b, w) without NaN on the host."""
        raise NotImplementedError

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean loss, computed from logits so that a confident error keeps its gradient.

        Args:
            logits: (b, o) float32.
            target: What `loss_target` returns, on the device of the logits.
            weight: What `class_weights` returns, on the same device.
        """
        raise NotImplementedError

    def class_weights(self, targets: Tensor) -> Tensor | None:
        """Return the weights that balance the classes in training labels (n, w); None for regression."""
        known = targets[~targets.isnan().any(dim=1)]
        return self._class_weights(known) if len(known) else None

    def _class_weights(self, known: Tensor) -> Tensor | None:
        """Inverse class frequencies, mean 1 over the images."""
        counts = known[:, 0].long().bincount(minlength=len(self.classes)).clamp(min=1)
        return len(known) / (len(self.classes) * counts.float())

    def probability(self, logits: ArrayLike) -> Floats:
        """Turn logits into probabilities, or into the value in the unit of the target.

        Args:
            logits: (o,) or (b, o).

        Returns:
            Multiclass: softmax (k). Binary: 1 - p and p (2). Multilabel: sigmoids (k). Regression: the value (1). With
            a leading b where the logits have one.

        Example:
            >>> Task("age", "regression", mean=50.0, std=10.0).probability([1.5])
            array([65.])
        """
        logits = np.asarray(logits, np.float64)
        if logits.ndim not in (1, 2) or logits.shape[-1] != self.outputs:
            raise ValueError(f"logits of {logits.shape} must be ({self.outputs},) or (b, {self.outputs})")
        return self._probability(logits)

    def _probability(self, logits: Floats) -> Floats:
        raise NotImplementedError

    # Display

    @property
    def positive(self) -> str | None:
        """The class that precision, recall, F1 and average precision of a binary task are of; None for other kinds."""
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        """What each number that `probability` returns is called."""
        return self.classes

    def describe(self) -> str:
        """Return for example `grade (multiclass)`, or `tumor (binary, positive: yes)`."""
        return f"{self.name} ({self.kind}{'' if self.positive is None else f', positive: {self.positive}'})"

    def label(self, probability: ArrayLike) -> str:
        """Return the label of one image.

        Args:
            probability: (k,) as `probability` returns it.

        Returns:
            The class of the largest probability; for multilabel all above one half joined by `|`, perhaps none; for
            regression the value to six digits, or more where the targets differ only in later ones.
        """
        return self.classes[int(np.argmax(np.asarray(probability, np.float64)))]

    def by_column(self, probability: ArrayLike) -> dict[str, float]:
        """Return one image's probabilities (k,) by class name; by "value" for regression."""
        return {name: float(p) for name, p in zip(self.columns, np.asarray(probability), strict=True)}

    def table_cell(self, label: str, _probability: Mapping[str, float]) -> str:
        """Return the cell TASK.predicted of predictions.csv."""
        return label

    def group_name(self, label: str) -> str:
        """Return the QuPath class of an image's kept patches."""
        return label or "none"

    def is_right(self, truth: str | None, label: str) -> bool | None:
        """Return whether a predicted label is the true one; None where the truth is unknown or a number."""
        if not truth:
            return None
        return set(self.split(truth.strip())) - {""} == set(self.split(label)) - {""}

    def summary(self, labels: Sequence[str]) -> str:
        """Describe the labels of a data set in a few words, starting with the kind."""
        text = f"{self.kind}, {sum(label != '' for label in labels)} images labelled"
        if self.exclusive:
            number, rest = Counter(labels), len(self.classes) - MAX_SUMMARY_CLASSES
            text += ", " + ", ".join(f"{name} {number[name]}" for name in self.classes[:MAX_SUMMARY_CLASSES])
            text += f" and {rest} more classes" if rest > 0 else ""
        return text

    # Metrics

    def measure(self, targets: Floats, probabilities: Floats) -> ClassMeasures | RegressionMeasures:
        """Return what the metrics are computed from.

        Args:
            targets: (n, w), none missing.
            probabilities: (n, k) as `probability` returns them.
        """
        names = np.arange(len(self.classes))
        truth = np.asarray(targets.astype(np.int64) == names)
        decided = np.asarray(probabilities.argmax(axis=1)[:, None] == names)
        return ClassMeasures(self.classes, truth, decided, probabilities, exclusive=True)

    def ideal(self, targets: Floats) -> Floats:
        """Return the probabilities of a model that is always right, from targets (n, w)."""
        return np.eye(len(self.classes))[np.nan_to_num(targets[:, 0]).astype(np.int64)]


class Multiclass(Task, kind="multiclass"):
    """Exactly one of k classes; cross-entropy."""

    exclusive = True

    @classmethod
    def from_labels(cls, name: str, labels: Sequence[str], positive: str | None = None) -> Task:
        _check_several(name, labels)
        return Task(name, "multiclass", class_order(labels))

    def loss_target(self, target: Tensor) -> Tensor:
        return target[:, 0].long()

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        from torch.nn import functional as F

        return F.cross_entropy(logits, target, weight)

    def _probability(self, logits: Floats) -> Floats:
        power = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(power / power.sum(axis=-1, keepdims=True))


class Binary(Task, kind="binary"):
    """The second class, which is the positive one, against the first; binary cross-entropy."""

    exclusive = True
    takes_positive = True
    threshold = THRESHOLD
    most_classes = 2

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

    def loss_target(self, target: Tensor) -> Tensor:
        return target[:, 0]

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        from torch.nn import functional as F

        loss = F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")
        if weight is None:
            return loss.mean()
        each = weight[target.long()]
        return (loss * each).sum() / each.sum()

    def _probability(self, logits: Floats) -> Floats:
        return np.concatenate([_sigmoid(-logits), _sigmoid(logits)], axis=-1)


class Multilabel(Task, kind="multilabel"):
    """Any of k classes, several or none; binary cross-entropy of each."""

    threshold = THRESHOLD
    fewest_classes = 1

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

    def loss_target(self, target: Tensor) -> Tensor:
        return target

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        from torch.nn import functional as F

        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)

    def _class_weights(self, known: Tensor) -> Tensor:
        """Ratio of negatives to positives, per class."""
        positive = known.sum(dim=0).clamp(min=1)
        return (len(known) - positive).clamp(min=1) / positive

    def _probability(self, logits: Floats) -> Floats:
        return _sigmoid(logits)

    def label(self, probability: ArrayLike) -> str:
        said = zip(self.classes, np.asarray(probability, np.float64), strict=True)
        return SEPARATOR.join(name for name, p in said if p > THRESHOLD)

    def measure(self, targets: Floats, probabilities: Floats) -> ClassMeasures:
        return ClassMeasures(self.classes, targets > 0.5, probabilities > THRESHOLD, probabilities, exclusive=False)

    def ideal(self, targets: Floats) -> Floats:
        return targets


class Regression(Task, kind="regression"):
    """A number; squared error of the standardised value."""

    default_metric = "mae"
    fewest_classes = 0
    most_classes = 0

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

    def classes_of(self, text: str) -> tuple[str, ...]:
        return ()

    @property
    def outputs(self) -> int:
        return 1

    def loss_target(self, target: Tensor) -> Tensor:
        # In float32 the mean would cancel the differences.
        return ((target[:, 0].double() - self.mean) / self.std).float()

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        from torch.nn import functional as F

        return F.mse_loss(logits[:, 0], target)

    def _class_weights(self, known: Tensor) -> None:
        return None

    def _probability(self, logits: Floats) -> Floats:
        return logits * self.std + self.mean

    @property
    def columns(self) -> tuple[str, ...]:
        return ("value",)

    def label(self, probability: ArrayLike) -> str:
        value = float(np.asarray(probability, np.float64)[0])
        shared_digits = np.log10(max(abs(value), self.std) / self.std)
        return f"{value:.{int(np.clip(5 + np.ceil(shared_digits), 6, 17))}g}"

    def table_cell(self, label: str, probability: Mapping[str, float]) -> str:
        return repr(probability["value"])

    def group_name(self, label: str) -> str:
        return self.name

    def is_right(self, truth: str | None, label: str) -> bool | None:
        return None

    def measure(self, targets: Floats, probabilities: Floats) -> RegressionMeasures:
        return RegressionMeasures(targets, probabilities)

    def ideal(self, targets: Floats) -> Floats:
        return targets


def _check_several(name: str, labels: Sequence[str]) -> None:
    if len(labels) == 1:
        raise DataError(f"{name}: all labels are {labels[0]!r}; at least two classes are needed to learn.")


def _sigmoid(x: Floats) -> Floats:
    # From the side on which the power cannot overflow.
    power = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, power) / (1.0 + power))
