"""What a label column means: its kind, its classes, and how logits become probabilities and labels.

Torch-free, so that reading a manifest needs no torch; the losses are in `nn/loss.py`, the metrics in `metrics.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import ConfigError, DataError, RunError
from keyhole.tasks.positive import positive_first_guess
from keyhole.util.wording import listed, nearest

Kind = Literal["multiclass", "binary", "multilabel", "regression"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SEPARATOR = "|"
"""Between the labels of one image in a multilabel column; alone it means "none of them", where empty means unknown."""
MOST_NUMBERED_CLASSES = 20
"""A column of whole numbers with more distinct values than this is taken for a quantity."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LARGEST = float(np.finfo(np.float32).max)
_WORDS_FOR_MISSING = {"na", "n/a", "nan", "none", "null", "inf", "-inf", "?", "-"}


@dataclass(frozen=True)
class Task:
    """One thing to predict about an image.

    Attributes:
        name: the CSV column.
        kind: multiclass (one of k), binary (second class against first), multilabel (any of k), regression.
        classes: class names in index order; empty for regression. For binary exactly (negative, positive).
        mean: of a regression target in the training split; its logit is standardised.
        std: likewise, never 0.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        k = len(self.classes)
        fewest = {"multiclass": 2, "binary": 2, "multilabel": 1, "regression": 0}
        if self.kind not in fewest:
            raise ValueError(f"kind (={self.kind!r}) must be one of {', '.join(KINDS)}")
        if k < fewest[self.kind] or (self.kind in ("binary", "regression") and k != fewest[self.kind]):
            raise ValueError(f"classes (={self.classes}) are not as many as a {self.kind} task has")
        if len(set(self.classes)) != k:
            raise ValueError(f"classes (={self.classes}) must differ from each other")
        if not (np.isfinite(self.mean) and np.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean (={self.mean}) and std (={self.std}) must be finite, and std above 0")

    @property
    def positive(self) -> str | None:
        """The class that precision, recall, F1 and average precision of a binary task are of; None for other kinds."""
        return self.classes[1] if self.kind == "binary" else None

    def describe(self) -> str:
        """`grade (multiclass)`, or `tumor (binary, positive: yes)`."""
        return f"{self.name} ({self.kind}{'' if self.positive is None else f', positive: {self.positive}'})"

    @property
    def outputs(self) -> int:
        """Width of the task's head: k logits, or 1 for binary and regression."""
        return 1 if self.kind in ("binary", "regression") else len(self.classes)

    @property
    def target_width(self) -> int:
        """Width of an encoded label: k for multilabel, else 1."""
        return len(self.classes) if self.kind == "multilabel" else 1

    def encode(self, text: str) -> NDArray[np.float32] | NDArray[np.float64]:
        """The target (target_width,) of a label as written in the CSV; all NaN where the text is empty (unknown).

        The class index for multiclass and binary, a vector of 0 and 1 for multilabel, the number itself for regression.
        A number is float64: of 1.7e9, float32 keeps no more than the hundreds.

        Raises:
            DataError: a class that the task does not have, or not a number.
        """
        text = text.strip()
        if not text:
            unknown = np.full(self.target_width, np.nan)
            return unknown if self.kind == "regression" else unknown.astype(np.float32)
        if self.kind == "regression":
            return np.array([_number(self.name, text)], np.float64)
        if self.kind == "multilabel":
            target = np.zeros(self.target_width, np.float32)
            target[[self._class_index(label) for label in _split(text)]] = 1
            return target
        return np.array([self._class_index(text)], np.float32)

    def probability(self, logits: ArrayLike) -> NDArray[np.float64]:
        """What the head's logits say, in the task's own terms.

        Args:
            logits: (outputs,) or (b, outputs).

        Returns:
            multiclass: softmax (k); binary: (2), 1 - p and p; multilabel: sigmoids (k); regression: (1), the value in
            the target's unit. With a leading b where the logits have one.
        """
        logits = np.asarray(logits, np.float64)
        if logits.ndim not in (1, 2) or logits.shape[-1] != self.outputs:
            raise ValueError(f"logits of {logits.shape} must be ({self.outputs},) or (b, {self.outputs})")
        if self.kind == "regression":
            return logits * self.std + self.mean
        if self.kind == "multiclass":
            power = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return np.asarray(power / power.sum(axis=-1, keepdims=True))
        if self.kind == "binary":
            return np.concatenate([_sigmoid(-logits), _sigmoid(logits)], axis=-1)
        return _sigmoid(logits)

    def label(self, probability: ArrayLike) -> str:
        """The label of one image's probabilities as `probability` gives them: the class of the largest, for
        multilabel all above one half joined by `|` (perhaps none), for regression the value to six digits, or more
        where the targets differ in later ones."""
        probability = np.asarray(probability, np.float64)
        if self.kind == "regression":
            beyond = np.log10(max(abs(float(probability[0])), self.std) / self.std)  # digits that all targets share
            return f"{probability[0]:.{int(np.clip(5 + np.ceil(beyond), 6, 17))}g}"
        if self.kind == "multilabel":
            return SEPARATOR.join(name for name, p in zip(self.classes, probability, strict=True) if p > 0.5)
        return self.classes[int(np.argmax(probability))]

    def to_json(self) -> dict[str, Any]:
        """A plain dict that `from_json` reads."""
        return {"name": self.name, "kind": self.kind, "classes": list(self.classes), "mean": self.mean, "std": self.std}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """The task that `to_json` wrote.

        Raises:
            RunError: a key is missing or has a value that no task has.
        """
        try:
            return cls(
                name=str(data["name"]),
                kind=data["kind"],
                classes=tuple(str(name) for name in data["classes"]),
                mean=float(data["mean"]),
                std=float(data["std"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise RunError(f"a task is described wrongly: {what}. The model was not written by keyhole.") from error

    def _class_index(self, label: str) -> int:
        try:
            return self.classes.index(label)
        except ValueError:
            known = f"the classes are {listed(self.classes, 10)}"
            raise DataError(f"{self.name}: unknown class {label!r}{nearest(label, self.classes)}; {known}") from None


def infer_task(name: str, texts: Iterable[str], kind: str | None = None) -> Task:
    """The task that a column of labels poses; empty texts are unknown labels and say nothing.

    Without a `kind`, any `|` makes it multilabel, numbers with a fraction or with more than
    `MOST_NUMBERED_CLASSES` distinct values regression, two distinct values binary, else it is multiclass. Classes
    are sorted, as numbers where all are. The positive class of a binary task is the one that `binary:CLASS` names,
    else the one that is positive by its name (`positive.py`; numbers are not names), else the second. It is the
    second of `Task.classes`.

    Raises:
        ConfigError: no such kind, or a positive class for a kind that has none.
        DataError: no label, only one class, or labels that do not fit the kind.
    """
    kind, positive = _kind_and_positive(name, kind)
    distinct = sorted({text.strip() for text in texts} - {""})
    if not distinct:
        raise DataError(f"{name}: no image has a label. Fill the column or choose other tasks.")
    if kind is None and (comma := _decimal_comma(name, distinct)):
        raise DataError(f"{comma} with a point, or say {name}=multiclass if these are classes.")
    chosen: Kind = _inferred_kind(name, distinct) if kind is None else kind
    if chosen == "regression":
        for text in distinct:
            _number(name, text)
        return Task(name, chosen)
    if chosen == "multilabel":
        distinct = sorted({label for text in distinct for label in _split(text)})
        if not distinct:
            raise DataError(f"{name}: no image has any of the labels, so there is nothing to learn.")
    elif len(distinct) == 1:
        raise DataError(f"{name}: all labels are {distinct[0]!r}; at least two classes are needed to learn.")
    elif chosen == "binary" and len(distinct) > 2:
        raise DataError(
            f"{name}: binary, but there are {len(distinct)} classes ({listed(distinct, 10)}). Use multiclass."
        )
    if all(map(_is_number, distinct)):
        distinct.sort(key=float)
    if chosen == "binary":
        distinct = _negative_first(name, distinct, positive)
    return Task(name, chosen, tuple(distinct))


def positive_note(task: Task, kind: str | None = None) -> str | None:
    """What to say where neither the user (`kind`) nor the names of the classes have said which class is positive."""
    if task.kind != "binary" or ":" in (kind or ""):
        return None
    if not all(map(_is_number, task.classes)) and positive_first_guess(task.classes) is not None:
        return None
    negative, positive = task.classes
    return (
        f"{task.name}: the positive class is {positive!r}, the second in order; "
        f"--data.tasks {task.name}=binary:{negative} takes the other"
    )


def _kind_and_positive(name: str, text: str | None) -> tuple[Kind | None, str | None]:
    """`binary:defect` -> binary and defect; without a colon no class is named."""
    if text is None:
        return None, None
    kind, colon, positive = (part.strip() for part in text.partition(":"))
    known = next((each for each in KINDS if each == kind), None)
    if known is None:
        raise ConfigError(f"{name}={text}: no such kind{nearest(kind, KINDS)}; the kinds are {', '.join(KINDS)}")
    if colon and (known != "binary" or not positive):
        raise ConfigError(f"{name}={text}: expected {name}=binary:CLASS; only a binary task has a positive class")
    return known, positive or None


def _negative_first(name: str, classes: list[str], positive: str | None) -> list[str]:
    """Two sorted classes in the order negative, positive."""
    if positive is not None and positive not in classes:
        raise DataError(f"{name}: no label is {positive!r}{nearest(positive, classes)}; they are {', '.join(classes)}.")
    if positive is not None:
        place: int | None = classes.index(positive)
    else:
        place = None if all(map(_is_number, classes)) else positive_first_guess(classes)
    return classes[::-1] if place == 0 else classes


def fit_regression(task: Task, values: ArrayLike) -> Task:
    """The task with mean and standard deviation of its known training targets, so that its logits are standardised.

    Args:
        task: of kind regression.
        values: raw targets; NaN where unknown.

    Raises:
        DataError: not one known value.
    """
    if task.kind != "regression":
        raise ValueError(f"task {task.name!r} is {task.kind}, not regression")
    known = np.asarray(values, np.float64).ravel()
    known = known[~np.isnan(known)]
    if not len(known):
        raise DataError(f"{task.name}: no training image has a value, so there is nothing to learn.")
    std = float(known.std())
    # A column of one value has no spread to divide by; rounding can leave a spread of the order of its last digit.
    return replace(task, mean=float(known.mean()), std=std if std > 1e-14 * np.abs(known).max() else 1.0)


def _inferred_kind(name: str, distinct: list[str]) -> Kind:
    if any(SEPARATOR in text for text in distinct):
        return "multilabel"
    numbers = [text for text in distinct if _is_number(text)]
    words = [text for text in distinct if not _is_number(text)]
    values = {float(text) for text in numbers}
    quantity = len(values) > MOST_NUMBERED_CLASSES or any(value != int(value) for value in values)
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


def _split(text: str) -> list[str]:
    """The labels of a multilabel text, without empty ones: `a|b`, `a | b |` and `b|a` say the same."""
    return [label.strip() for label in text.split(SEPARATOR) if label.strip()]


def looks_like_number(text: str) -> bool:
    """Whether a cell is meant as a number: `3`, `0.5`, `1e-3`, also with a decimal comma, as in `30,5`."""
    return _is_number(text.replace(",", ".", 1))


def _decimal_comma(name: str, distinct: Sequence[str]) -> str:
    """What to say of numbers with a decimal comma; empty where there are none, or where words are among them."""
    commas = [text for text in distinct if "," in text and looks_like_number(text)]
    if not commas or not all(map(looks_like_number, distinct)):
        return ""
    text = commas[0]
    return f"{name}: {text!r} has a decimal comma. Write {text.replace(',', '.')}"


def _is_number(text: str) -> bool:
    # `float` alone would also take `nan`, `infinity` and class names such as `10_2`.
    return _NUMBER.fullmatch(text) is not None and abs(float(text)) < _LARGEST


def _number(name: str, text: str) -> float:
    if comma := _decimal_comma(name, [text]):
        raise DataError(f"{comma} with a point.")
    if not _is_number(text):
        raise DataError(f"{name}: {text!r} is not a finite number. Leave the cell empty where the value is unknown.")
    return float(text)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    # From the side on which the power cannot overflow.
    power = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, power) / (1.0 + power))
