"""Reads the text of a label: a number, several labels, or a class that is positive by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from keyhole.errors import DataError

SEPARATOR = "|"
"""Between the labels of one image in a multilabel column. Alone it means "none of them"; empty means unknown."""

NEGATIVE_WORDS = """
0, no, n, false, negative, neg, normal, ok, good, healthy, benign, control, absent, absence, none, nothing, clean,
intact, undamaged, background, pass, passed, wild type, wildtype, wt, mss
"""
POSITIVE_WORDS = """
1, yes, y, true, positive, pos, abnormal, defect, defects, defective, bad, not ok, nok, ng, damaged, damage, anomaly,
anomalous, faulty, fault, fail, failed, tumor, tumour, cancer, carcinoma, malignant, metastasis, metastases, metastatic,
disease, diseased, case, present, presence, lesion, lesions, infected, mutated, mutant, mut, msi, msi h, msih
"""
_DENIALS = ("no ", "non ", "not ", "without ")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LARGEST_NUMBER = float(np.finfo(np.float32).max)


def is_number(text: str) -> bool:
    """Return whether a text is a finite number."""
    # `float` alone also accepts `nan`, `infinity` and class names such as `10_2`
    return _NUMBER.fullmatch(text) is not None and abs(float(text)) < _LARGEST_NUMBER


def looks_like_number(text: str) -> bool:
    """Return whether a text is meant as a number: `3`, `0.5`, `1e-3`, also with a decimal comma, as in `30,5`."""
    return is_number(text.replace(",", ".", 1))


def parse_number(name: str, text: str) -> float:
    """Return the number that a cell of the column `name` holds, or raise DataError."""
    if comma := decimal_comma(name, [text]):
        raise DataError(f"{comma} with a point.")
    if not is_number(text):
        raise DataError(f"{name}: {text!r} is not a finite number. Leave the cell empty where the value is unknown.")
    return float(text)


def decimal_comma(name: str, distinct: Sequence[str]) -> str:
    """Return the beginning of an error about numbers with a decimal comma; empty where words are among the texts."""
    commas = [text for text in distinct if "," in text and looks_like_number(text)]
    if not commas or not all(map(looks_like_number, distinct)):
        return ""
    return f"{name}: {commas[0]!r} has a decimal comma. Write {commas[0].replace(',', '.')}"


def split_labels(text: str) -> list[str]:
    """Return the labels of a multilabel text without empty ones."""
    return [label.strip() for label in text.split(SEPARATOR) if label.strip()]


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return sorted labels in the order of their numbers where all are numbers."""
    labels = tuple(labels)
    return tuple(sorted(labels, key=float)) if all(map(is_number, labels)) else labels


def positive_by_name(classes: Sequence[str]) -> int | None:
    """Return which of two classes is positive by its name, 0 or 1; None where the names do not say.

    A class is negative if it is in `NEGATIVE_WORDS` or denies something (`no tumor`, or `non-tumor` where the other is
    `tumor`); it is positive if it is in `POSITIVE_WORDS`. One of them is enough. Numbers are not names.

    >>> positive_by_name(["metastasis", "normal"]), positive_by_name(["cat", "dog"])
    (0, None)
    """
    if all(map(is_number, classes)):
        return None
    plain = [re.sub(r"[\W_]+", " ", name.lower()).strip() for name in classes]
    first, second = (_sign(name, other) for name, other in zip(plain, reversed(plain), strict=True))
    return None if first == second else int(second > first)


def _sign(name: str, other: str) -> int:
    """Return 1 for positive, -1 for negative, 0 where the name does not say."""
    if name in POSITIVE_WORDS.replace("\n", " ").strip().split(", "):
        return 1
    joined, of_other = name.replace(" ", ""), other.replace(" ", "")
    if (
        name in NEGATIVE_WORDS.replace("\n", " ").strip().split(", ")
        or name.startswith(_DENIALS)
        or joined in (f"no{of_other}", f"non{of_other}")
    ):
        return -1
    return 0
