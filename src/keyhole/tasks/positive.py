"""Which of two classes is the positive one: the one that precision, recall, F1 and average precision are of."""

from __future__ import annotations

import re
from collections.abc import Sequence

NEGATIVE = """
0, no, n, false, negative, neg, normal, ok, good, healthy, benign, control, absent, absence, none, nothing, clean,
intact, undamaged, background, pass, passed, wild type, wildtype, wt, mss
"""
"""Words for what is not looked for."""
POSITIVE = """
1, yes, y, true, positive, pos, abnormal, defect, defects, defective, bad, not ok, nok, ng, damaged, damage, anomaly,
anomalous, faulty, fault, fail, failed, tumor, tumour, cancer, carcinoma, malignant, metastasis, metastases, metastatic,
disease, diseased, case, present, presence, lesion, lesions, infected, mutated, mutant, mut, msi, msi h, msih
"""
"""Words for what is looked for."""
_DENIALS = ("no ", "non ", "not ", "without ")


def positive_first_guess(classes: Sequence[str]) -> int | None:
    """The place, 0 or 1, of the class that is positive by its name; None where the names do not say.

    A class is negative if it is called so (`NEGATIVE`), or denies something (`no tumor`, `non-tumor`, where the other
    is `tumor`); it is positive if it is called so (`POSITIVE`). One of them is enough: of `normal` and `zebra`, `zebra`
    is positive. Upper case and `-` or `_` for a blank do not matter.

    >>> positive_first_guess(["metastasis", "normal"])
    0
    >>> positive_first_guess(["cat", "dog"]) is None
    True
    """
    plain = [re.sub(r"[\W_]+", " ", name.lower()).strip() for name in classes]
    first, second = (_sign(name, other) for name, other in zip(plain, reversed(plain), strict=True))
    return None if first == second else int(second > first)


def _sign(name: str, other: str) -> int:
    """1 for positive, -1 for negative, 0 where the name does not say."""
    if name in _words(POSITIVE):
        return 1
    joined, of_other = name.replace(" ", ""), other.replace(" ", "")
    if name in _words(NEGATIVE) or name.startswith(_DENIALS) or joined in (f"no{of_other}", f"non{of_other}"):
        return -1
    return 0


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]
