"""The images below a folder, and the reason why each other file is not one.

The files in a folder show whether keyhole wrote it. If it also holds images of the user, only these are read.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from keyhole.data.companions import FEATURE_FOLDERS
from keyhole.data.item import FEATURE_SUFFIXES, LeftOut, absolute, exists
from keyhole.errors import DataError
from keyhole.images.image import folder_suffixes, image_suffixes

PREVIEW_FOLDER = "keyhole-check"  # default folder for the previews of `keyhole check`
PREVIEW_LIST = "previews.csv"  # file in a folder of previews that lists them
SYSTEM_FOLDERS: Mapping[str, str] = {
    "@eadir": "thumbnails of a Synology NAS",
    "@tmp": "system folder of a NAS",
    **dict.fromkeys(("@recycle", "#recycle"), "recycle bin of a NAS"),
    **dict.fromkeys(("@recently-snapshot", "#snapshot"), "snapshots of a NAS"),
    **dict.fromkeys(("$recycle.bin", "recycler"), "recycle bin of Windows"),
    "system volume information": "system folder of Windows",
    "lost+found": "system folder of Linux",
    **dict.fromkeys(("__macosx", "temporary items"), "system folder of macOS"),
    "network trash folder": "recycle bin of macOS",
    "__pycache__": "system folder of Python",
}
"""Folders that systems create, in lower case, with what they are. Hidden folders are left out too."""
SYSTEM_FILES = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
_RUN = {"config.yaml", "manifest.csv", "environment.json"}
_PREDICTION = {"prediction.json", "kept.csv", "kept.geojson", "scores.csv", "scores.npz"}
_OUTPUT = {
    PREVIEW_LIST: "previews of keyhole check",
    "metrics.json": "an evaluation of keyhole",
    "prediction.json": "a prediction of keyhole",
}
_GENERATED = ("boxes.csv", "nests.csv")
_FIRST_BYTES = {  # of single files of keyhole
    "left_out.csv": b"name,reason",
    "predictions.csv": b"image,",
    "unreadable.csv": b"image,",
    PREVIEW_LIST: b"image,preview",
    "keyhole.yaml": b"# Written by keyhole",
}
_NOT_A_PICTURE = "written by keyhole"
"""Reason for a file of `_FIRST_BYTES`; it is not listed as left out, since nobody expects it among the images."""


def list_images(
    path: Path, ignore: Mapping[Path, str] | None = None, generated: bool = False
) -> tuple[list[Path], list[LeftOut]]:
    """Return the images below a folder in order of name, and every other file with the reason why it is not one.

    Without images, files of stored features are returned, one per slide. Links are followed, each folder once. The
    absolute paths in `ignore` are left out with their reasons, as are output of keyhole and, with `generated`, images
    that it generated; `path` itself is always read.
    """
    path = absolute(path)
    images: list[Path] = []
    stored: list[Path] = []
    left_out: list[LeftOut] = []
    for folder, names, others in _walk(path, ignore or {}, generated):
        left_out += others
        for name in names:
            file = folder / name
            if reason := _why_not(file):
                shown = file.relative_to(path).as_posix().encode(errors="backslashreplace").decode()
                left_out.append(LeftOut(shown, reason))
            else:
                (stored if file.suffix.lower() in FEATURE_SUFFIXES else images).append(file)
    if images:
        left_out += [LeftOut(file.relative_to(path).as_posix(), "stored features beside images") for file in stored]
    else:
        images, doubles = _one_per_slide(path, stored)
        left_out += doubles
    return sorted(images, key=lambda file: file.relative_to(path).as_posix()), left_out


def expand_images(
    paths: Sequence[str | Path], missing: Literal["fail", "skip"] = "fail"
) -> tuple[list[Path], list[LeftOut]]:
    """Replace folders by the images below them in order of name.

    Returns:
        Absolute paths; and what is not used, by names that start as the given paths do.
    """
    found: dict[Path, None] = {}
    left_out: dict[Path, LeftOut] = {}
    for given, path in ((Path(path), absolute(path)) for path in paths):
        if path.is_dir() and path.suffix.lower() not in folder_suffixes():
            files, others = list_images(path)
            found.update(dict.fromkeys(files))
            for other in others:
                left_out.setdefault(path / other.name, LeftOut(str(given / other.name), other.reason))
            if not files:
                left_out.setdefault(path, LeftOut(str(given), "a folder without images"))
        elif exists(path):
            found[path] = None
        elif missing == "skip":
            left_out.setdefault(path, LeftOut(str(given), "no such file or folder"))
        else:
            raise DataError(f"{path}: no such file or folder. Give image files or folders of them.")
    if not found:
        nothing = ", ".join(map(str, paths)) or "nothing given"
        raise DataError(f"{nothing}: no images there. Give image files or folders.")
    return list(found), list(left_out.values())


def system_folder(name: str) -> str:
    """Return what a folder of this name is if a system creates it; else an empty text."""
    return "hidden folder" if name.startswith(".") else SYSTEM_FOLDERS.get(name.lower(), "")


def listed_previews(folder: Path) -> set[str]:
    """Return the names of the previews that `keyhole check` has listed in a folder."""
    file = folder / PREVIEW_LIST
    if not _is_ours(file):
        return set()
    with file.open(newline="", encoding="utf-8", errors="replace") as opened:
        return {row["preview"] for row in csv.DictReader(opened) if row.get("preview")}


def _walk(path: Path, ignore: Mapping[Path, str], generated: bool) -> Iterator[tuple[Path, list[str], list[LeftOut]]]:
    """Yield each folder with the sorted names of its files and folder images, and what was not entered."""

    def unlistable(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be listed ({error.strerror}).") from error

    def shown(file: Path) -> str:
        return file.relative_to(path).as_posix()

    def identity(folder: Path) -> tuple[int, int]:
        status = folder.stat()
        return status.st_dev, status.st_ino

    seen = {identity(path)}
    for folder_name, folders, names in os.walk(path, onerror=unlistable, followlinks=True):
        folder, skipped = Path(folder_name), []
        whole = [
            name for name in folders if Path(name).suffix.lower() in folder_suffixes() and not name.startswith(".")
        ]
        folders[:] = [name for name in folders if name not in whole]
        if folder != path and (what := _output_folder(folder, folders, [*names, *whole], generated)):
            folders.clear()
            yield folder, [], [LeftOut(f"{shown(folder)}/", what)]
            continue
        for name in sorted(folders):
            this = identity(folder / name)
            if reason := system_folder(name) or ignore.get(folder / name, ""):
                pass
            elif f"{name}.mrxs" in names:
                reason = f"part of {name}.mrxs"
            elif this in seen:
                reason = "link to a folder that is already read"
            else:
                seen.add(this)
                continue
            folders.remove(name)
            skipped.append(LeftOut(f"{shown(folder / name)}/", reason))
        folders.sort()
        own = _own_files(folder, names)
        skipped += [LeftOut(shown(folder / name), what) for name, what in sorted(own.items()) if what != _NOT_A_PICTURE]
        yield folder, sorted(name for name in [*names, *whole] if name not in own), skipped


def _why_not(file: Path) -> str:
    """Return why a file is not read as an image; an empty text if it is."""
    suffix = file.suffix.lower()
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return "name is not UTF-8; rename it"
    if file.name.lower() in SYSTEM_FILES:
        return "not an image"
    if file.name.startswith("."):
        return "hidden file"
    if suffix not in image_suffixes() and suffix not in FEATURE_SUFFIXES:
        return f"not an image (suffix {suffix})" if suffix else "not an image (no suffix)"
    return ""


def _one_per_slide(path: Path, stored: list[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Keep one of the feature files of each slide that differ only in suffix or in CLAM's folder: HDF5 before .pt."""
    best: dict[Path, Path] = {}
    for file in sorted(stored, key=lambda file: (FEATURE_SUFFIXES.index(file.suffix.lower()), file)):
        inside = [part for part in file.relative_to(path).parts if part not in FEATURE_FOLDERS]
        best.setdefault(Path(*inside).with_suffix(""), file)
    chosen = set(best.values())
    names = [file.relative_to(path).as_posix() for file in stored if file not in chosen]
    return list(chosen), [LeftOut(name, "features that an .h5 file holds too") for name in names]


