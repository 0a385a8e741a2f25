"""How the folders of a data set are meant: classes, splits of classes, or classes of splits.

Folders that are nearly one of these are refused with the way out: read as classes, names of splits would be learned.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keyhole.errors import DataError
from keyhole.util.wording import listed

_SPLIT_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_AFTER_SPLIT = re.compile(r"(set|data|images?|imgs?|split)$")
_FOLD = re.compile(r"(fold|split|cv|part)[\s_.-]*\d+", re.IGNORECASE)
KNOWN = "train (training), val (valid, validation, dev) or test (testing)"
"""The names of splits, for messages."""


def split_named(name: str) -> str:
    """The split that a folder or a cell names: `train` for `Training` or `train_set`; empty where it names none."""
    plain = re.sub(r"^\d+|[\s_.-]", "", name.lower())
    return _SPLIT_WORDS.get(plain) or _SPLIT_WORDS.get(_AFTER_SPLIT.sub("", plain), "")


@dataclass(frozen=True)
class Layout:
    """What the folders of a path mean.

    Attributes:
        kind: `class/image`, `split/class/image` or `class/split/image`; images may lie deeper.
        notes: what a user should know of the decision.
    """

    kind: Literal["class", "split/class", "class/split"]
    notes: tuple[str, ...] = ()

    def place(self, folders: Sequence[str]) -> tuple[str, str] | str:
        """(split, class) of an image in these folders, from the outermost; or why it has no class."""
        if not folders:
            return "not in a class folder"
        if self.kind == "class":
            return "", folders[0]
        if self.kind == "class/split":
            return (split_named(folders[1]), folders[0]) if len(folders) > 1 else "not in a split folder"
        split = split_named(folders[0])
        if not split:
            return "not under train, val or test"
        if len(folders) == 1:
            return f"in the split {folders[0]}, but not in a class folder: it has no label"
        return split, folders[1]


def find_layout(path: Path, places: Sequence[Sequence[str]]) -> Layout:
    """The layout of a folder, from the folders that each image is in, from the outermost.

    Raises:
        DataError: folders that are named like splits or folds and are not laid out as such.
    """
    direct: Counter[str] = Counter()
    inside: dict[str, Counter[str]] = defaultdict(Counter)
    for folders in places:
        if folders:
            inside[folders[0]][folders[1] if len(folders) > 1 else ""] += 1
            direct[folders[0]] += len(folders) == 1
    splits = [name for name in inside if split_named(name)]
    others = [name for name in inside if name not in splits]
    roles = {split_named(name) for name in splits}
    if any(sub for name in splits for sub in inside[name]):
        if len(splits) == 1 and others:
            raise DataError(
                f"{path}: the folder {splits[0]} is named like a split and holds folders, but it stands beside "
                f"{listed(others)}. Put all class folders into {splits[0]}, or rename it if it is a class."
            )
        bare = [f"{direct[name]} in {name}" for name in splits if direct[name]]
        note = f"images without a class folder have no label and are left out: {', '.join(bare)}"
        return Layout("split/class", (note,) if bare else ())
    if splits and (not others or len(roles) > 1):
        are = "is named like a split" if len(splits) == 1 else "are named like splits"
        raise DataError(
            f"{path}: {' and '.join(splits)} {are}, but {'holds' if len(splits) == 1 else 'hold'} images and no class "
            f"folders. Expected {splits[0]}/CLASS/image, or a CSV with the columns image, label and split. If these "
            "are the classes, rename the folders."
        )
    if _classes_of_splits(path, inside):
        return Layout("class/split", ("the folders in each class are read as its splits",))
    _refuse_folds(path, inside)
    return Layout("class", _same_inside(inside))


def _classes_of_splits(path: Path, inside: Mapping[str, Mapping[str, int]]) -> bool:
    """Whether each class folder holds split folders, and only these."""
    roles = {name: {split_named(sub) for sub in subs} for name, subs in inside.items()}
    split = [name for name, found in roles.items() if "train" in found and len(found) > 1 and "" not in found]
    rest = [name for name, found in roles.items() if name not in split and not (found and "" not in found)]
    if split and rest:
        raise DataError(
            f"{path}: {split[0]} holds the splits {listed(inside[split[0]])}, but {rest[0]} does not. Lay out all "
            "classes alike, or give a CSV with the columns image, label and split."
        )
    return bool(split)


def _refuse_folds(path: Path, inside: Mapping[str, Mapping[str, int]]) -> None:
    if len(inside) > 1 and all(_FOLD.fullmatch(name) and "" not in subs for name, subs in inside.items()):
        first, *_ = inside
        raise DataError(
            f"{path}: {listed(inside)} are named like folds, not like classes. Give a CSV with the columns image, "
            f"label and split, or one fold alone: {path / first}"
        )


def _same_inside(inside: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """A note where the folders in all classes have the same names: perhaps these are the classes."""
    common = set.intersection(*(set(subs) - {""} for subs in inside.values())) if len(inside) > 1 else set()
    if len(common) < 2:
        return ()
    note = f"the classes are {listed(inside)}; the folders {listed(sorted(common))} in each of them are not classes"
    return (f"{note} (if they should be, give a CSV)",)


def one_class(path: Path, places: Sequence[Sequence[str]]) -> DataError:
    """What is wrong with a folder whose images are all of one class, with the folder that was probably meant."""
    top = places[0][0]
    below = sorted({folders[1] for folders in places if len(folders) > 1})
    if all(folders[0] == top for folders in places) and len(below) > 1:
        return DataError(
            f"{path}: the only folder with images in it is {top}, which holds the folders {listed(below)}. If these "
            f"are the classes, give {path / top}"
        )
    return DataError(
        f"{path}: all images are in one class folder, {places[0][-1]!r}; at least two classes are needed to learn. "
        "Expected one folder per class with its images in it, or a CSV."
    )


def refuse_single_images(path: Path, counts: Mapping[str, int]) -> None:
    """Folders of one image each are not classes.

    Raises:
        DataError: every class folder holds one image.
    """
    if len(counts) > 2 and all(count == 1 for count in counts.values()):
        raise DataError(
            f"{path}: each of the {len(counts)} class folders holds one image, so there is no class to learn. "
            "Expected one folder per class with several images in it, or a CSV."
        )
