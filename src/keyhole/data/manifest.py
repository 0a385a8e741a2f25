"""Which images a run learns from, chooses by and is tested on, with their labels: from a CSV or a folder of classes.

Nothing is skipped silently: what is not used is in `Manifest.left_out` with the reason.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keyhole.config.settings import DataConfig
from keyhole.data.columns import column_notes, refuse_column_for_folder, tasks_among, with_columns_read
from keyhole.data.companions import with_companions
from keyhole.data.hashes import FileHash
from keyhole.data.item import SPLITS, Doubt, Item, LeftOut, Row, Table, absolute
from keyhole.data.labels import alike_classes, missing_notes, without_missing_words
from keyhole.data.layout import one_class, refuse_single_images
from keyhole.data.moved import moved_to
from keyhole.data.read_csv import FILES, read_csv
from keyhole.data.read_folder import FOLDER_TASK, expand_images, read_folder
from keyhole.data.settle import check_training, settle_splits
from keyhole.errors import ConfigError, DataError
from keyhole.images.image import folder_suffixes
from keyhole.tasks.kinds import Task, fit_regression, infer_task, positive_note
from keyhole.util.files import write_atomic
from keyhole.util.wording import listed, nearest

__all__ = ["Item", "LeftOut", "Manifest", "expand_images", "read_for_tasks", "read_manifest", "write_left_out"]

MISSING_FILE = "no such file"
RELATIVE = (
    "Relative paths start from the CSV's folder or --data.root; `keyhole check` lists all, "
    "--data.on-bad-image skip leaves them out."
)
MOVED = "If they were moved, name the folder that holds them now: --root DIR"
"""What to do about files that are missing: of a CSV of the user's, of a run's manifest."""


@dataclass(frozen=True)
class Manifest:
    """The images of a run and the tasks they pose.

    Attributes:
        items: in the order of the CSV, or of the paths in a folder.
        tasks: in the order of the columns; regression with mean and standard deviation of the training split.
        left_out: files and rows that are not used.
        notes: what was decided on the way and a user should know, one sentence each; `doubts` among them.
        doubts: what is often a mistake in the data.
    """

    items: tuple[Item, ...]
    tasks: tuple[Task, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = ()

    def split(self, name: str) -> tuple[Item, ...]:
        """The items of `train`, `val` or `test`."""
        return tuple(item for item in self.items if item.split == name)

    def target(self, item: Item, task: Task) -> NDArray[np.float32] | NDArray[np.float64]:
        """The encoded label (target_width,) of an item; all NaN where it is unknown."""
        return task.encode(item.labels.get(task.name, ""))

    def without(self, reasons: Mapping[str, str]) -> Manifest:
        """Without the items named, which move to `left_out` with the reason given.

        Raises:
            DataError: the training split thereby loses all its images, or a class.
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
        """Writes a CSV that `read_manifest` reads again as the same items, with the columns of files that any has.

        Args:
            path: the file.
            hashes: per item name; empty cells where there is none.

        Raises:
            OutputError: it cannot be written.
        """
        files = [name for name in FILES if any(getattr(item, name) is not None for item in self.items)]
        facts = ["image", "name", "sha256", "bytes", "split", "group", "mpp", *files]
        rows = [[*facts, *(task.name for task in self.tasks)]]
        for item in self.items:
            known = (hashes or {}).get(item.name)
            rows.append(
                [
                    str(item.image),
                    item.name,
                    known.sha256 if known else "",
                    str(known.bytes) if known else "",
                    item.split,
                    item.group or "",
                    "" if item.mpp is None else repr(item.mpp),
                    *("" if getattr(item, name) is None else str(getattr(item, name)) for name in files),
                    *(item.labels.get(task.name, "") for task in self.tasks),
                ]
            )
        return write_atomic(path, _csv(rows))

    def write_left_out(self, path: str | Path) -> Path:
        """Writes a CSV of what is not used: name, reason."""
        return write_left_out(path, ((left.name, left.reason) for left in self.left_out))


def write_left_out(path: str | Path, left_out: Iterable[tuple[str, str]]) -> Path:
    """Writes a CSV of what is not used, from (name, reason).

    Raises:
        OutputError: it cannot be written.
    """
    return write_csv(path, [["name", "reason"], *left_out])


def write_csv(path: str | Path, rows: Iterable[Sequence[str]]) -> Path:
    """Writes a CSV of names, which need not be valid text: what cannot be encoded is written as an escape.

    Raises:
        OutputError: it cannot be written.
    """
    return write_atomic(path, _csv(rows).encode("utf-8", "backslashreplace"))


