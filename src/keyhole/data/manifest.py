"""The images of a run with their labels and splits, read from a CSV or a folder of classes.

`read_manifest` reads them for training: rows (`read_csv`, `read_folder`), columns and unknown labels (`columns`),
features and masks found by name (`companions`), usable rows, tasks, splits (`splits`). Nothing is skipped silently:
`Manifest.left_out` holds every file and row that is not used, with the reason.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.config.settings import DataConfig
from keyhole.data.columns import alike_classes, column_notes, tasks_among, with_columns_read, without_missing_words
from keyhole.data.companions import with_companions
from keyhole.data.hashes import FileHash
from keyhole.data.item import SPLITS, DataTable, Finding, Item, LeftOut, Row, absolute
from keyhole.data.moved import moved_to
from keyhole.data.read_csv import FILES, read_csv
from keyhole.data.read_folder import check_classes, read_folder
from keyhole.data.splits import check_training, settle_splits
from keyhole.errors import ConfigError, DataError
from keyhole.images.image import folder_suffixes
from keyhole.tasks.infer import check_label, infer_task, positive_note
from keyhole.tasks.kinds import Task
from keyhole.util.files import csv_text, write_atomic
from keyhole.util.wording import listed, nearest

MISSING_FILE = "no such file"
RELATIVE_PATHS = (
    "Relative paths start from the CSV's folder or --data.root; `keyhole check` lists all, "
    "--data.on-bad-image skip leaves them out."
)
MOVED_FILES = "If they were moved, name the folder that holds them now: --root DIR"
"""What to do about missing files of a user's CSV, and of a run's manifest."""

Targets = NDArray[Any]
"""Encoded labels (n, w): float64 for regression, else float32."""


@dataclass(frozen=True)
class Manifest:
    """The images of a run and the tasks that they pose.

    Attributes:
        items: in the order of the CSV, or of the paths in a folder.
        tasks: in the order of the columns; regression with mean and standard deviation of the training split.
        left_out: files and rows that are not used.
        notes: decisions that a user should know, one sentence each; they include the doubts.
        doubts: what is often a mistake in the data.
    """

    items: tuple[Item, ...]
    tasks: tuple[Task, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    doubts: tuple[Finding, ...] = ()

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
        """The targets (n, w) of all items: each label is encoded once."""
        return {task.name: _encode(task, self.items) for task in self.tasks}

    def without(self, reasons: Mapping[str, str]) -> Manifest:
        """Return the manifest without the items named in `reasons`, which move to `left_out` with the reason.

        Raises:
            DataError: the training split would lose all its images, or a class.
        """
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
        """Write a CSV that `read_manifest` reads as the same items.

        Args:
            path: the file.
            hashes: size and hash by item name; without one the cells are empty.

        Raises:
            OutputError: the file cannot be written.
        """
        files = [name for name in FILES if any(getattr(item, name) is not None for item in self.items)]
        facts = ["image", "name", "sha256", "bytes", "split", "group", "mpp", *files]
        rows = [[*facts, *(task.name for task in self.tasks)]]
        unknown = FileHash("", 0)
        for item in self.items:
            known = (hashes or {}).get(item.name, unknown)
            rows.append(
                [
                    *(str(item.image), item.name, known.sha256, "" if known is unknown else str(known.bytes)),
                    *(item.split, item.group or "", "" if item.mpp is None else repr(item.mpp)),
                    *(str(getattr(item, name) or "") for name in files),
                    *(item.labels.get(task.name, "") for task in self.tasks),
                ]
            )
        return write_atomic(path, csv_text(rows))

    def write_left_out(self, path: str | Path) -> Path:
        """Write a CSV of what is not used: name, reason."""
        return write_left_out(path, ((left.name, left.reason) for left in self.left_out))


def write_left_out(path: str | Path, left_out: Iterable[tuple[str, str]]) -> Path:
    """Write a CSV of what is not used, from (name, reason).

    Raises:
        OutputError: the file cannot be written.
    """
    return write_csv(path, [["name", "reason"], *left_out])


def write_csv(path: str | Path, rows: Iterable[Sequence[str]]) -> Path:
    """Write a CSV of names, which need not be valid text: bytes that are not UTF-8 are written as escapes.

    Raises:
        OutputError: the file cannot be written.
    """
    return write_atomic(path, csv_text(rows).encode("utf-8", "backslashreplace"))


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
        ConfigError: the shares leave nothing to train on, or a kind of task is unknown.

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
    table, path = _read(data, data.tasks)
    if path.is_dir():
        check_classes(path, table)
    wanted = _wanted_tasks(path, table.columns, data.tasks or tasks_among(path, table))
    rows, left_out = _usable(path, table, list(wanted), data)
    tasks = [_task(path, rows, name, kind) for name, kind in wanted.items()]
    items, notes = settle_splits(path, rows, tasks, data, seed, table.grouped_by)
    check_training(str(path), items, tasks)
    tasks = [_fitted(path, items, task) for task in tasks]
    doubts = [*table.doubts, *alike_classes(tasks)]
    about = [f"{path}: {note}" for note in column_notes(table, wanted, table.columns if data.tasks else ())]
    positive = [note for task in tasks if (note := positive_note(task, wanted[task.name])) is not None]
    notes = [*table.notes, *about, *notes, *(doubt.line() for doubt in doubts), *positive]
    return Manifest(tuple(items), tuple(tasks), tuple(left_out), tuple(notes), tuple(doubts))


def read_for_tasks(
    data: DataConfig, tasks: Sequence[Task], splits: Sequence[str] | None = None, run: bool = False
) -> Manifest:
    """Read labelled images for the tasks of a trained model, to evaluate it on them.

    Every image without a split is in `test`; a task without a column has no labels.

    Args:
        data: settings; `data.path` is the CSV or folder.
        tasks: tasks of the model.
        splits: read only these splits, so that the files of the others are not needed.
        run: True if `data.path` is the manifest of a run; `data.root` is then the folder that its files were moved to.

    Returns:
        The items, with the tasks of the model.

    Raises:
        DataError: there is no column for any task, a label that the model does not know, or no image in the splits.
    """
    names = [task.name for task in tasks]
    table, path = _read(data, names, [label for task in tasks for label in task.classes])
    labelled = [name for name in names if name in table.columns]
    if not labelled:
        raise DataError(
            f"{path}: the model predicts {listed(names)}, but the columns with labels are "
            f"{listed(table.columns, 8) or 'none'}. Use data of the same tasks, or rename the column."
        )
    if splits is not None:
        table = _only(path, table, splits)
    if run and data.root is not None:
        table = moved_to(path, table, data.root)
    rows, left_out = _usable(path, table, labelled, data, MOVED_FILES if run else RELATIVE_PATHS)
    for row in rows:
        for task in tasks:
            try:
                task.encode(row.item.labels.get(task.name, ""))
            except DataError as error:
                raise DataError(f"{path}, {row.where}: {error}") from error
    items = [replace(row.item, split=row.item.split or "test") for row in rows]
    notes = [f"{path}: no column {name}, which the model predicts too" for name in names if name not in labelled]
    notes += [f"{path}: {note}" for note in column_notes(table, labelled, table.columns)]
    return Manifest(tuple(items), tuple(tasks), tuple(left_out), (*table.notes, *notes))


# --- rows -------------------------------------------------------------------------------------------------------------


def _read(data: DataConfig, asked: Sequence[str], classes: Sequence[str] = ()) -> tuple[DataTable, Path]:
    """Return the rows of a data set, and its path.

    Args:
        data: settings.
        asked: columns to learn or to compare with, each `name` or `name=kind`.
        classes: classes that a model knows, which are labels even if `data.missing` has them.
    """
    if data.path is None:
        raise DataError("no data given. Name a folder of classes or a CSV: --data.path PATH.")
    if not data.path.exists():
        raise DataError(f"{data.path}: no such file or folder. Name a folder of classes or a CSV: --data.path PATH.")
    if data.path.is_dir():
        if data.group not in ("auto", "none"):
            raise ConfigError(
                f"data.group (={data.group}) names a column, but {data.path} is a folder. Give a CSV with the columns "
                f"image, label and {data.group}."
            )
        beside = {"--data.masks": data.masks, "--data.features": data.features}
        ignore = {absolute(path.expanduser()): f"the folder of {name}" for name, path in beside.items() if path}
        table = read_folder(data.path, ignore)
    elif data.path.is_file():
        table = read_csv(data.path, data.root, slides=data.features is not None)
        table = table if table.written else without_missing_words(table, data.missing, classes)
        names = {_name_and_kind(entry, table.columns)[0] for entry in asked}
        table = with_columns_read(data.path, table, data.group, table.columns if table.written else names)
    else:
        raise DataError(f"{data.path}: not a regular file. Name a folder of classes or a CSV: --data.path PATH.")
    return with_companions(data.path, table, data), data.path


def _only(path: Path, table: DataTable, splits: Sequence[str]) -> DataTable:
    """Return the rows of some splits; those without a split are in `test`."""
    rows = [row for row in table.rows if (row.item.split or "test") in splits]
    if not rows:
        counts = Counter(row.item.split or "test" for row in table.rows)
        others = ", ".join(f"{counts[name]} in {name}" for name in SPLITS if counts[name])
        raise DataError(
            f"{path}: no image in the split {listed(map(repr, splits))}; there are {others}. Choose another --split."
        )
    return replace(table, rows=rows)


def _usable(
    path: Path, table: DataTable, names: Sequence[str], data: DataConfig, remedy: str = RELATIVE_PATHS
) -> tuple[list[Row], list[LeftOut]]:
    """Return the rows that have a label and a file, each image once, with the labels of the columns `names` only."""
    rows: list[Row] = []
    left_out = list(table.left_out)
    first: dict[Path, Row] = {}
    by_name: dict[str, Row] = {}
    missing: list[str] = []
    for row in table.rows:
        item = replace(row.item, labels={name: row.item.labels[name] for name in names})
        row = replace(row, item=item)
        if item.image in first:
            _check_same(path, first[item.image], row)
            left_out.append(LeftOut(item.name, f"{row.where}: same image as {first[item.image].where}"))
            continue
        first[item.image] = row
        if item.name in by_name:
            before = by_name[item.name].where
            raise DataError(f"{path}, {row.where}: name {item.name!r} is taken by {before}. Give each image its own.")
        by_name[item.name] = row
        if not any(item.labels.values()):
            left_out.append(LeftOut(item.name, f"no label for {' or '.join(names)}"))
        elif (lacking := _unusable_file(item)) is not None:
            file, reason = lacking
            missing.append(str(file) if reason == MISSING_FILE else f"{file} ({reason})")
            left_out.append(LeftOut(item.name, reason if file == item.image else f"{reason}: {file}"))
        else:
            rows.append(row)
    if missing and (not rows or data.on_bad_image == "fail"):
        what = "feature" if any(row.item.features is not None for row in table.rows) else "image"
        count = f"{len(missing)} of {len(first)} {what} files" if rows else f"all {len(missing)} {what} files"
        raise DataError(f"{path}: {count} are not there: {listed(missing)}. {remedy}")
    if not rows:
        raise DataError(f"{path}: no row has a label for {' or '.join(names)}. Fill the column or choose other tasks.")
    return rows, left_out


def _unusable_file(item: Item) -> tuple[Path, str] | None:
    """Return the first file of an item that cannot be used, and why. With features, the image need not exist."""
    for file in (item.source, item.mask, item.annotation):
        # Path.is_file raises on a name too long for the system
        if file is None or os.path.isfile(file):  # noqa: PTH113
            continue
        if file.suffix.lower() in folder_suffixes() and os.path.isdir(file):  # noqa: PTH112
            continue
        if not os.path.lexists(file):
            return file, MISSING_FILE
        broken = file.is_symlink() and not file.exists()
        return file, f"{MISSING_FILE}: a link that leads nowhere" if broken else "not a regular file"
    return None


def _check_same(path: Path, first: Row, again: Row) -> None:
    """Refuse two rows of one image that contradict each other."""
    facts = [(name, first.item.labels[name], again.item.labels[name]) for name in first.item.labels]
    others = ("split", "group", "mpp", *FILES)
    facts += [(name, getattr(first.item, name), getattr(again.item, name)) for name in others]

    def shown(value: object) -> str:
        return repr(str(value) if isinstance(value, Path) else value or "")

    for name, before, now in facts:
        if before != now:
            raise DataError(
                f"{path}, {again.where}: {again.item.name} has {name} {shown(now)}, "
                f"but {shown(before)} in {first.where}. Keep one row per image."
            )


# --- tasks ------------------------------------------------------------------------------------------------------------


def _wanted_tasks(path: Path, columns: Sequence[str], asked: Sequence[str]) -> dict[str, str | None]:
    """Return the kind of each column to learn, or None where it is to be inferred."""
    if not columns:
        raise DataError(f"{path}: no task column, only `image` and what describes it. Add a column with labels.")
    wanted: dict[str, str | None] = {}
    for entry in asked or columns:
        name, kind = _name_and_kind(entry, columns)
        if name not in columns:
            raise DataError(f"{path}: no column {name!r}{nearest(name, columns)}; the tasks are {listed(columns, 8)}.")
        if name in wanted:
            raise ConfigError(f"data.tasks names {name!r} twice. Name each column once.")
        wanted[name] = kind or None
    return wanted


def _name_and_kind(entry: str, columns: Sequence[str]) -> tuple[str, str]:
    """Split `name=kind`; `kind` is empty for `name`.

    A name may contain `=`, and so may the class of `name=binary:class`: the longest column that fits is meant.
    """
    fitting = [column for column in columns if entry == column or entry.startswith(f"{column}=")]
    name = max(fitting, key=len, default=entry.partition("=")[0])
    return name, entry[len(name) + 1 :]


def _task(path: Path, rows: Sequence[Row], name: str, kind: str | None) -> Task:
    for row in rows:
        try:
            check_label(name, row.item.labels[name], kind)
        except DataError as error:
            raise DataError(f"{path}, {row.where}: {error}") from error
    texts = [row.item.labels[name] for row in rows]
    try:
        task = infer_task(name, texts, kind)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    known = sum(1 for text in texts if text)
    if kind is None and task.exclusive and len(task.classes) == known > 2:
        raise DataError(
            f"{path}: {name} differs in every row, so it is not a class to learn. "
            f"Name other columns with --data.tasks, or say {name}=multiclass if every image is a class of its own."
        )
    return task


def _fitted(path: Path, items: Sequence[Item], task: Task) -> Task:
    try:
        return task.fit(_encode(task, [item for item in items if item.split == "train"]))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _encode(task: Task, items: Sequence[Item]) -> Targets:
    return np.stack([task.encode(item.labels.get(task.name, "")) for item in items])
