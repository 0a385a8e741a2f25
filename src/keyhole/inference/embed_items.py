"""What `keyhole embed` embeds: the images of a CSV or a folder, labels or not, and the names of their files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

from keyhole.config.settings import DataConfig
from keyhole.data.companions import with_companions
from keyhole.data.item import FEATURE_SUFFIXES, DataTable, Item, Row, absolute
from keyhole.data.listing import expand_images, list_images
from keyhole.data.read_csv import read_csv
from keyhole.errors import DataError
from keyhole.images.image import folder_suffixes
from keyhole.util.wording import listed


def items_to_embed(
    data: Path, root: str | Path | None, masks: str | Path | None, on_bad_image: Literal["fail", "skip"]
) -> tuple[list[Item], dict[str, str]]:
    """Return the images to embed, each once, and by name why others are left out."""
    data = absolute(data)
    if data.is_dir() and data.suffix.lower() not in folder_suffixes():
        images, others = list_images(data)
        rows = [Row(Item(image.relative_to(data).as_posix(), image, {}), str(image)) for image in images]
        table = DataTable((), rows, others)
    elif data.suffix.lower() in (".csv", ".tsv", ".txt"):
        table = read_csv(data, None if root is None else Path(root))
        rows = [Row(replace(row.item, features=None), row.where) for row in table.rows]
        table = replace(table, rows=rows)
    else:
        images, _ = expand_images([data])
        table = DataTable((), [Row(Item(image.name, image, {}), str(image)) for image in images])
    table = with_companions(data, table, DataConfig(masks=None if masks is None else Path(masks)))
    items: dict[Path, Item] = {}
    left_out = {left.name: left.reason for left in table.left_out}
    names: set[str] = set()
    missing: list[Item] = []
    for row in table.rows:
        item = row.item
        if item.features is not None:
            raise DataError(f"{data}: {item.name} is a file of stored features, not an image. Give the images.")
        if item.image in items:
            continue  # one image with several rows of labels has one file of features
        if item.name in names:
            raise DataError(f"{data}, {row.where}: the name {item.name!r} is taken. Give each image its own.")
        names.add(item.name)
        if os.path.exists(item.image):  # noqa: PTH110 - raises nothing on a name too long for the system
            items[item.image] = item
        else:
            missing.append(item)
    if missing and (on_bad_image == "fail" or not items):
        raise DataError(
            f"{data}: {len(missing)} of {len(missing) + len(items)} image files are not there: "
            f"{listed(str(item.image) for item in missing)}. Relative paths start from the CSV's folder or --root; "
            "--on-bad-image skip leaves them out."
        )
    left_out |= {item.name: "no such file" for item in missing}
    if not items:
        raise DataError(f"{data}: no images there. Give a CSV with a column `image`, or a folder of images.")
    return list(items.values()), left_out


def without_labels(data: DataConfig) -> bool:
    """Return whether data have no labels: a folder of images without subfolders, or a CSV without further columns."""
    if data.path is None or data.features is not None or data.tasks:
        return False
    path = absolute(data.path)
    if path.is_dir() and path.suffix.lower() not in folder_suffixes():
        images, _ = list_images(path)
        return bool(images) and all(
            file.parent == path and file.suffix.lower() not in FEATURE_SUFFIXES for file in images
        )
    if not path.is_file():
        return False
    table = read_csv(path, data.root)
    return not table.columns and all(row.item.features in (None, row.item.image) for row in table.rows)


def feature_names(folder: Path, items: Sequence[Item]) -> dict[str, Path]:
    """Return the file of each image: `a.h5`, `a.svs.h5` where there are several a, else `normal/a.svs.h5`.

    `--data.features` finds them under these names. Upper and lower case count as equal, as on some file systems.
    """
    named: dict[str, str] = {}
    ways: list[Callable[[Item], str]] = [
        lambda item: item.image.stem,
        lambda item: item.image.name,
        lambda item: PurePosixPath(item.name).as_posix(),
    ]
    left = list(items)
    for way in ways:
        counts = Counter(way(item).lower() for item in left)
        taken = {name.lower() for name in named.values()}
        alone = [item for item in left if counts[way(item).lower()] == 1 and way(item).lower() not in taken]
        named |= {item.name: way(item) for item in alone}
        left = [item for item in left if item.name not in named]
    inside = [PurePosixPath(name) for name in named.values()]
    wrong = [path for path in inside if path.is_absolute() or ".." in path.parts]
    if left or wrong:
        which = left[0].name if left else str(wrong[0])
        raise DataError(
            f"{which}: another image has the same file name, so their features would have one name. Rename one, or "
            "give paths relative to one folder (--root)."
        )
    return {item.name: folder / f"{named[item.name]}.h5" for item in items}
