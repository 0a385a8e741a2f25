"""New images for a trained model, with or without labels: files, folders and CSVs named on the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from keyhole.data.companions import masks_in
from keyhole.data.item import Item, LeftOut, absolute
from keyhole.data.listing import expand_images
from keyhole.data.read_csv import read_csv
from keyhole.errors import DataError
from keyhole.util.wording import listed

LIST_SUFFIXES = (".csv", ".tsv", ".txt")


def new_images(
    paths: Sequence[Path],
    missing: Literal["fail", "skip"] = "fail",
    mpp: float | None = None,
    masks: Path | None = None,
) -> tuple[list[Item], list[LeftOut]]:
    """Return the images to predict, each once, under the names that the user gave them; and what is not used.

    Of a CSV, `mpp`, `mask`, `features` and `name` are read too; they also apply to a file that is named by itself.
    `mpp` and the folder `masks` are for images for which no CSV states them.
    """
    tables = [path for path in paths if path.suffix.lower() in LIST_SUFFIXES and path.is_file()]
    others = [path for path in paths if path not in tables]
    items: dict[Path, Item] = {}
    left_out: list[LeftOut] = []
    for table in tables:
        found, unused = _from_csv(table, missing)
        left_out += unused
        for item in found:
            before = items.setdefault(item.image, item)
            if (before.mpp, before.mask, before.features) != (item.mpp, item.mask, item.features):
                raise DataError(f"{item.name}: two rows differ in its mpp, mask or features. Keep one row per image.")
    if others or not tables:
        files, unused = expand_images(others, missing)
        left_out += unused
        given = {absolute(path): path for path in reversed(others)}
        for file in files:
            folder = next(path for path in (file, *file.parents) if path in given)
            items.setdefault(file, Item(str(given[folder] / file.relative_to(folder)), file, {}))
    if not items:
        raise DataError(f"{listed(map(str, tables))}: none of the images is there. Give image files or folders.")
    completed = [replace(item, mpp=mpp) if item.mpp is None else item for item in items.values()]
    if masks is not None:
        completed = [replace(item, mask=item.mask or masks_in(masks).find(item)) for item in completed]
    return completed, left_out


def _from_csv(table: Path, missing: Literal["fail", "skip"]) -> tuple[list[Item], list[LeftOut]]:
    read = read_csv(table)
    items = [row.item for row in read.rows]
    gone = [item for item in items if not os.path.exists(item.source)]  # noqa: PTH110 - raises nothing on a long name
    if gone and missing == "fail":
        raise DataError(
            f"{table}: {len(gone)} of {len(items)} image files are not there: {listed(str(i.source) for i in gone)}. "
            "Relative paths start from the CSV's folder; --on-bad-image skip leaves them out."
        )
    unused = [*read.left_out, *(LeftOut(item.name, f"no such file: {item.source}") for item in gone)]
    return [item for item in items if item not in gone], unused
