"""One image of a data set, one that was left out, and a table of them as read, before tasks and splits are settled."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")
FEATURE_SUFFIXES = frozenset({".h5", ".hdf5", ".pt"})
"""What counts as a file of stored features in the place of an image."""


@dataclass(frozen=True)
class Item:
    """One image and what is known about it.

    Attributes:
        name: what results call it: the path as written, or the CSV's `name` column.
        image: the file, absolute.
        labels: text per task as written; empty where unknown.
        split: `train`, `val` or `test`; empty only while it is not settled.
        group: images of one group (a patient, a place) stay in one split; None: the image stands for itself.
        mpp: microns per level-0 pixel as the CSV says, over what the file says.
        mask: PNG or GeoJSON of the foreground, absolute.
        annotation: GeoJSON or ASAP XML of what is looked for, such as lesions; never read in training.
        features: file of stored features that is read in the image's place; `image` need not exist then.
    """

    name: str
    image: Path
    labels: dict[str, str]
    split: str = ""
    group: str | None = None
    mpp: float | None = None
    mask: Path | None = None
    annotation: Path | None = None
    features: Path | None = None

    @property
    def source(self) -> Path:
        """What is opened for its patches."""
        return self.image if self.features is None else self.features


@dataclass(frozen=True)
class LeftOut:
    """A file or row that is not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Row:
    """An item as read, and where it was read, for messages: `line 7`, or a path."""

    item: Item
    where: str


@dataclass(frozen=True)
class Doubt:
    """Something in the data that is often a mistake, and what to do if it is one."""

    name: str
    problem: str
    fix: str

    def line(self) -> str:
        """For the log."""
        return f"warning: {self.name}: {self.problem}. {self.fix}"


@dataclass(frozen=True)
class Table:
    """What a CSV or a folder holds, before tasks and splits are settled.

    Attributes:
        columns: that have no meaning of their own, so that they may be learned.
        rows: with the labels of every column.
        left_out: what was left out on the way.
        notes: what was decided on the way.
        doubts: what is often a mistake.
        written: whether keyhole wrote the CSV, so that every cell means what it says.
        has_group: whether there is a column `group`.
        grouped_by: the column that groups were taken from, where it is not `group`.
        identifying: columns that say which image it is, not what it shows, and why.
        missing: per column, the words that were read as an unknown label.
    """

    columns: tuple[str, ...]
    rows: list[Row]
    left_out: list[LeftOut]
    notes: list[str]
    doubts: list[Doubt] = field(default_factory=list)
    written: bool = False
    has_group: bool = False
    grouped_by: str = ""
    identifying: dict[str, str] = field(default_factory=dict)
    missing: dict[str, Counter[str]] = field(default_factory=dict)


def absolute(path: str | Path) -> Path:
    """The path from the root without `..`, links kept: what a link is called may say more than what it leads to."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow links