def _own_files(folder: Path, names: Collection[str]) -> dict[str, str]:
    """Return the files of a folder that keyhole wrote, each with what it is."""
    present = set(names)
    own = {name: _NOT_A_PICTURE for name in _FIRST_BYTES if name in present and _is_ours(folder / name)}
    if "metrics.json" in present and "predictions.csv" in own:
        sheets = {name for name in present if name.startswith("contact_sheet")}
        own |= dict.fromkeys(sheets | {"metrics.json"}, "written by keyhole evaluate")
    if present >= {"prediction.json", "kept.csv"}:
        own |= dict.fromkeys(present & _PREDICTION, "written by keyhole predict")
    if PREVIEW_LIST in own:
        own |= dict.fromkeys(present & listed_previews(folder), "written by keyhole check")
    return own


def _output_folder(folder: Path, folders: Sequence[str], names: Collection[str], generated: bool) -> str:
    """Return what a folder with these `folders` and files is if keyhole wrote all of it; else an empty text."""
    present = set(names)
    if present >= _RUN:
        return "a run of keyhole"
    if generated and any((folder / "images" / name).is_file() for name in _GENERATED):
        return "a demonstration of keyhole"
    if generated and "manifest.csv" in present and any(name in present for name in _GENERATED):
        return "images that keyhole generated"
    own = _own_files(folder, names)
    images = {name for name in present if name not in own and not _why_not(folder / name)}
    if images:  # previews of versions that did not list them
        unlisted = folder.name.startswith(PREVIEW_FOLDER) and all(name.endswith(".png") for name in images)
        return "previews of keyhole check" if unlisted else ""
    for name, what in _OUTPUT.items():
        if name in own:
            return what
    if folders and all(_is_output(folder / name, generated) for name in folders):
        return "predictions of keyhole" if "predictions.csv" in own else "only output of keyhole"
    return ""


def _is_output(folder: Path, generated: bool) -> bool:
    """Return whether keyhole wrote a folder that is not listed yet; links are not followed."""
    try:
        with os.scandir(folder) as found:
            entries = {entry.name: entry.is_dir(follow_symlinks=False) for entry in found}
    except OSError:
        return False  # reported where the folder is entered
    folders = [name for name, is_folder in entries.items() if is_folder]
    return bool(_output_folder(folder, folders, entries.keys() - set(folders), generated))


def _is_ours(file: Path) -> bool:
    start = _FIRST_BYTES[file.name]
    try:
        with file.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError:
        return False