def read_manifest(data: DataConfig, seed: int = 0) -> Manifest:
    """Reads the images, settles tasks and splits, and checks that they can be learned from.

    Tasks are inferred from the labels of all splits, mean and standard deviation of a regression from training alone.

    Raises:
        DataError: one line with the file and, for a CSV, the line.
        ConfigError: shares that leave nothing to train on, or an unknown kind of task.
    """
    table, path = _read(data, data.tasks)
    if path.is_dir():
        counts = Counter(row.item.labels[FOLDER_TASK] for row in table.rows)
        if len(counts) == 1:
            raise one_class(path, [Path(row.item.name).parts[:-1] for row in table.rows])
        refuse_single_images(path, counts)
    wanted = _wanted_tasks(path, table.columns, data.tasks or tasks_among(path, table))
    rows, left_out = _usable(path, table, list(wanted), data)
    tasks = [_task(path, rows, name, kind) for name, kind in wanted.items()]
    items, notes = settle_splits(path, rows, tasks, data, seed, table.grouped_by)
    check_training(str(path), items, tasks)
    tasks = [_fitted(path, items, task) if task.kind == "regression" else task for task in tasks]
    doubts = [*table.doubts, *alike_classes(tasks)]
    about = [*missing_notes(table, wanted), *column_notes(table, () if not data.tasks else table.columns)]
    about = [f"{path}: {note}" for note in about]
    positive = [note for task in tasks if (note := positive_note(task, wanted[task.name])) is not None]
    notes = [*table.notes, *about, *notes, *(doubt.line() for doubt in doubts), *positive]
    return Manifest(tuple(items), tuple(tasks), tuple(left_out), tuple(notes), tuple(doubts))


def read_for_tasks(
    data: DataConfig, tasks: Sequence[Task], splits: Sequence[str] | None = None, run: bool = False
) -> Manifest:
    """Reads labelled images for the tasks of a model that is already trained, to evaluate it on them.

    Every image without a split is in `test`; a task without a column has no labels.

    Args:
        data: where they are.
        tasks: of the model.
        splits: read only these, so that nothing is asked of the files of the others.
        run: whether `data.path` is the manifest of a run; `data.root` is then the folder that its files were moved to.

    Raises:
        DataError: no column for any of the tasks, a label that the model does not know, or no image in the split.
    """
    names = [task.name for task in tasks]
    table, path = _read(data, names, [label for task in tasks for label in task.classes])
    there = [name for name in names if name in table.columns]
    if not there:
        raise DataError(
            f"{path}: the model predicts {listed(names)}, but the columns with labels are "
            f"{listed(table.columns, 8) or 'none'}. Use data of the same tasks, or rename the column."
        )
    if splits is not None:
        table = _only(path, table, splits)
    if run and data.root is not None:
        table = moved_to(path, table, data.root)
    rows, left_out = _usable(path, table, there, data, MOVED if run else RELATIVE)
    for row in rows:
        for task in tasks:
            try:
                task.encode(row.item.labels.get(task.name, ""))
            except DataError as error:
                raise DataError(f"{path}, {row.where}: {error}") from error
    items = [replace(row.item, split=row.item.split or "test") for row in rows]
    notes = [f"{path}: no column {name}, which the model predicts too" for name in names if name not in there]
    notes += [f"{path}: {note}" for note in [*missing_notes(table, there), *column_notes(table, table.columns)]]
    return Manifest(tuple(items), tuple(tasks), tuple(left_out), (*table.notes, *notes))


def _only(path: Path, table: Table, splits: Sequence[str]) -> Table:
    """The rows of some splits; those without a split are in `test`."""
    rows = [row for row in table.rows if (row.item.split or "test") in splits]
    if not rows:
        counts = Counter(row.item.split or "test" for row in table.rows)
        there = ", ".join(f"{counts[name]} in {name}" for name in SPLITS if counts[name])
        raise DataError(
            f"{path}: no image in the split {listed(map(repr, splits))}; there are {there}. Choose another --split."
        )
    return replace(table, rows=rows)


def _read(data: DataConfig, asked: Sequence[str] = (), classes: Sequence[str] = ()) -> tuple[Table, Path]:
    """The table of a data set, and its path.

    Args:
        data: where it is.
        asked: columns to learn or to compare with, each `name` or `name=kind`.
        classes: that a model knows; they are labels whatever `data.missing` says.
    """
    if data.path is None:
        raise DataError("no data given. Name a folder of classes or a CSV: --data.path PATH.")
    if not data.path.exists():
        raise DataError(f"{data.path}: no such file or folder. Name a folder of classes or a CSV: --data.path PATH.")
    if data.path.is_dir():
        refuse_column_for_folder(data.path, data.group)
        table = read_folder(data.path, _beside(data))
    elif data.path.is_file():
        table = read_csv(data.path, data.root, slides=data.features is not None)
        table = table if table.written else without_missing_words(table, data.missing, classes)
        names = {_named(entry, table.columns)[0] for entry in asked}
        table = with_columns_read(data.path, table, data.group, table.columns if table.written else names)
    else:
        raise DataError(f"{data.path}: not a regular file. Name a folder of classes or a CSV: --data.path PATH.")
    return with_companions(data.path, table, data), data.path


