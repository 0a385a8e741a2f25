"""What a label column means: the base class of the kinds in `kinds.py`.

Torch is imported where it is needed, so that reading a manifest does not load it.

Letters: b image, n images, k classes, w width of an encoded label, o outputs of the head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import DataError, RunError
from keyhole.tasks.measures import ClassMeasures, RegressionMeasures
from keyhole.util.wording import listed, must_be_one_of, nearest

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

    exclusive: ClassVar[bool] = False  # an image has exactly one of the classes
    threshold: ClassVar[float | None] = None  # probability above which a class is predicted; None: the largest decides
    default_metric: ClassVar[str] = "auroc"  # chooses the best model where the user names no metric
    takes_positive: ClassVar[bool] = False  # the user can name a positive class
    class_counts: ClassVar[tuple[float, float]] = (2, np.inf)  # the fewest and the most classes

    def __init_subclass__(cls, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        KINDS[kind] = cls

    def __new__(cls, name: str = "", kind: str = "", *_args: Any, **_options: Any) -> Task:
        if cls is not Task:
            return super().__new__(cls)
        if kind not in KINDS:
            raise ValueError(must_be_one_of("kind", kind, KINDS))
        return super().__new__(KINDS[kind])

    def __post_init__(self) -> None:
        k = len(self.classes)
        if not self.class_counts[0] <= k <= self.class_counts[1]:
            raise ValueError(f"classes (={self.classes}) are not as many as a {self.kind} task has")
        if len(set(self.classes)) != k:
            raise ValueError(f"classes (={self.classes}) must differ from each other")
        if not (np.isfinite(self.mean) and np.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean (={self.mean}) and std (={self.std}) must be finite, and std above 0")

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "classes": list(self.classes), "mean": self.mean, "std": self.std}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Task:
        """Return the task that `to_json` wrote, or raise RunError."""
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
        """Return the task of a column from its distinct labels, sorted, or raise DataError where they do not fit."""
        raise NotImplementedError

    @classmethod
    def check_label(cls, name: str, text: str) -> None:
        """Raise DataError where a label cannot be of this kind, whatever the classes are."""

    def encode(self, text: str) -> NDArray[np.float32] | Floats:
        """Return the target (w,) of a label as written in the CSV; all NaN where it is empty, which means unknown.

        The class index, a vector of 0 and 1 for multilabel, or the number in float64 for regression.

        >>> Task("tags", "multilabel", ("bird", "fish", "horse")).encode("horse|bird")
        array([1., 0., 1.], dtype=float32)
        """
        text = text.strip()
        return np.asarray(self._encode(text) if text else np.full(self.target_width, np.nan), np.float32)

    def _encode(self, text: str) -> ArrayLike:
        return [self._class_index(text)]

    def fit(self, targets: ArrayLike) -> Task:
        """Return the task scaled to its training targets (n, w); only regression has a scale."""
        return self

    def classes_of(self, text: str) -> tuple[str, ...]:
        """Return the classes that a label names; empty where it is unknown or a number."""
        text = text.strip()
        index = {self._class_index(part) for part in self.split(text)} if text and self.classes else ()
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
        return 1

    def loss_target(self, target: Tensor) -> Tensor:
        """Prepare encoded labels (b, w) for `loss`, on the host."""
        return target

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean loss of logits (b, o) float32 and prepared labels (b, w) without NaN, on one device."""
        raise NotImplementedError

    def class_weights(self, targets: Tensor) -> Tensor | None:
        """Return the weights that balance the classes in training labels (n, w); None for regression."""
        known = targets[~targets.isnan().any(dim=1)]
        return self._class_weights(known) if self.classes and len(known) else None

    def _class_weights(self, known: Tensor) -> Tensor:
        """Inverse class frequencies, mean 1 over the images."""
        counts = known[:, 0].long().bincount(minlength=len(self.classes)).clamp(min=1)
        return len(known) / (len(self.classes) * counts.float())

    def probability(self, logits: ArrayLike) -> Floats:
        """Turn logits (o,) or (b, o) into probabilities, or into the value in the unit of the target.

        Multiclass: softmax (k). Binary: 1 - p and p (2). Multilabel: sigmoids (k). Regression: the value (1).

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
        """Class of a binary task for which precision, recall, F1 and average precision are computed, else None."""
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers that `probability` returns."""
        return self.classes

    @property
    def thresholded(self) -> tuple[str, ...]:
        """Classes that are predicted where their probability is above a threshold; none where the largest decides."""
        return ()

    def describe(self) -> str:
        return f"{self.name} ({self.kind}{'' if self.positive is None else f', positive: {self.positive}'})"

    def label(self, probability: ArrayLike, above: Mapping[str, float] | None = None) -> str:
        """Return the label of one image from its probabilities (k,).

        The class of the largest; for multilabel all above one half joined by `|`, perhaps none; for regression
        the value to six digits, or more where the targets differ only in later ones. `above` has other thresholds
        than one half, by class.

        >>> task = Task("tumor", "binary", ("no", "yes"))
        >>> task.label([0.8, 0.2]), task.label([0.8, 0.2], {"yes": 0.1})
        ('no', 'yes')
        """
        return self.classes[int(np.argmax(np.asarray(probability, np.float64)))]

    def by_column(self, probability: ArrayLike) -> dict[str, float]:
        return {name: float(p) for name, p in zip(self.columns, np.asarray(probability), strict=True)}

    def table_cell(self, label: str, _probability: Mapping[str, float]) -> str:
        """Return the cell TASK.predicted of predictions.csv."""
        return label

    def is_right(self, truth: str | None, label: str) -> bool | None:
        """Return whether a predicted label is the true one; None where the truth is unknown or a number."""
        if not truth or not self.classes:
            return None
        return set(self.split(truth.strip())) - {""} == set(self.split(label)) - {""}

    def credit(self, target: ArrayLike, probability: Floats) -> float | None:
        """Return how well a prediction (k,) fits a label (w,), to rank images; None where the label is unknown.

        The probability of the true class; for multilabel the mean over the labels of the probability of what is true;
        for regression the absolute error, negative.

        >>> Task("tumor", "binary", ("no", "yes")).credit(np.array([1.0]), np.array([0.25, 0.75]))
        0.75
        """
        known = np.asarray(target, np.float64)
        return None if np.isnan(known).any() else self._credit(known, probability)

    def _credit(self, target: Floats, probability: Floats) -> float:
        return float(probability[int(target[0])])

    def certainty(self, probability: Floats) -> float | None:
        """Return how far a prediction (k,) is from another decision, to rank images; None for a number.

        The largest probability minus the second; for multilabel the smallest distance from the threshold.
        """
        second, first = np.sort(probability)[-2:]
        return float(first - second)

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
        """Return what the metrics are computed from: targets (n, w) without NaN, and probabilities (n, k)."""
        names = np.arange(len(self.classes))
        truth = np.asarray(targets.astype(np.int64) == names)
        decided = np.asarray(probabilities.argmax(axis=1)[:, None] == names)
        return ClassMeasures(self.classes, truth, decided, probabilities, exclusive=True)

    def ideal(self, targets: Floats) -> Floats:
        """Return the probabilities of a model that is always right, from targets (n, w)."""
        return np.eye(len(self.classes))[np.nan_to_num(targets[:, 0]).astype(np.int64)] if self.exclusive else targets
