"""One image of a data set, one that was left out, and the rows of a CSV or folder before tasks and splits are known."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from keyhole.patches.features.source import FEATURE_SUFFIXES as FEATURE_SUFFIXES
from keyhole.util.wording import listed

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One image and what is known about it.

    Attributes:
        name: name in all results: the path as written, or the CSV's `name` column.
        image: absolute path of the file.
        labels: text per task as written; empty where unknown.
        split: `train`, `val` or `test`; empty until the splits are made.
        group: images of one group (a patient, a place) stay in one split; None if the image is its own group.
        mpp: microns per level-0 pixel from the CSV, which overrides the file.
        mask: PNG or GeoJSON of the foreground, absolute.
        annotation: GeoJSON or ASAP XML with outlines of what is looked for, such as lesions; never read in training.
        features: file of stored features, which is read instead of `image`; `image` need not exist then. Where `image`
            has the suffix of features, it is this file.
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

    def __post_init__(self) -> None:
        if self.features is None and str(self.image).lower().endswith(FEATURE_SUFFIXES):
            object.__setattr__(self, "features", self.image)

    @property
    def source(self) -> Path:
        """The file that is opened to read patches."""
        return self.image if self.features is None else self.features


@dataclass(frozen=True)
class LeftOut:
    """A file or row that is not used, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Row:
    """An item and the place where it was read, for messages: `line 7`, or a path."""

    item: Item
    where: str


@dataclass(frozen=True)
class Finding:
    """Something that would stop a run (error) or is often a mistake (warning), and what to do about it.

    Attributes:
        name: the image, task or setting that it is about.
        problem: what is wrong.
        fix: what to do.
        severity: `error` or `warning`.
    """

    name: str
    problem: str
    fix: str
    severity: Literal["error", "warning"] = "error"

    def line(self) -> str:
        """Return the line for the log."""
        return f"{self.severity}: {self.name}: {self.problem}. {self.fix}"


def warning(name: str | Sequence[str], problem: str, fix: str) -> Finding:
    """Return a warning about one image, task or setting, or about several images, which are then listed."""
    names = [name] if isinstance(name, str) else name
    if len(names) == 1:
        return Finding(names[0], problem, fix, "warning")
    return Finding(f"{len(names)} images", f"{problem}: {listed(names)}", fix, "warning")


@dataclass(frozen=True)
class DataTable:
    """The rows of a CSV or a folder, before tasks and splits are known.

    Attributes:
        columns: columns without a reserved meaning, which may be learned.
        rows: one per image, with the labels of every column.
        left_out: files and rows that are not used.
        notes: decisions that a user should know.
        doubts: what is often a mistake.
        written: True for a CSV that keyhole wrote, in which every cell means what it says.
        has_group: True if there is a column `group`.
        grouped_by: the column that the groups were taken from, if it is not `group`.
        identifying: columns that say which image it is and not what it shows, each with the reason.
        missing: per column, the words that were read as an unknown label.
    """

    columns: tuple[str, ...]
    rows: list[Row]
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[Finding] = field(default_factory=list)
    written: bool = False
    has_group: bool = False
    grouped_by: str = ""
    identifying: dict[str, str] = field(default_factory=dict)
    missing: dict[str, Counter[str]] = field(default_factory=dict)


def absolute(path: str | Path) -> Path:
    """Return the absolute path without `..` and without resolving links, whose own names are what a user knows."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow links
