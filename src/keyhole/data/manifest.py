"""The images of a run with their labels and splits, read from a CSV or a folder of classes.

`rows` reads a CSV (`read_csv`, `columns`) or a folder (`read_folder`, `listing`), adds features and masks found by name
(`companions`) and drops rows without a label or file; the labels give the tasks, and `splits` the splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.config.settings import DataConfig
from keyhole.data.columns import alike_classes, column_notes, mistyped_classes, tasks_among
from keyhole.data.hashes import FileHash
from keyhole.data.item import Finding, Item, LeftOut, Row
from keyhole.data.read_csv import FILES
from keyhole.data.read_folder import check_classes
from keyhole.data.rows import in_splits, moved_to, name_and_kind, read_rows, usable_rows
from keyhole.data.splits import check_training, settle_splits
from keyhole.errors import ConfigError, DataError
from keyhole.tasks.kinds import Task, check_label, infer_task, positive_note
from keyhole.util.files import csv_text, encoded, write_atomic
from keyhole.util.wording import counted, listed, nearest

RELATIVE_PATHS = "Relative paths start from the CSV's folder or --data.root."
SOME_LACK = "`keyhole check` lists all, --data.on-bad-image skip leaves them out."
MOVED_FILES = "If they were moved, name the folder that holds them now: --root DIR"
Targets = NDArray[Any]  # encoded labels (n, w): float64 for regression, else float32


@dataclass(frozen=True)
class Manifest:
    """The images of a run and their tasks; a regression has the mean and deviation of its training labels."""

    items: tuple[Item, ...]
    tasks: tuple[Task, ...]
    left_out: tuple[LeftOut, ...] = ()  # every file and row that is not used
    notes: tuple[str, ...] = ()  # decisions that a user should know, and the doubts; one sentence each
    doubts: tuple[Finding, ...] = ()  # frequent mistakes

    def split(self, name: str) -> tuple[Item, ...]:
        """Return the items of `train`, `val` or `test`."""
        return tuple(item for item in self.items if item.split == name)

    def targets(self, items: Sequence[Item]) -> dict[str, Targets]:
        """Return the encoded labels of some items.

        Args:
            items: b items of this manifest.

        Returns:
            The targets (b, w) by the name of the task; NaN where a label is unknown. w is `Task.target_width`.
        """
        rows = [self._index[item.name] for item in items]
        return {name: encoded[rows] for name, encoded in self._encoded.items()}

    @cached_property
    def _index(self) -> dict[str, int]:
        return {item.name: index for index, item in enumerate(self.items)}

    @cached_property
    def _encoded(self) -> dict[str, Targets]:
        return {task.name: _encode(task, self.items) for task in self.tasks}

    def without(self, reasons: Mapping[str, str]) -> Manifest:
        """Return the manifest without the items named in `reasons`, which move to `left_out` with the reason."""
        left_out = tuple(LeftOut(item.name, reasons[item.name]) for item in self.items if item.name in reasons)
        items = tuple(item for item in self.items if item.name not in reasons)
        train = self.split("train")
        if train and all(item.name in reasons for item in train):
            first = reasons[train[0].name]
            raise DataError(f"none of the {len(train)} training images can be used; the first: {first}")
        if train:
            check_training(f"without the {len(left_out)} images left out", items, self.tasks)
        return replace(self, items=items, left_out=self.left_out + left_out)

    def write(self, path: str | Path, hashes: Mapping[str, FileHash] | None = None) -> Path:
        """Write a CSV that `read_manifest` reads as the same items."""
        files = [name for name in FILES if any(getattr(item, name) is not None for item in self.items)]
        facts = ["image", "name", "sha256", "bytes", "split", "group", "mpp", *files]
        rows: list[list[object]] = [[*facts, *(task.name for task in self.tasks)]]
        for item in self.items:
            known = (hashes or {}).get(item.name)
            rows.append(
                [
                    *(item.image, item.name, *(("", "") if known is None else (known.sha256, known.bytes))),
                    *(item.split, item.group, item.mpp),
                    *(getattr(item, name) for name in files),
                    *(item.labels.get(task.name) for task in self.tasks),
                ]
            )
        return write_atomic(path, csv_text(rows))

    def write_left_out(self, path: str | Path) -> Path:
        """Write a CSV of what is not used: name, reason."""
        return write_left_out(path, ((left.name, left.reason) for left in self.left_out))


def write_left_out(path: str | Path, left_out: Iterable[tuple[str, str]]) -> Path:
    """Write a CSV of what is not used, from (name, reason)."""
    return write_atomic(path, encoded(csv_text([["name", "reason"], *left_out])))


def read_manifest(data: DataConfig, seed: int = 0) -> Manifest:
    """Read a CSV or a folder of classes for training.

    Tasks are inferred from the labels of all splits; mean and standard deviation of a regression come from training
    alone. Splits are taken from the data or drawn.

    Args:
        data: settings; `data.path` is the CSV or folder.
        seed: seed of the splits, where they are drawn.

    Returns:
        The items with splits, and their tasks.

    Raises:
        DataError: the data cannot be learned from; the message names the file and, in a CSV, the line.
        ConfigError: a kind of task is unknown.

    Example:
        >>> from pathlib import Path
        >>> from keyhole.config.settings import DataConfig
        >>> rows = [f"{number}.png,{'cat' if number % 2 else 'dog'}" for number in range(20)]
        >>> for number in range(20):
        ...     Path(f"{number}.png").touch()
        >>> _ = Path("pets.csv").write_text("\\n".join(["image,animal", *rows]))
        >>> manifest = read_manifest(DataConfig(path=Path("pets.csv")))
        >>> manifest.tasks[0].name, manifest.tasks[0].classes
        ('animal', ('cat', 'dog'))
        >>> [len(manifest.split(name)) for name in ("train", "val", "test")]
        [14, 3, 3]
        >>> manifest.targets(manifest.items[:2])["animal"].tolist()
        [[1.0], [0.0]]
    """
    table, path = read_rows(data, data.tasks)
    if path.is_dir():
        check_classes(path, table)
    wanted = _wanted_tasks(path, table.columns, data.tasks or tasks_among(path, table))
    rows, left_out = usable_rows(path, table, list(wanted), data, (RELATIVE_PATHS, SOME_LACK))
    try:
        tasks = [_task(path, rows, name, kind) for name, kind in wanted.items()]
        items, notes = settle_splits(path, rows, tasks, data, seed, table.grouped_by)
    except DataError as error:
        if not left_out:
            raise
        first = f"{left_out[0].name}: {left_out[0].reason.rstrip('.')}"
        raise DataError(f"{error} {counted(len(left_out))} could not be used, the first is {first}.") from error
    check_training(str(path), items, tasks)
    train = [item for item in items if item.split == "train"]
    try:
        tasks = [task.fit(_encode(task, train)) for task in tasks]
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    doubts = [*table.doubts, *alike_classes(tasks), *mistyped_classes(tasks, items)]
    about = [f"{path}: {note}" for note in column_notes(table, wanted, table.columns if data.tasks else ())]
    positive = [note for task in tasks if (note := positive_note(task, wanted[task.name])) is not None]
    notes = [*table.notes, *about, *notes, *(doubt.line() for doubt in doubts), *positive]
    return Manifest(tuple(items), tuple(tasks), tuple(left_out), tuple(notes), tuple(doubts))


def read_for_tasks(
    data: DataConfig, tasks: Sequence[Task], splits: Sequence[str] | None = None, run: bool = False
) -> Manifest:
    """Read labelled images of some `splits` to evaluate a trained model on its tasks.

    An image without a split is in `test`; a task without a column has no labels. For the manifest of a `run`,
    `data.root` is the folder to which its files were moved.
    """
    names = [task.name for task in tasks]
    table, path = read_rows(data, names, [label for task in tasks for label in task.classes])
    labelled = [name for name in names if name in table.columns]
    if not labelled:
        raise DataError(
            f"{path}: the model predicts {listed(names)}, but the columns with labels are "
            f"{listed(table.columns, 8) or 'none'}. Use data of the same tasks, or rename the column."
        )
    if splits is not None:
        table = in_splits(path, table, splits)
    if run and data.root is not None:
        table = moved_to(path, table, data.root)
    rows, left_out = usable_rows(path, table, labelled, data, (MOVED_FILES,) if run else (RELATIVE_PATHS, SOME_LACK))
    for row in rows:
        for task in tasks:
            try:
                task.encode(row.item.labels.get(task.name, ""))
            except DataError as error:
                raise DataError(f"{path}, {row.where}: {error}") from error
    items = [replace(row.item, split=row.item.split or "test") for row in rows]
    notes = [f"{path}: no column {name}, which the model predicts too" for name in names if name not in labelled]
    notes += [f"{path}: {note}" for note in column_notes(table, labelled, table.columns, learns=False)]
    return Manifest(tuple(items), tuple(tasks), tuple(left_out), (*table.notes, *notes))


def _wanted_tasks(path: Path, columns: Sequence[str], asked: Sequence[str]) -> dict[str, str | None]:
    if not columns:
        raise DataError(f"{path}: no task column, only `image` and what describes it. Add a column with labels.")
    wanted: dict[str, str | None] = {}
    for entry in asked or columns:
        name, kind = name_and_kind(entry, columns)
        if name not in columns:
            raise DataError(f"{path}: no column {name!r}{nearest(name, columns)}; the tasks are {listed(columns, 8)}.")
        if name in wanted:
            raise ConfigError(f"data.tasks names {name!r} twice. Name each column once.")
        wanted[name] = kind or None
    return wanted


def _task(path: Path, rows: Sequence[Row], name: str, kind: str | None) -> Task:
    texts = [row.item.labels[name] for row in rows]
    where = str(path)
    try:
        for row, text in zip(rows, texts, strict=True):
            where = f"{path}, {row.where}"
            check_label(name, text, kind)
        where = str(path)
        task = infer_task(name, texts, kind)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    known = sum(1 for text in texts if text)
    if kind is None and task.exclusive and len(task.classes) == known > 2:
        raise DataError(
            f"{path}: {name} differs in every row, so it is not a class to learn. "
            f"Name other columns with --data.tasks, or say {name}=multiclass if every image is a class of its own."
        )
    return task


def _encode(task: Task, items: Sequence[Item]) -> Targets:
    return np.stack([task.encode(item.labels.get(task.name, "")) for item in items])
