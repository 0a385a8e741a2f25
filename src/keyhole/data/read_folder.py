"""Folder of classes -> table, and images named on the command line -> files. Every other file is listed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from keyhole.data.companions import FEATURE_FOLDERS, FEATURE_ORDER
from keyhole.data.item import FEATURE_SUFFIXES, Item, LeftOut, Row, Table, absolute
from keyhole.data.layout import find_layout, split_named
from keyhole.data.outputs import TABLE, output_folder, own_files, system_folder
from keyhole.errors import DataError
from keyhole.images.image import folder_suffixes, image_suffixes

FOLDER_TASK = "label"
"""Name of the one task that a folder of classes poses."""
_NOT_IMAGES = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
"""Files that systems leave in folders."""


def read_folder(path: Path, ignore: Mapping[Path, str] | None = None) -> Table:
    """Reads `path/CLASS/**/image`, `path/SPLIT/CLASS/**/image` or `path/CLASS/SPLIT/**/image`.

    `layout.find_layout` decides which of them it is.

    Args:
        path: the folder.
        ignore: folders in it that hold something else, such as masks, each with what it holds.

    Raises:
        DataError: no class folders, no images in them, or folders that are named like splits but not laid out as such.
    """
    path = absolute(path)
    files, left_out = list_images(path, ignore, generated=True)
    skipped = {left.name for left in left_out}
    places = [file.relative_to(path).parts[:-1] for file in files]
    layout = find_layout(path, places)
    table = Table((FOLDER_TASK,), [], left_out, [f"{path}: {note}" for note in layout.notes])
    filled = set()
    for file, folders in zip(files, places, strict=True):
        name = file.relative_to(path).as_posix()
        place = layout.place(folders)
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
    tops = {folders[0] for folders in places if folders}
    for outer in _folders(path):
        within = layout.kind == "split/class" and bool(split_named(outer.name))
        for folder in _folders(outer) if within else [outer] if outer.name not in tops else []:
            name = folder.relative_to(path).as_posix()
            if name not in filled and skipped.isdisjoint({f"{name}/", f"{outer.name}/"}):
                left_out.append(LeftOut(f"{name}/", "class folder without images"))
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
        if path.is_dir() and path.suffix.lower() not in folder_suffixes():
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


def list_images(
    path: Path, ignore: Mapping[Path, str] | None = None, generated: bool = False
) -> tuple[list[Path], list[LeftOut]]:
    """The images below a folder in order of name, and every other file with the reason it is not one.

    Where there is no image, files of stored features are taken in their place, one a slide. Links are followed, each
    folder once. The folder beside a MIRAX slide of the same name holds the slide's own data, and a folder `x.zarr` is
    itself an image. What keyhole wrote is left out, as are the folders of systems; `path` itself is always read.

    Args:
        path: the folder.
        ignore: absolute paths of folders below that are left out, each with the reason.
        generated: leave out images that keyhole generated, too.

    Raises:
        DataError: a folder that cannot be listed.
    """
    path = absolute(path)
    images: list[Path] = []
    stored: list[Path] = []
    left_out: list[LeftOut] = []
    for folder, names, others in _walk(path, ignore or {}, generated):
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
    """Keep one of the feature files that differ in suffix alone, or in CLAM's folder for it: the one that says most."""
    best: dict[Path, Path] = {}
    for file in sorted(stored, key=lambda file: (FEATURE_ORDER.index(file.suffix.lower()), file)):
        inside = [part for part in file.relative_to(path).parts if part not in FEATURE_FOLDERS]
        best.setdefault(Path(*inside).with_suffix(""), file)
    chosen = set(best.values())
    names = [file.relative_to(path).as_posix() for file in stored if file not in chosen]
    return list(chosen), [LeftOut(name, "features that an .h5 file holds too") for name in names]


def _walk(path: Path, ignore: Mapping[Path, str], generated: bool) -> Iterator[tuple[Path, list[str], list[LeftOut]]]:
    """Each folder with the sorted names of its files and of images that are folders, and what was not entered."""

    def unlistable(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be listed ({error.strerror}).") from error

    def shown(file: Path) -> str:
        return file.relative_to(path).as_posix()

    seen = {_identity(path)}
    for folder_name, folders, names in os.walk(path, onerror=unlistable, followlinks=True):
        folder, skipped = Path(folder_name), []
        whole = [
            name for name in folders if Path(name).suffix.lower() in folder_suffixes() and not name.startswith(".")
        ]
        folders[:] = [name for name in folders if name not in whole]
        if folder != path and (what := output_folder(folder, folders, [*names, *whole], _is_image, generated)):
            folders.clear()
            yield folder, [], [LeftOut(f"{shown(folder)}/", what)]
            continue
        for name in sorted(folders):
            identity = _identity(folder / name)
            if reason := system_folder(name) or ignore.get(folder / name, ""):
                pass
            elif f"{name}.mrxs" in names:
                reason = f"part of {name}.mrxs"
            elif identity in seen:
                reason = "link to a folder that is already read"
            else:
                seen.add(identity)
                continue
            folders.remove(name)
            skipped.append(LeftOut(f"{shown(folder / name)}/", reason))
        folders.sort()
        own = own_files(folder, names)
        skipped += [LeftOut(shown(folder / name), what) for name, what in sorted(own.items()) if what != TABLE]
        yield folder, sorted(name for name in [*names, *whole] if name not in own), skipped


def _is_image(file: Path) -> bool:
    return not _why_not(file)


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
    if suffix not in image_suffixes() | FEATURE_SUFFIXES:
        return f"not an image (suffix {suffix})" if suffix else "not an image (no suffix)"
    return ""


def _folders(path: Path) -> list[Path]:
    return sorted(
        entry
        for entry in path.iterdir()
        if entry.is_dir() and not system_folder(entry.name) and entry.suffix.lower() not in folder_suffixes()
    )
