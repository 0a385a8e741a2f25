"""A column of labels -> its `Task`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from keyhole.errors import ConfigError, DataError
from keyhole.tasks.kinds import KINDS, Task
from keyhole.tasks.label_text import SEPARATOR, decimal_comma, is_number, positive_by_name
from keyhole.util.wording import listed, nearest

MAX_NUMBERED_CLASSES = 20
"""A column of whole numbers with more distinct values than this is taken for a quantity."""

_WORDS_FOR_MISSING = {"na", "n/a", "nan", "none", "null", "inf", "-inf", "?", "-"}


def infer_task(name: str, texts: Iterable[str], kind: str | None = None) -> Task:
    """Return the task that a column of labels poses; empty texts are unknown labels.

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
