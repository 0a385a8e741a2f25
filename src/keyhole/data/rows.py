"""The usable rows of a CSV or folder: each image once, with a label and a file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path

from keyhole.config.settings import DataConfig
from keyhole.data.columns import with_columns_read, without_missing_words
from keyhole.data.companions import with_companions
from keyhole.data.item import SPLITS, DataTable, Item, LeftOut, Row, absolute, exists
from keyhole.data.read_csv import FILES, read_csv
from keyhole.data.read_folder import read_folder
from keyhole.errors import ConfigError, DataError
from keyhole.images.image import folder_suffixes
from keyhole.util.wording import listed

MISSING_FILE = "no such file"
SAMPLE_FILES = 16  # number of files that are tried first, to rule out a folder quickly


def read_rows(data: DataConfig, asked: Sequence[str], classes: Sequence[str] = ()) -> tuple[DataTable, Path]:
    """Return the rows of a data set, and its path.

    `asked` are the columns to learn or to compare with, each `name` or `name=kind`. The `classes` of a model are labels
    even if `data.missing` has them.
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
        names = {name_and_kind(entry, table.columns)[0] for entry in asked}
        table = with_columns_read(data.path, table, data.group, table.columns if table.written else names)
    else:
        raise DataError(f"{data.path}: not a regular file. Name a folder of classes or a CSV: --data.path PATH.")
    return with_companions(data.path, table, data), data.path


def name_and_kind(entry: str, columns: Sequence[str]) -> tuple[str, str]:
    """Split `name=kind`; `kind` is empty for `name`.

    A name may contain `=`, as may the class in `name=binary:class`: the longest column that fits is taken.
    """
    fitting = [column for column in columns if entry == column or entry.startswith(f"{column}=")]
    name = max(fitting, key=len, default=entry.partition("=")[0])
    return name, entry[len(name) + 1 :]


def in_splits(path: Path, table: DataTable, splits: Sequence[str]) -> DataTable:
    """Return the rows of some splits; those without a split are in `test`."""
    rows = [row for row in table.rows if (row.item.split or "test") in splits]
    if not rows:
        counts = Counter(row.item.split or "test" for row in table.rows)
        others = ", ".join(f"{counts[name]} in {name}" for name in SPLITS if counts[name])
        raise DataError(
            f"{path}: no image in the split {listed(map(repr, splits))}; there are {others}. Choose another --split."
        )
    return replace(table, rows=rows)


def usable_rows(
    path: Path, table: DataTable, names: Sequence[str], data: DataConfig, remedies: Sequence[str]
) -> tuple[list[Row], list[LeftOut]]:
    """Return the rows that have a label and a file, each image once, and what is left out.

    Labels are those of the columns `names`; `remedies` end the error about missing files, the second if some are there.
    """
    rows: list[Row] = []
    left_out = list(table.left_out)
    first: dict[Path, Row] = {}
    by_name: dict[str, Row] = {}
    missing: list[str] = []
    lost: list[Path] = []
    for row in table.rows:
        row = row.but(labels={name: row.item.labels[name] for name in names})
        item = row.item
        before = first.setdefault(item.image, row)
        if before is not row:
            _check_same(path, before, row)
            left_out.append(LeftOut(item.name, f"{row.where}: same image as {before.where}"))
            continue
        before = by_name.setdefault(item.name, row)
        if before is not row:
            taken = f"name {item.name!r} is taken by {before.where}"
            raise DataError(f"{path}, {row.where}: {taken}. Give each image its own.")
        if not any(item.labels.values()):
            left_out.append(LeftOut(item.name, f"no label for {' or '.join(names)}"))
        elif (lacking := _unusable_file(item)) is not None:
            file, reason = lacking
            lost.append(file)
            missing.append(str(file) if reason == MISSING_FILE else f"{file} ({reason})")
            left_out.append(LeftOut(item.name, reason if file == item.image else f"{reason}: {file}"))
        else:
            rows.append(row)
    if missing and (not rows or data.on_bad_image == "fail"):
        what = "feature" if any(row.item.features is not None for row in table.rows) else "image"
        remedy = " ".join(remedies if rows else remedies[:1])
        count = f"{len(missing)} of {len(first)} {what} files" if rows else f"all {len(missing)} {what} files"
        raise DataError(f"{path}: {count} are not there: {listed(missing)}. {written_otherwise(lost)}{remedy}")
    if not rows:
        raise DataError(f"{path}: no row has a label for {' or '.join(names)}. Fill the column or choose other tasks.")
    return rows, left_out


def written_otherwise(missing: Sequence[Path]) -> str:
    """Return a sentence, with a space behind it, if the first file that is missing is there under a similar path."""
    first = missing[0]
    forward = Path(str(first).replace("\\", "/"))
    if forward != first and exists(forward):
        return f"With / for \\ the first is there: {forward}. "
    if not first.suffix and (found := sorted(first.parent.glob(f"{escape(first.name)}.*"))):
        return f"With its ending the first is there: {found[0]}. "
    return ""


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
    before, now = (
        {**row.item.labels, **{name: getattr(row.item, name) for name in ("split", "group", "mpp", *FILES)}}
        for row in (first, again)
    )
    for name in before:
        if before[name] != now[name]:
            one, other = (repr(str(x) if isinstance(x, Path) else x or "") for x in (before[name], now[name]))
            raise DataError(
                f"{path}, {again.where}: {again.item.name} has {name} {other}, but {one} in {first.where}. Keep one "
                "row per image."
            )


def moved_to(manifest: Path, table: DataTable, root: Path) -> DataTable:
    """Replace the paths of a run's manifest by those below `root`, to which its files were moved.

    Paths that do not exist there stay.
    """
    root = absolute(root.expanduser())
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. --root names the folder that the images of {manifest} were moved to.")
    sources = [row.item.source for row in table.rows]
    common = Path(os.path.commonpath([file.parent for file in sources]))
    old = _old_root(sources, common, root)
    if old is None:
        raise DataError(
            f"{root}: none of the {len(sources)} images of {manifest} is there, such as {sources[0].name}. "
            f"Name the folder that now holds what was in {common}, or one above it: --root DIR"
        )

    def now(file: Path) -> Path:
        new = root / file.relative_to(old) if file.is_relative_to(old) else file
        return new if exists(new) else file

    rows = []
    for row in table.rows:
        files = {name: now(file) for name in ("image", *FILES) if (file := getattr(row.item, name)) is not None}
        rows.append(row.but(**files))
    return replace(table, rows=rows)


def _old_root(files: Sequence[Path], common: Path, root: Path) -> Path | None:
    """Return the folder above the files whose contents are now in `root`, or None if no file is found."""
    best, most = None, 0
    sample = files[:: max(1, len(files) // SAMPLE_FILES)]
    for old in (common, *common.parents):
        if any(exists(root / file.relative_to(old)) for file in sample):
            count = sum(exists(root / file.relative_to(old)) for file in files)
            if count > most:
                best, most = old, count
            if most == len(files):
                break
    return best
