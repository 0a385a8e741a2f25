"""Find the files of CAMELYON16 by their names in any folder: those of the challenge or of the AWS copy."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from keyhole.data.companions import FEATURE_FOLDERS
from keyhole.data.item import FEATURE_SUFFIXES
from keyhole.errors import DataError

IGNORED_FOLDERS = frozenset({"masks", "mask", "evaluation_masks", "background_tissue", "__macosx"})
"""Folders with TIFFs of the same names that are not slides, in lower case."""
MASK_FOLDERS = frozenset({"foreground", "tissue", "tissue_masks"})
"""Folders with PNG or GeoJSON files of the foreground. In the official copies `masks` holds lesions."""
MASK_SUFFIXES = frozenset({".png", ".geojson"})
SLIDE_SUFFIXES = frozenset({".tif", ".tiff"})
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NAME = re.compile(r"(normal|tumor|test)_?(\d{1,3})", re.IGNORECASE)


class Problem(NamedTuple):
    """A file or slide, and what is wrong with it."""

    name: str
    what: str


@dataclass
class Found:
    """Files by the name of their slide, and the problems found so far."""

    slides: dict[str, Path] = field(default_factory=dict)
    annotations: dict[str, Path] = field(default_factory=dict)
    masks: dict[str, Path] = field(default_factory=dict)
    features: dict[str, Path] = field(default_factory=dict)
    references: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, name: str | Path, what: str) -> None:
        self.problems.append(Problem(str(name), what))

    def add(self, to: dict[str, Path], name: str, path: Path) -> None:
        if name in to:
            self.problem(path, f"there is another file of {name}, which is used instead: {to[name]}")
        else:
            to[name] = path


def find_files(root: Path) -> Found:
    """Find slides, outlines, masks and references below a folder. Four bytes of every slide are read."""
    found = Found()
    for path in _files(root, found):
        suffix, folder = path.suffix.lower(), path.parent.name.lower()
        name = slide_name(path.stem)
        if path.name.lower() == "reference.csv":
            found.references.append(path)
        elif suffix == ".zip" and "annotation" in path.stem.lower():
            try:
                with zipfile.ZipFile(path) as archive:
                    outlines = sum(file.lower().endswith(".xml") for file in archive.namelist())
            except (OSError, zipfile.BadZipFile) as error:
                found.problem(path, f"cannot be read as a ZIP archive ({error}). Download it again")
                continue
            found.notes.append(f"{path}: {outlines} lesion outlines are still zipped; unzip it, and they are found")
        elif name is None:
            continue
        elif suffix in MASK_SUFFIXES and folder in MASK_FOLDERS:
            found.add(found.masks, name, path)
        elif suffix == ".xml":
            found.add(found.annotations, name, path)
        elif suffix in SLIDE_SUFFIXES and (fault := _fault(path, name)):
            found.problem(path, fault)
        elif suffix in SLIDE_SUFFIXES:
            found.add(found.slides, name, path)
    return found


def _files(root: Path, found: Found) -> Iterator[Path]:
    seen: set[str] = set()

    def cannot(error: OSError) -> None:
        found.problem(error.filename, f"a folder that cannot be listed ({error.strerror}); not used")

    for folder, folders, names in os.walk(root, onerror=cannot, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if name.lower() not in IGNORED_FOLDERS and name[0] != ".")
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def slide_name(text: str) -> str | None:
    """Return `tumor_001` for `Tumor_001`; None for a text that does not name a slide, such as `tumor_001_mask`."""
    match = _NAME.fullmatch(text)
    return None if match is None else f"{match[1].lower()}_{int(match[2]):03d}"


def _fault(path: Path, name: str) -> str | None:
    folder = path.parent.name.lower()
    if folder in ("normal", "tumor") and not name.startswith(folder):
        return f"its name says {name.partition('_')[0]}, its folder {folder}; not used"
    if not path.is_file():
        return "a link that leads nowhere, or not a regular file; not used"
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        return f"cannot be read ({error.strerror or error}); not used"
    if not start:
        return "an empty file; not used. Download it again"
    return None if start in TIFF_STARTS else "not a TIFF; not used. Download it again"


def find_features(folder: Path, found: Found) -> None:
    """Find the feature files of the slides in a folder or in CLAM's subfolders."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give the one with the feature files (.h5, .pt) of the slides.")
    for place in (folder / name for name in FEATURE_FOLDERS):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            name = slide_name(path.stem)
            if name is None or path.suffix.lower() not in FEATURE_SUFFIXES:
                continue
            if name not in found.features or path.suffix == found.features[name].suffix:  # .h5 goes over .pt
                found.add(found.features, name, path)
        if found.features:
            return
    raise DataError(
        f"{folder}: no feature file of a slide in it. Expected such as tumor_001.h5 or tumor_001.pt, here or in "
        "h5_files or pt_files."
    )
