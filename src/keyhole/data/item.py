"""Value objects of a data set: images, rows of a CSV or folder, what is left out, and findings."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from keyhole.patches.features.source import FEATURE_SUFFIXES as FEATURE_SUFFIXES
from keyhole.util.wording import listed

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One image and what is known about it; paths are absolute."""

    name: str  # in all results: the path as written, or the CSV's `name` column
    image: Path
    labels: dict[str, str]  # text per task as written; empty where unknown
    split: str = ""  # empty until the splits are made
    group: str | None = None  # such as a patient: its images stay in one split; None if the image is its own group
    mpp: float | None = None  # microns per level-0 pixel that the user gives, which override those of the file
    mask: Path | None = None  # PNG or GeoJSON of the foreground
    annotation: Path | None = None  # outlines or a mask of what is looked for; never read in training
    features: Path | None = None  # stored features to read instead of `image`, which then need not exist
    mpp_from: str = "the CSV"  # where `mpp` was given, for messages

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
    """An item and where it was read, for messages: `line 7`, or a path."""

    item: Item
    where: str

    def but(self, **facts: Any) -> Row:
        """Return the row with some fields of its item replaced."""
        return Row(replace(self.item, **facts), self.where)


@dataclass(frozen=True)
class Finding:
    """A fault that would stop a run (error) or a frequent mistake (warning), and what to do about it."""

    name: str  # of the image, task or setting
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
    """The rows of a CSV or a folder, before tasks and splits are known."""

    columns: tuple[str, ...]  # that may be learned; those with a reserved meaning are not in it
    rows: list[Row]
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # decisions that a user should know
    doubts: list[Finding] = field(default_factory=list)  # frequent mistakes
    written: bool = False  # by keyhole: no cell needs interpretation
    has_group: bool = False  # there is a column `group`
    grouped_by: str = ""  # the column of the groups, if it is not `group`
    identifying: dict[str, str] = field(default_factory=dict)  # columns that are not learned, each with the reason
    missing: dict[str, Counter[str]] = field(default_factory=dict)  # per column, the words read as an unknown label


def absolute(path: str | Path) -> Path:
    """Return the absolute path without `..`; links are not resolved, since users know the names of links."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow links


def exists(path: Path) -> bool:
    """Return whether a file or folder exists, or may: a fault of a share, or a lack of permission, shows in reading."""
    try:
        path.stat()
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
    except ValueError:  # a zero byte in the name
        return False
    return True
