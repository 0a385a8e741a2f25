"""A folder of classes -> rows: which of its folders are classes, and which are splits.

Layouts that are nearly right are refused: a model would learn the names of splits or folds as classes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from keyhole.data.item import DataTable, Item, LeftOut, Row, absolute
from keyhole.data.listing import list_images, system_folder
from keyhole.errors import DataError
from keyhole.images.image import folder_suffixes
from keyhole.util.wording import listed

FOLDER_TASK = "label"
SPLIT_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_AFTER_SPLIT = re.compile(r"(set|data|images?|imgs?|split)$")
_FOLD = re.compile(r"(fold|split|cv|part)[\s_.-]*\d+", re.IGNORECASE)


def split_named(name: str) -> str:
    """Return the split that the name of a folder or cell means: `train` for `Training` or `train_set`; else empty."""
    plain = re.sub(r"^\d+|[\s_.-]", "", name.lower())
    return SPLIT_WORDS.get(plain) or SPLIT_WORDS.get(_AFTER_SPLIT.sub("", plain), "")


def read_folder(path: Path, ignore: Mapping[Path, str] | None = None) -> DataTable:
    """Read `path/CLASS/**/image`, `path/SPLIT/CLASS/**/image` or `path/CLASS/SPLIT/**/image`.

    `ignore` names folders in it that hold something else, such as masks, and says what.
    """
    path = absolute(path)
    files, left_out = list_images(path, ignore, generated=True)
    skipped = {left.name for left in left_out}
    places = [file.relative_to(path).parts[:-1] for file in files]
    split_at, notes = _find_layout(path, places)
    table = DataTable((FOLDER_TASK,), [], left_out, [f"{path}: {note}" for note in notes])
    filled = set()
    for file, folders in zip(files, places, strict=True):
        name = file.relative_to(path).as_posix()
        place = _place(folders, split_at)
        if isinstance(place, str):
            left_out.append(LeftOut(name, place))
            continue
        split, label = place
        filled |= {"/".join(folders[:depth]) for depth in range(1, len(folders) + 1)}
        table.rows.append(Row(Item(name, file, {FOLDER_TASK: label.strip()}, split), name))
    if not table.rows:
        raise DataError(
            f"{path}: no images in class folders. Expected one folder per class with its images in it, or a CSV."
        )
    first_folders = {folders[0] for folders in places if folders}
    for outer in _folders(path):
        holds_classes = split_at == 0 and bool(split_named(outer.name))
        for folder in _folders(outer) if holds_classes else [outer] if outer.name not in first_folders else []:
            name = folder.relative_to(path).as_posix()
            if name not in filled and skipped.isdisjoint({f"{name}/", f"{outer.name}/"}):
                left_out.append(LeftOut(f"{name}/", "class folder without images"))
    return table


def check_classes(path: Path, table: DataTable) -> None:
    """Refuse a folder that has one class only, or classes of one image each."""
    counts = Counter(row.item.labels[FOLDER_TASK] for row in table.rows)
    if len(counts) > 2 and all(count == 1 for count in counts.values()):
        raise DataError(
            f"{path}: each of the {len(counts)} class folders holds one image, so there is no class to learn. "
            "Expected one folder per class with several images in it, or a CSV."
        )
    if len(counts) > 1:
        return
    places = [Path(row.item.name).parts[:-1] for row in table.rows]
    first = places[0][0]
    below = sorted({folders[1] for folders in places if len(folders) > 1})
    if all(folders[0] == first for folders in places) and len(below) > 1:
        raise DataError(
            f"{path}: the only folder with images in it is {first}, which holds the folders {listed(below)}. If these "
            f"are the classes, give {path / first}"
        )
    raise DataError(
        f"{path}: all images are in one class folder, {places[0][-1]!r}; at least two classes are needed to learn. "
        "Expected one folder per class with its images in it, or a CSV."
    )


def _place(folders: Sequence[str], split_at: int | None) -> tuple[str, str] | str:
    """Return (split, class) of an image from the names of its folders, outermost first; or why it has no class."""
    if not folders:
        return "not in a class folder"
    if split_at is None:
        return "", folders[0]
    if split_at == 0 and not split_named(folders[0]):
        return "not under train, val or test"
    if len(folders) == 1:
        unlabelled = f"in the split {folders[0]}, but not in a class folder: it has no label"
        return unlabelled if split_at == 0 else "not in a split folder"
    return split_named(folders[split_at]), folders[1 - split_at]


def _find_layout(path: Path, places: Sequence[Sequence[str]]) -> tuple[int | None, list[str]]:
    """Return the depth of the split folders, and notes: 0 for `SPLIT/CLASS/image`, 1 for `CLASS/SPLIT/image`, or None.

    `places` has the names of the folders that each image is in, outermost first; there may be more folders.
    """
    # Number of images by the names of the first and the second folder; the second is empty for images in the first
    tree: dict[str, Counter[str]] = defaultdict(Counter)
    for folders in places:
        if folders:
            tree[folders[0]][folders[1] if len(folders) > 1 else ""] += 1
    splits = [name for name in tree if split_named(name)]
    others = [name for name in tree if name not in splits]
    if any(sub for name in splits for sub in tree[name]):
        if len(splits) == 1 and others:
            raise DataError(
                f"{path}: the folder {splits[0]} is named like a split and holds folders, but it is beside "
                f"{listed(others)}. Put all class folders into {splits[0]}, or rename it if it is a class."
            )
        bare = [f"{tree[name]['']} in {name}" for name in splits if tree[name][""]]
        note = f"images without a class folder have no label and are left out: {', '.join(bare)}"
        return 0, [note] if bare else []
    if splits and (not others or len({split_named(name) for name in splits}) > 1):
        are, hold = ("is named like a split", "holds") if len(splits) == 1 else ("are named like splits", "hold")
        raise DataError(
            f"{path}: {' and '.join(splits)} {are}, but {hold} images and no class folders. "
            f"Expected {splits[0]}/CLASS/image, or a CSV with the columns image, label and split. If these "
            "are the classes, rename the folders."
        )
    roles = {name: {split_named(sub) for sub in subs} for name, subs in tree.items()}
    split = [name for name, found in roles.items() if "train" in found and len(found) > 1 and "" not in found]
    rest = [name for name, found in roles.items() if name not in split and "" in found]
    if split and rest:
        raise DataError(
            f"{path}: {split[0]} holds the splits {listed(tree[split[0]])}, but {rest[0]} does not. Lay out all "
            "classes alike, or give a CSV with the columns image, label and split."
        )
    if split:
        return 1, ["the folders in each class are read as its splits"]
    if len(tree) > 1 and all(_FOLD.fullmatch(name) and "" not in subs for name, subs in tree.items()):
        raise DataError(
            f"{path}: {listed(tree)} are named like folds, not like classes. Give a CSV with the columns image, "
            f"label and split, or one fold alone: {path / next(iter(tree))}"
        )
    # If all classes hold folders of the same names, these may be the classes that the user means.
    common = set.intersection(*(set(subs) - {""} for subs in tree.values())) if len(tree) > 1 else set()
    note = (
        f"the classes are {listed(tree)}; the folders {listed(sorted(common))} in each of them are not classes "
        "(if they should be, give a CSV)"
    )
    return None, [note] if len(common) > 1 else []


def _folders(path: Path) -> list[Path]:
    return sorted(
        entry
        for entry in path.iterdir()
        if entry.is_dir() and not system_folder(entry.name) and entry.suffix.lower() not in folder_suffixes()
    )
