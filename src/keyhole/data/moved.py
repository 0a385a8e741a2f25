"""The files of a run's manifest where they are now: found by relative path below a folder; and what they held."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from keyhole.data.hashes import FileHash
from keyhole.data.item import Item, Table, absolute
from keyhole.errors import DataError

_SAMPLE = 16
"""Files by which folders that cannot be the old place are told at once."""


def stored_hashes(manifest: Path) -> dict[str, FileHash]:
    """What a run's manifest says of its files, by the image's name; SHA-256 is empty where only the size is known.

    Raises:
        DataError: the manifest is damaged.
    """
    found = {}
    try:
        with manifest.open(newline="", encoding="utf-8", errors="backslashreplace") as file:
            for row in csv.DictReader(file):
                if row.get("bytes"):
                    found[row["name"]] = FileHash(row.get("sha256") or "", int(row["bytes"]))
    except (OSError, csv.Error, KeyError, ValueError) as error:
        raise DataError(f"{manifest}: damaged ({error}). Restore it from a copy of the run.") from error
    return found


def moved_to(manifest: Path, table: Table, root: Path) -> Table:
    """The rows of a manifest with their files below `root`, where they are there.

    The folder that became `root` is the one above the images under which most of them are found again, so that
    either the images' own folder or one above it may be named.

    Args:
        manifest: of the run.
        table: as read from it.
        root: the folder that now holds what was moved.

    Raises:
        DataError: no such folder, or none of the images is in it.
    """
    root = absolute(root.expanduser())
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. --root names the folder that the images of {manifest} were moved to.")
    items = [row.item for row in table.rows]
    old = _old_root([item.source for item in items], root)
    if old is None:
        common = _common([item.source for item in items])
        raise DataError(
            f"{root}: none of the {len(items)} images of {manifest} is there, such as {items[0].source.name}. "
            f"Name the folder that now holds what was in {common}, or one above it: --root DIR"
        )
    return replace(table, rows=[replace(row, item=_moved(row.item, old, root)) for row in table.rows])


def _old_root(files: Sequence[Path], root: Path) -> Path | None:
    """The former folder whose contents are now in `root`, by how many files are found; None where none is."""
    best, most = None, 0
    for old in _ancestors(files):
        sample = files[:: max(1, len(files) // _SAMPLE)]
        if not any(_exists(root / file.relative_to(old)) for file in sample):
            continue
        count = sum(_exists(root / file.relative_to(old)) for file in files)
        if count > most:
            best, most = old, count
        if most == len(files):
            break
    return best


def _ancestors(files: Sequence[Path]) -> Iterator[Path]:
    """The folders above all files, the nearest first."""
    common = _common(files)
    yield common
    yield from common.parents


def _common(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def _moved(item: Item, old: Path, root: Path) -> Item:
    """The item with each of its files at its new place where there is one."""

    def now(file: Path | None) -> Path | None:
        if file is None or not file.is_relative_to(old):
            return file
        new = root / file.relative_to(old)
        return new if _exists(new) else file

    return replace(
        item,
        image=now(item.image) or item.image,
        mask=now(item.mask),
        annotation=now(item.annotation),
        features=now(item.features),
    )


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - raises nothing on a name too long for the system