def _beside(data: DataConfig) -> dict[Path, str]:
    """Folders that hold what belongs to the images, which may lie among them."""
    named = {"--data.masks": data.masks, "--data.features": data.features}
    return {absolute(path.expanduser()): f"the folder of {name}" for name, path in named.items() if path is not None}


def _wanted_tasks(path: Path, columns: Sequence[str], asked: Sequence[str]) -> dict[str, str | None]:
    """Column -> kind, or None where it is to be inferred."""
    if not columns:
        raise DataError(f"{path}: no task column, only `image` and what describes it. Add a column with labels.")
    wanted: dict[str, str | None] = {}
    for entry in asked or columns:
        name, kind = _named(entry, columns)
        if name not in columns:
            raise DataError(f"{path}: no column {name!r}{nearest(name, columns)}; the tasks are {listed(columns, 8)}.")
        if name in wanted:
            raise ConfigError(f"data.tasks names {name!r} twice. Name each column once.")
        wanted[name] = kind or None
    return wanted


def _named(entry: str, columns: Sequence[str]) -> tuple[str, str]:
    """Column and kind of `name` or `name=kind`.

    A name may hold a `=`, and so may the class of `name=binary:class`: the longest column that fits is meant.
    """
    fitting = [column for column in columns if entry == column or entry.startswith(f"{column}=")]
    name = max(fitting, key=len, default=entry.partition("=")[0])
    return name, entry[len(name) + 1 :]


def _usable(
    path: Path, table: Table, names: Sequence[str], data: DataConfig, remedy: str = RELATIVE
) -> tuple[list[Row], list[LeftOut]]:
    """The rows with a label and a file, each image once, with the labels of the chosen columns only."""
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
        elif (lacking := _lacking(item)) is not None:
            file, reason = lacking
            missing.append(str(file) if reason == MISSING_FILE else f"{file} ({reason})")
            left_out.append(LeftOut(item.name, reason if file == item.image else f"{reason}: {file}"))
        else:
            rows.append(row)
    if missing and (not rows or data.on_bad_image == "fail"):
        kind = "feature" if any(row.item.features is not None for row in table.rows) else "image"
        count = f"{len(missing)} of {len(first)} {kind} files" if rows else f"all {len(missing)} {kind} files"
        raise DataError(f"{path}: {count} are not there: {listed(missing)}. {remedy}")
    if not rows:
        raise DataError(f"{path}: no row has a label for {' or '.join(names)}. Fill the column or choose other tasks.")
    return rows, left_out


def _lacking(item: Item) -> tuple[Path, str] | None:
    """The first file that an item needs and that cannot be used, and why. With features its image need not be there."""
    for file in (item.source, item.mask, item.annotation):
        # Path.is_file raises on a name too long for the system
        if file is None or os.path.isfile(file):  # noqa: PTH113
            continue
        if not (file.suffix.lower() in folder_suffixes() and os.path.isdir(file)):  # noqa: PTH112
            return file, _why_unusable(file)
    return None


def _why_unusable(file: Path) -> str:
    if not os.path.lexists(file):
        return MISSING_FILE
    if file.is_symlink() and not file.exists():
        return f"{MISSING_FILE}: a link that leads nowhere"
    return "not a regular file"


def _check_same(path: Path, first: Row, again: Row) -> None:
    """Two rows for one image must not contradict each other: neither would be right to choose."""
    facts = [(name, first.item.labels[name], again.item.labels[name]) for name in first.item.labels]
    others = ("split", "group", "mpp", *FILES)
    facts += [(name, getattr(first.item, name), getattr(again.item, name)) for name in others]
    for name, before, now in facts:
        if before != now:
            raise DataError(
                f"{path}, {again.where}: {again.item.name} has {name} {_written(now)}, "
                f"but {_written(before)} in {first.where}. Keep one row per image."
            )


def _written(value: object) -> str:
    return repr(str(value) if isinstance(value, Path) else value or "")


def _task(path: Path, rows: Sequence[Row], name: str, kind: str | None) -> Task:
    if kind == "regression":
        number = Task(name, "regression")
        for row in rows:
            try:
                number.encode(row.item.labels[name])
            except DataError as error:
                raise DataError(f"{path}, {row.where}: {error}") from error
    texts = [row.item.labels[name] for row in rows]
    try:
        task = infer_task(name, texts, kind)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    known = sum(1 for text in texts if text)
    if kind is None and task.kind == "multiclass" and len(task.classes) == known > 2:
        raise DataError(
            f"{path}: {name} differs in every row, so it is not a class to learn. "
            f"Name other columns with --data.tasks, or say {name}=multiclass if every image is a class of its own."
        )
    return task


def _fitted(path: Path, items: Sequence[Item], task: Task) -> Task:
    values = [task.encode(item.labels[task.name]) for item in items if item.split == "train"]
    try:
        return fit_regression(task, np.concatenate(values))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _csv(rows: Iterable[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
