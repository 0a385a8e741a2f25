"""Folder of classes -> table, and images named on the command line -> files. Every other file is listed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from keyhole.data.companions import FEATURE_FOLDERS, FEATURE_ORDER
from keyhole.data.item import FEATURE_SUFFIXES, IMAGE_SUFFIXES, SPLITS, ZARR_SUFFIX, Item, LeftOut, Row, Table, absolute
from keyhole.errors import DataError

FOLDER_TASK = "label"
"""Name of the one task that a folder of classes poses."""
_NOT_IMAGES = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
"""Files that systems leave in folders."""


def read_folder(path: Path) -> Table:
    """Reads `path/CLASS/**/image`, or `path/SPLIT/CLASS/**/image` where the folders are train, val and test.

    The names are splits where a folder `train` is there and each of train, val and test that is there holds folders
    and no images of its own.

    Raises:
        DataError: no class folders, or no images in them.
    """
    path = absolute(path)
    files, left_out = list_images(path)
    has_splits = _has_splits(path, files)
    table = Table((FOLDER_TASK,), [], left_out, [])
    filled = set()
    for file in files:
        relative = file.relative_to(path)
        name = relative.as_posix()
        *folders, _ = relative.parts
        if has_splits and folders[:1] and folders[0].lower() not in SPLITS:
            left_out.append(LeftOut(name, "not under train, val or test"))
            continue
        split = folders.pop(0).lower() if has_splits and folders else ""
        if not folders:
            left_out.append(LeftOut(name, "not in a class folder"))
            continue
        filled.add((split, folders[0]))
        table.rows.append(Row(Item(name, file, {FOLDER_TASK: folders[0].strip()}, split), name))
    if not table.rows:
        raise DataError(
            f"{path}: no images in class folders. Expected one folder per class with its images in it, or a CSV."
        )
    for split_folder in _folders(path) if has_splits else [path]:
        for folder in _folders(split_folder):
            split = split_folder.name.lower() if has_splits else ""
            if split in ("", *SPLITS) and (split, folder.name) not in filled:
                left_out.append(LeftOut(f"{folder.relative_to(path).as_posix()}/", "class folder without images"))
    return table


def expand_images(
    paths: Sequence[str | Path], missing: Literal["fail", "skip"] = "fail"
) -> tuple[list[Path], list[LeftOut]]:
    """Files as given, folders replaced by the images below them in order of name; each file once.

    Args:
        paths: files and folders; a folder `x.zarr` is an image.
        missing: what a path that does not exist does: raise, or be left out.

    Returns:
        absolute paths, and what is not used: files of the folders that are not images, folders without any.

    Raises:
        DataError: a path that does not exist, a folder that cannot be listed, or no image at all.
    """
    found: dict[Path, None] = {}
    left_out: list[LeftOut] = []
    for path in map(absolute, paths):
        if path.is_dir() and path.suffix.lower() != ZARR_SUFFIX:
            files, others = list_images(path)
            found.update(dict.fromkeys(files))
            left_out += [LeftOut(str(path / other.name), other.reason) for other in others]
            if not files:
                left_out.append(LeftOut(str(path), "a folder without images"))
        elif os.path.exists(path):  # noqa: PTH110 - Path.exists raises on a name too long for the system
            found[path] = None
        elif missing == "skip":
            left_out.append(LeftOut(str(path), "no such file or folder"))
        else:
            raise DataError(f"{path}: no such file or folder. Give image files or folders of them.")
    if not found:
        raise DataError(
            f"{', '.join(map(str, paths)) or 'nothing given'}: no images there. Give image files or folders."
        )
    return list(found), left_out


def list_images(path: Path) -> tuple[list[Path], list[LeftOut]]:
    """The images below a folder in order of name, and every other file with the reason it is not one.

    Where there is no image, files of stored features are taken in their place, one a slide. Links are followed, each
    folder once. The folder beside a MIRAX slide of the same name holds the slide's own data, and a folder `x.zarr` is
    itself an image.

    Raises:
        DataError: a folder that cannot be listed.
    """
    path = absolute(path)
    images: list[Path] = []
    stored: list[Path] = []
    left_out: list[LeftOut] = []
    for folder, names, others in _walk(path):
        left_out += others
        for name in names:
            file = folder / name
            reason = _why_not(file)
            if reason:
                shown = file.relative_to(path).as_posix().encode(errors="backslashreplace").decode()
                left_out.append(LeftOut(shown, reason))
            else:
                (stored if file.suffix.lower() in FEATURE_SUFFIXES else images).append(file)
    if images:
        left_out += [LeftOut(file.relative_to(path).as_posix(), "stored features beside images") for file in stored]
    else:
        images, doubles = _one_a_slide(path, stored)
        left_out += doubles
    return sorted(images, key=lambda file: file.relative_to(path).as_posix()), left_out


def _one_a_slide(path: Path, stored: list[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Of files of features that differ in suffix alone, or in CLAM's folder for it, the one that says most."""
    best: dict[Path, Path] = {}
    for file in sorted(stored, key=lambda file: (FEATURE_ORDER.index(file.suffix.lower()), file)):
        inside = [part for part in file.relative_to(path).parts if part not in FEATURE_FOLDERS]
        best.setdefault(Path(*inside).with_suffix(""), file)
    chosen = set(best.values())
    names = [file.relative_to(path).as_posix() for file in stored if file not in chosen]
    return list(chosen), [LeftOut(name, "features that an .h5 file holds too") for name in names]


def _walk(path: Path) -> Iterator[tuple[Path, list[str], list[LeftOut]]]:
    """Each folder with the sorted names of its files and of images that are folders, and what was not entered."""

    def unlistable(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be listed ({error.strerror}).") from error

    seen = {_identity(path)}
    for folder_name, folders, names in os.walk(path, onerror=unlistable, followlinks=True):
        folder, skipped = Path(folder_name), []
        whole = [name for name in folders if name.lower().endswith(ZARR_SUFFIX) and not name.startswith(".")]
        folders[:] = [name for name in folders if name not in whole]
        for name in sorted(folders):
            identity = _identity(folder / name)
            if name.startswith("."):
                reason = "hidden folder"
            elif f"{name}.mrxs" in names:
                reason = f"part of {name}.mrxs"
            elif identity in seen:
                reason = "link to a folder that is already read"
            else:
                seen.add(identity)
                continue
            folders.remove(name)
            skipped.append(LeftOut(f"{(folder / name).relative_to(path).as_posix()}/", reason))
        folders.sort()
        yield folder, sorted([*names, *whole]), skipped


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _why_not(file: Path) -> str:
    """Why a file of a folder is not taken for an image; empty if it is."""
    suffix = file.suffix.lower()
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return "name is not UTF-8; rename it"
    if file.name.lower() in _NOT_IMAGES:
        return "not an image"
    if file.name.startswith("."):
        return "hidden file"
    if suffix not in IMAGE_SUFFIXES | FEATURE_SUFFIXES:
        return f"not an image (suffix {suffix})" if suffix else "not an image (no suffix)"
    return ""


def _has_splits(path: Path, files: list[Path]) -> bool:
    named = [folder for folder in _folders(path) if folder.name.lower() in SPLITS]
    direct = {file.parent for file in files}
    return any(folder.name.lower() == "train" for folder in named) and all(
        folder not in direct and _folders(folder) for folder in named
    )


def _folders(path: Path) -> list[Path]:
    return sorted(
        entry
        for entry in path.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.suffix.lower() != ZARR_SUFFIX
    )
