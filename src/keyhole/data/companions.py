"""Files that belong to an image by its name: stored features that are read instead of it, and masks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from keyhole.config.settings import DataConfig
from keyhole.data.item import FEATURE_SUFFIXES, DataTable, Item, Row, absolute
from keyhole.errors import DataError
from keyhole.images.image import image_suffixes
from keyhole.util.wording import listed

FEATURE_FOLDERS = ("", "h5_files", "pt_files")
"""Subfolders in which features are looked for: the folder itself and those of CLAM."""
MASK_ORDER = (".png", ".geojson")


def with_companions(path: Path, table: DataTable, data: DataConfig) -> DataTable:
    """Add features and masks to every row: its own, else those found by name in the folders of `data`.

    A file of features that does not exist is still added, so that it is reported as missing.
    """
    features = Companions(data.features, "features", FEATURE_SUFFIXES, FEATURE_FOLDERS) if data.features else None
    masks = Companions(data.masks, "masks", MASK_ORDER) if data.masks else None
    rows, unmasked = [], 0
    for row in table.rows:
        item = row.item
        if item.features is None and features is not None:
            expected = features.folder / f"{_stems(item.image.name)[-1]}{features.order[0]}"
            item = replace(item, features=features.find(item) or expected)
        if item.mask is None and masks is not None:
            item = replace(item, mask=masks.find(item))
            unmasked += item.mask is None
        rows.append(Row(item, row.where))
    _check_alike(path, rows)
    notes = [f"{data.masks}: no mask for {unmasked} of {len(rows)} images"] if unmasked else []
    return replace(table, rows=rows, notes=[*table.notes, *notes])


def unused_masks(items: Iterable[Item], foreground: str) -> list[str]:
    """Return a line if images have masks that the foreground rule does not use; else nothing."""
    count = sum(item.mask is not None and item.features is None for item in items)
    if foreground == "mask" or not count:
        return []
    which = "the mask of 1 image is" if count == 1 else f"the masks of {count} images are"
    return [f"{which} not used, since patch.foreground is {foreground}; to use them: --patch.foreground mask"]


@cache
def masks_in(folder: Path) -> Companions:
    """Return the masks in a folder."""
    return Companions(folder, "masks", MASK_ORDER)


def _check_alike(path: Path, rows: Iterable[Row]) -> None:
    stored: dict[Path, Row] = {}
    image, bag = None, None
    for row in rows:
        item = row.item
        if item.features is None:
            image = image or item
            continue
        bag = bag or item
        before = stored.setdefault(item.features, row)
        if before.item.image != item.image:
            raise DataError(
                f"{path}: {before.item.name} ({before.where}) and {item.name} ({row.where}) would both read "
                f"{item.features}. Give each image its own in a column `features`."
            )
    if image and bag:
        raise DataError(
            f"{path}: {image.name} is an image, but {bag.name} has stored features ({bag.features}); one data set is "
            "of one kind. Give all of them features, or none."
        )


class Companions:
    """A folder with files that are named after images, with one of the suffixes in `order`, best first.

    `option` is its name in `DataConfig`, for messages.
    """

    def __init__(self, folder: Path, option: str, order: tuple[str, ...], subfolders: tuple[str, ...] = ("",)) -> None:
        self.folder, self.order = absolute(folder.expanduser()), order
        if not self.folder.is_dir():
            raise DataError(f"{folder}: no such folder. --data.{option} names a folder with {listed(order)} files.")
        self.folders = [self.folder / name for name in subfolders]
        self._names = cache(_file_names)

    def find(self, item: Item) -> Path | None:
        """Return the file of an image: by its name in the data, folders included, then by the file's name alone."""
        written = PurePosixPath(item.name)
        inside = not written.is_absolute() and ".." not in written.parts and len(written.parts) > 1
        for stem in dict.fromkeys([*(_stems(written.as_posix()) if inside else []), *_stems(item.image.name)]):
            for suffix in self.order:
                for folder in self.folders:
                    *parents, last = f"{stem}{suffix}".split("/")
                    if last in self._names(place := folder.joinpath(*parents)):
                        return place / last
        return None


def _stems(name: str) -> list[str]:
    """Return `a.ome.tif`, `a.ome` and `a`: the names of an image that a companion may have before its own suffix."""
    suffix = PurePosixPath(name).suffix
    # The part after the last dot of a slide's number is not a suffix.
    if suffix.lower() not in image_suffixes() and not (suffix[1:].isalpha() and len(suffix) <= 7):
        return [name]
    bare = name.removesuffix(suffix)
    return [name, bare, bare[: -len(".ome")]] if bare.lower().endswith(".ome") else [name, bare]


def _file_names(folder: Path) -> frozenset[str]:
    if not folder.is_dir():
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file())
