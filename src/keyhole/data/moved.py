"""The files of a run's manifest after they were moved: found by their relative path below a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from keyhole.data.item import DataTable, Item, absolute
from keyhole.errors import DataError

SAMPLE_FILES = 16
"""Number of files that are looked up first, to rule out a folder quickly."""


def moved_to(manifest: Path, table: DataTable, root: Path) -> DataTable:
    """Replace the paths of a manifest by those below `root`, where the files exist there.

    `root` may stand for any folder above the images. It is the one below which most files are found.

    Args:
        manifest: the manifest of the run.
        table: its rows.
        root: the folder that now holds the files.

    Raises:
        DataError: there is no such folder, or it holds none of the images.
    """
    root = absolute(root.expanduser())
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. --root names the folder that the images of {manifest} were moved to.")
    files = [row.item.source for row in table.rows]
    common = Path(os.path.commonpath([file.parent for file in files]))
    old = _old_root(files, common, root)
    if old is None:
        raise DataError(
            f"{root}: none of the {len(files)} images of {manifest} is there, such as {files[0].name}. "
            f"Name the folder that now holds what was in {common}, or one above it: --root DIR"
        )
    return replace(table, rows=[replace(row, item=_moved(row.item, old, root)) for row in table.rows])


def _old_root(files: Sequence[Path], common: Path, root: Path) -> Path | None:
    """Return the folder above the files whose contents are now in `root`, or None if no file is found."""
    best, most = None, 0
    sample = files[:: max(1, len(files) // SAMPLE_FILES)]
    for old in (common, *common.parents):
        if not any(_exists(root / file.relative_to(old)) for file in sample):
            continue
        count = sum(_exists(root / file.relative_to(old)) for file in files)
        if count > most:
            best, most = old, count
        if most == len(files):
            break
    return best


def _moved(item: Item, old: Path, root: Path) -> Item:
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
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises on a name too long for the system
