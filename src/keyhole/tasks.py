"""What a label column means: its kind, its classes, and how logits become probabilities and labels.

Torch-free, so that reading a manifest needs no torch; the losses are in `nn/loss.py`, the metrics in `metrics.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["multiclass", "binary", "multilabel", "regression"]
KINDS: tuple[Kind, ...] = ("multiclass", "binary", "multilabel", "regression")
SEPARATOR = "|"
"""Between the labels of one image in a multilabel column."""


@dataclass(frozen=True)
class Task:
    """One thing to predict about an image.

    Attributes:
        name: the CSV column.
        kind: multiclass (one of k), binary (second class against first), multilabel (any of k), regression.
        classes: class names in index order; empty for regression. For binary exactly (negative, positive).
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Width of the task's head: k logits, or 1 for binary and regression."""
        return 1 if self.kind in ("binary", "regression") else len(self.classes)

    @property
    def target_width(self) -> int:
        """Width of an encoded label: k for multilabel, else 1."""
        return len(self.classes) if self.kind == "multilabel" else 1
