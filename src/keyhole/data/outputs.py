"""What keyhole itself and operating systems leave in folders of images, so that it is not taken for images.

keyhole writes its results where a user asks, often beside or among the images. Its folders are recognised by what is in
them, not by their names; a folder that also holds images of the user's is read, without the files of keyhole in it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from keyhole.errors import OutputError

PREVIEWS = "keyhole-check"
"""Folder for the previews of `keyhole check` where none is named."""
PREVIEW_LIST = "previews.csv"
"""File in a folder of previews that names them."""
SYSTEM_FOLDERS: Mapping[str, str] = {
    "@eadir": "thumbnails of a Synology NAS",
    "@tmp": "system folder of a NAS",
    "@recycle": "recycle bin of a NAS",
    "@recently-snapshot": "snapshots of a NAS",
    "#recycle": "recycle bin of a NAS",
    "#snapshot": "snapshots of a NAS",
    "$recycle.bin": "recycle bin of Windows",
    "recycler": "recycle bin of Windows",
    "system volume information": "system folder of Windows",
    "lost+found": "system folder of Linux",
    "__macosx": "system folder of macOS",
    "network trash folder": "recycle bin of macOS",
    "temporary items": "system folder of macOS",
    "__pycache__": "system folder of Python",
}
"""Folders that systems make, in lower case, and what they are. Hidden folders are left out too."""

_RUN = {"config.yaml", "manifest.csv", "environment.json"}
_PREDICTION = {"prediction.json", "kept.csv", "kept.geojson", "scores.csv", "scores.npz"}
_STARTS = {
    "left_out.csv": b"name,reason",
    "predictions.csv": b"image,",
    "unreadable.csv": b"image,",
    PREVIEW_LIST: b"image,preview",
    "keyhole.yaml": b"# Written by keyhole",
}
"""Single files of keyhole, and how they start."""
TABLE = "written by keyhole"
"""What such a file is. None is a picture, so that nobody misses it: it is left out without a word."""
_GENERATED = ("boxes.csv", "nests.csv")
_SHEET = "contact_sheet"


def system_folder(name: str) -> str:
    """What a folder of this name is where a system made it; empty otherwise."""
    return "hidden folder" if name.startswith(".") else SYSTEM_FOLDERS.get(name.lower(), "")


def own_files(folder: Path, names: Collection[str]) -> dict[str, str]:
    """The files of a folder that keyhole wrote, with what each is."""
    there = set(names)
    own = {name: TABLE for name, start in _STARTS.items() if name in there and _starts(folder / name, start)}
    if "metrics.json" in there and "predictions.csv" in own:
        own |= {
            name: "written by keyhole evaluate" for name in there if name.startswith(_SHEET) or name == "metrics.json"
        }
    if there >= {"prediction.json", "kept.csv"}:
        own |= dict.fromkeys(there & _PREDICTION, "written by keyhole predict")
    if PREVIEW_LIST in own:
        own |= dict.fromkeys(there & _listed_previews(folder / PREVIEW_LIST), "written by keyhole check")
    return own


def output_folder(
    folder: Path, folders: Sequence[str], names: Collection[str], is_image: Callable[[Path], bool], generated: bool
) -> str:
    """What a folder is where keyhole wrote all of it; empty where it is the user's.

    Args:
        folder: the folder.
        folders: the names of the folders in it.
        names: the names of the files in it.
        is_image: whether a file would be read as an image.
        generated: whether data sets that keyhole generated count as output.
    """
    there = set(names)
    if there >= _RUN:
        return "a run of keyhole"
    if generated and any((folder / "images" / name).is_file() for name in _GENERATED):
        return "a demonstration of keyhole"
    if generated and "manifest.csv" in there and any(name in there for name in _GENERATED):
        return "images that keyhole generated"
    own = own_files(folder, names)
    images = {name for name in there if name not in own and is_image(folder / name)}
    if images:
        old = folder.name.startswith(PREVIEWS) and all(name.endswith(".png") for name in images)
        return "previews of keyhole check" if old else ""
    if PREVIEW_LIST in own:
        return "previews of keyhole check"
    if "metrics.json" in own:
        return "an evaluation of keyhole"
    if "prediction.json" in own:
        return "a prediction of keyhole"
    if folders and all(_output_below(folder / name, is_image, generated) for name in folders):
        return "predictions of keyhole" if "predictions.csv" in own else "only output of keyhole"
    return ""


def _output_below(folder: Path, is_image: Callable[[Path], bool], generated: bool) -> str:
    """`output_folder` of a folder that is yet to be listed; links are not followed here."""
    folders: list[str] = []
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (folders if entry.is_dir(follow_symlinks=False) else names).append(entry.name)
    except OSError:
        return ""  # told where the folder is entered
    return output_folder(folder, folders, names, is_image, generated)


def _starts(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError:
        return False  # not a file that can be read, so that nothing is known of it


def clear_previews(folder: Path, pictures: Collection[str]) -> int:
    """Removes the previews of an earlier call, so that none of them is taken for one of this call.

    Args:
        folder: where the previews go.
        pictures: the file names that this call will write.

    Returns:
        how many were removed that this call does not write again.

    Raises:
        OutputError: a file would be overwritten that is not a preview.
    """
    listing = folder / PREVIEW_LIST
    found = _listed_previews(listing) if _starts(listing, _STARTS[PREVIEW_LIST]) else set()
    listed = {name for name in found if Path(name).name == name and name.endswith(".png")}
    for name in pictures:
        if name not in listed and os.path.lexists(folder / name):
            raise OutputError(f"{folder / name}: not a preview of keyhole check. Choose another folder: --previews DIR")
    there = [name for name in listed if (folder / name).is_file()]
    for name in there:
        (folder / name).unlink()
    if found:
        listing.unlink(missing_ok=True)
    return len(set(there) - set(pictures))


def _listed_previews(file: Path) -> set[str]:
    with file.open(newline="", encoding="utf-8", errors="replace") as opened:
        return {row["preview"] for row in csv.DictReader(opened) if row.get("preview")}
