"""Images whose labels are not read: those to predict or to embed, and those that `keyhole check` looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from keyhole.config.settings import DataConfig
from keyhole.data.companions import masks_in, with_companions
from keyhole.data.item import FEATURE_SUFFIXES, DataTable, Item, LeftOut, Row, absolute, exists
from keyhole.data.listing import expand_images, list_images
from keyhole.data.read_csv import read_csv
from keyhole.data.rows import written_otherwise
from keyhole.errors import DataError
from keyhole.images.image import folder_suffixes
from keyhole.util.wording import listed

LIST_SUFFIXES = (".csv", ".tsv", ".txt")
OnBadImage = Literal["fail", "skip"]


def new_images(
    paths: Sequence[Path], on_bad_image: OnBadImage = "fail", mpp: float | None = None, masks: Path | None = None
) -> tuple[list[Item], list[LeftOut]]:
    """Return the images to predict, each once, under the names that the user gave them; and what is not used.

    A CSV may state `mpp`, `mask`, `features` and `name` of its images, also of one that is named by itself as well.
    `mpp` and the folder `masks` are for images for which no CSV states them.
    """
    tables = [path for path in paths if path.suffix.lower() in LIST_SUFFIXES and path.is_file()]
    others = [path for path in paths if path not in tables]
    items: dict[Path, Item] = {}
    left_out: list[LeftOut] = []
    for path in tables:
        table = read_csv(path)
        found, missing = _existing(path, table.rows, on_bad_image, "the CSV's folder")
        left_out += [*table.left_out, *(LeftOut(item.name, f"no such file: {item.source}") for item in missing)]
        for item in found:
            before = items.setdefault(item.image, item)
            if (before.mpp, before.mask, before.features) != (item.mpp, item.mask, item.features):
                raise DataError(f"{item.name}: two rows differ in its mpp, mask or features. Keep one row per image.")
    if others or not tables:
        files, unused = expand_images(others, on_bad_image)
        left_out += unused
        given = {absolute(path): path for path in reversed(others)}
        for file in files:
            folder = next(path for path in (file, *file.parents) if path in given)
            items.setdefault(file, Item(str(given[folder] / file.relative_to(folder)), file, {}))
    if not items:
        raise DataError(f"{listed(map(str, tables))}: none of the images is there. Give image files or folders.")
    completed = [replace(item, mpp=mpp, mpp_from="--mpp") if item.mpp is None else item for item in items.values()]
    if masks is not None:
        completed = [replace(item, mask=item.mask or masks_in(masks).find(item)) for item in completed]
    return completed, left_out


def items_to_embed(
    data: Path, root: str | Path | None, masks: str | Path | None, on_bad_image: OnBadImage
) -> tuple[list[Item], dict[str, str]]:
    """Return the images of a CSV, a folder or a file, each once, and by name why others are left out."""
    data = absolute(data)
    if _is_folder(data):
        images, others = list_images(data)
        table = DataTable((), [Row(Item(i.relative_to(data).as_posix(), i, {}), str(i)) for i in images], others)
    elif data.suffix.lower() in LIST_SUFFIXES:
        table = read_csv(data, None if root is None else Path(root))
        table = replace(table, rows=[row.but(features=None) for row in table.rows])
    else:
        images, _ = expand_images([data])
        table = DataTable((), [Row(Item(image.name, image, {}), str(image)) for image in images])
    rows: dict[Path, Row] = {}
    names: set[str] = set()
    for row in with_companions(data, table, DataConfig(masks=None if masks is None else Path(masks))).rows:
        item = row.item
        if item.features is not None:
            raise DataError(f"{data}: {item.name} is a file of stored features, not an image. Give the images.")
        if item.image in rows:
            continue  # an image with several rows of labels
        if item.name in names:
            raise DataError(f"{data}, {row.where}: the name {item.name!r} is taken. Give each image its own.")
        names.add(item.name)
        rows[item.image] = row
    items, missing = _existing(data, list(rows.values()), on_bad_image, "the CSV's folder or --root")
    if not items:
        raise DataError(f"{data}: no images there. Give a CSV with a column `image`, or a folder of images.")
    left_out = {left.name: left.reason for left in table.left_out} | {item.name: "no such file" for item in missing}
    return items, left_out


def without_labels(data: DataConfig) -> bool:
    """Return whether data have no labels: a folder of images without subfolders, or a CSV without further columns."""
    if data.path is None or data.features is not None or data.tasks:
        return False
    path = absolute(data.path)
    if _is_folder(path):
        images, _ = list_images(path)
        return bool(images) and all(
            file.parent == path and file.suffix.lower() not in FEATURE_SUFFIXES for file in images
        )
    if not path.is_file():
        return False
    table = read_csv(path, data.root)
    return not table.columns and all(row.item.features in (None, row.item.image) for row in table.rows)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and path.suffix.lower() not in folder_suffixes()


def _existing(path: Path, rows: Sequence[Row], on_bad_image: OnBadImage, starts: str) -> tuple[list[Item], list[Item]]:
    """Divide the images into those that exist and those that do not; raise DataError if some do not, or skip them."""
    there: list[Item] = []
    missing: list[Item] = []
    for row in rows:
        (there if exists(row.item.source) else missing).append(row.item)
    if missing and on_bad_image == "fail":
        raise DataError(
            f"{path}: {len(missing)} of {len(rows)} image files are not there: "
            f"{listed(str(item.source) for item in missing)}. {written_otherwise([item.source for item in missing])}"
            f"Relative paths start from {starts}; "
            "--on-bad-image skip leaves them out."
        )
    return there, missing
