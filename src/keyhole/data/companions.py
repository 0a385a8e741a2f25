"""Files that belong to an image by name: stored features, which are read instead of it, and masks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

from keyhole.config.settings import DataConfig
from keyhole.data.item import FEATURE_SUFFIXES, DataTable, Item, Row, absolute
from keyhole.errors import DataError
from keyhole.images.image import image_suffixes
from keyhole.util.wording import listed

FEATURE_FOLDERS = ("", "h5_files", "pt_files")
"""Subfolders that may hold features: the folder itself, and those of CLAM."""
MASK_ORDER = (".png", ".geojson")


def with_companions(path: Path, table: DataTable, data: DataConfig) -> DataTable:
    """Add the features and masks that the folders of `data` hold to every row that does not name its own.

    Features that do not exist are added too, so that they are reported as missing.
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


def unused_masks(items: Iterable[Item], foreground: str, trained: bool = False) -> list[str]:
    """Return a line if images have masks that the foreground rule, of a `trained` model or not, does not use."""
    count = sum(item.mask is not None and item.features is None for item in items)
    if foreground == "mask" or not count:
        return []
    which = "the mask of 1 image is" if count == 1 else f"the masks of {count} images are"
    if trained:
        return [f"{which} not used, since the model was trained with patch.foreground {foreground}"]
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
    """A folder of files that are named after images, with the suffixes in `order`, best first.

    `option` is its name in `DataConfig`.
    """

    def __init__(self, folder: Path, option: str, order: tuple[str, ...], subfolders: tuple[str, ...] = ("",)) -> None:
        self.folder, self.order = absolute(folder.expanduser()), order
        if not self.folder.is_dir():
            raise DataError(f"{folder}: no such folder. --data.{option} names a folder with {listed(order)} files.")
        self.folders = [self.folder / name for name in subfolders]
        self._names = cache(_file_names)

    def find(self, item: Item) -> Path | None:
        """Return the file of an image, by the image's name with its folders, then by its file name alone."""
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
    """Return `a.ome.tif`, `a.ome` and `a`: what may come before the suffix of a companion."""
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


def feature_names(folder: Path, items: Sequence[Item]) -> dict[str, Path]:
    """Return a file for the features of each image: `a.h5`; `a.svs.h5` if there are several a, or `normal/a.svs.h5`.

    `Companions` finds them by these names. Upper and lower case are equal, as on some file systems.
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
