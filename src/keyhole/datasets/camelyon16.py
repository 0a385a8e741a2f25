"""CAMELYON16: the manifest of a copy on disk, and what is missing, duplicate or contradictory in the copy.

159 normal, 111 tumor and 129 test slides, 160 files of lesion outlines (Litjens et al., GigaScience 2018).
"""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from keyhole.data.companions import FEATURE_FOLDERS
from keyhole.data.item import FEATURE_SUFFIXES, Item
from keyhole.data.splits import Sample, make_splits
from keyhole.errors import DataError
from keyhole.patches.foreground.region_files import read_regions
from keyhole.util.files import csv_text, relative_path
from keyhole.util.wording import listed

NUMBERS = {"normal": range(1, 161), "tumor": range(1, 112), "test": range(1, 131)}
WITHDRAWN = {
    "normal_086": "it holds a tumor and was replaced by tumor_111",
    "test_049": "a duplicate, taken out by the organisers",
}
OFFICIAL = [
    name for prefix, numbers in NUMBERS.items() for k in numbers if (name := f"{prefix}_{k:03d}") not in WITHDRAWN
]
"""The names of the 399 slides."""
NORMAL_WORDS = frozenset({"normal", "negative"})
TUMOR_WORDS = frozenset({"tumor", "tumour", "positive", "macro", "micro", "itc"})
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


@dataclass(frozen=True)
class Camelyon16:
    """The slides of a copy that can be used, in order of their names, and all problems.

    The label is `normal` or `tumor`. A slide that has only features has the `image` path where it would be.
    """

    slides: tuple[Item, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    def manifest(self, folder: Path) -> str:
        """Return the CSV, with paths relative to the folder that it will be in."""
        optional = [name for name in ("mask", "features") if any(getattr(slide, name) for slide in self.slides)]
        rows = [["image", "label", "split", "annotation", *optional]]
        for slide in self.slides:
            image, *files = (
                relative_path(path, folder) if (path := getattr(slide, name)) else ""
                for name in ("image", "annotation", *optional)
            )
            rows.append([image, slide.labels["label"], slide.split, *files])
        return csv_text(rows)

    def problem_table(self) -> str:
        """Return a CSV of all problems: name, problem."""
        return csv_text([("name", "problem"), *self.problems])

    def lines(self) -> list[str]:
        """Return the counts against the official ones, then each kind of problem with the first names."""
        lines = []
        for prefix in NUMBERS:
            slides = [slide for slide in self.slides if slide.name.startswith(prefix)]
            official = sum(name.startswith(prefix) for name in OFFICIAL)
            counts = Counter(slide.labels["label"] if prefix == "test" else slide.split for slide in slides)
            parts = ", ".join(f"{counts[part]} {part}" for part in ("train", "val", "normal", "tumor") if counts[part])
            lines.append(f"{prefix}: {len(slides)} of {official} slides{f' ({parts})' if parts else ''}")
        lines.append(f"lesion outlines: {sum(slide.annotation is not None for slide in self.slides)} of 160")
        lines += self.notes
        by_problem: dict[str, list[str]] = {}
        for name, what in self.problems:
            by_problem.setdefault(what, []).append(name)
        return [*lines, *(f"problem: {listed(names, 5)}: {what}" for what, names in by_problem.items())]


def read_camelyon16(
    root: Path, val: float = 0.15, seed: int = 0, features: Path | None = None, reference: Path | None = None
) -> Camelyon16:
    """Read a copy of the data set, without its pixels.

    Args:
        root: its folder.
        val: share of the training slides that choose the best model, stratified by label.
        seed: seed of that draw.
        features: folder of feature files; only slides that have one are used, even without the slide itself.
        reference: CSV with the labels of the test slides; by default every `reference.csv` below `root`.

    Returns:
        The slides that can be used, and all problems.

    Raises:
        DataError: the folder does not exist or holds nothing usable, or a test slide has two labels.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Give the one that holds training and testing, or images.")
    found = _Found()
    found.find_files(root)
    if features is not None:
        found.find_features(features)
    labels = found.read_labels(reference)
    slides = found.usable(labels)
    if not slides:
        first = f"; the first problem: {found.problems[0].name}: {found.problems[0].what}" if found.problems else ""
        raise DataError(
            f"{root}: no usable slide of CAMELYON16: expected files such as normal_001.tif, tumor_001.tif, or "
            f"test_001.tif with a reference.csv{first}."
        )
    slides = [replace(slide, annotation=found.annotation(slide)) for slide in found.with_splits(slides, val, seed)]
    found.compare(slides, labels)
    return Camelyon16(tuple(slides), tuple(found.problems), tuple(found.notes))


@dataclass
class _Found:
    """Files by the name of their slide, and the problems found so far; the methods in the order of their calls."""

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

    def find_files(self, root: Path) -> None:
        """Find slides, outlines, masks and references below a folder. Four bytes of every slide are read."""
        for path in self._walk(root):
            suffix, folder = path.suffix.lower(), path.parent.name.lower()
            name = slide_name(path.stem)
            if path.name.lower() == "reference.csv":
                self.references.append(path)
            elif suffix == ".zip" and "annotation" in path.stem.lower():
                try:
                    with zipfile.ZipFile(path) as archive:
                        outlines = sum(file.lower().endswith(".xml") for file in archive.namelist())
                except (OSError, zipfile.BadZipFile) as error:
                    self.problem(path, f"cannot be read as a ZIP archive ({error}). Download it again")
                    continue
                self.notes.append(f"{path}: {outlines} lesion outlines are still zipped; unzip it, and they are found")
            elif name is None:
                continue
            elif suffix in MASK_SUFFIXES and folder in MASK_FOLDERS:
                self.add(self.masks, name, path)
            elif suffix == ".xml":
                self.add(self.annotations, name, path)
            elif suffix in SLIDE_SUFFIXES and (fault := _fault(path, name)):
                self.problem(path, fault)
            elif suffix in SLIDE_SUFFIXES:
                self.add(self.slides, name, path)

    def _walk(self, root: Path) -> Iterator[Path]:
        """Yield the files below a folder in order; links are followed, each folder once."""
        seen: set[str] = set()

        def cannot(error: OSError) -> None:
            self.problem(error.filename, f"a folder that cannot be listed ({error.strerror}); not used")

        for folder, folders, names in os.walk(root, onerror=cannot, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if name.lower() not in IGNORED_FOLDERS and name[0] != ".")
            yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")

    def find_features(self, folder: Path) -> None:
        """Find the feature files of the slides in a folder or in CLAM's subfolders."""
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder. Give the one with the feature files (.h5, .pt) of the slides.")
        for place in (folder / name for name in FEATURE_FOLDERS):
            for path in sorted(place.iterdir()) if place.is_dir() else ():
                name = slide_name(path.stem)
                if name is None or path.suffix.lower() not in FEATURE_SUFFIXES:
                    continue
                if name not in self.features or path.suffix == self.features[name].suffix:  # .h5 goes over .pt
                    self.add(self.features, name, path)
            if self.features:
                return
        raise DataError(
            f"{folder}: no feature file of a slide in it. Expected such as tumor_001.h5 or tumor_001.pt, here or in "
            "h5_files or pt_files."
        )

    def read_labels(self, reference: Path | None) -> dict[str, str]:
        """Return the label of every slide that a reference names; the AWS copy also names the training slides."""
        labels: dict[str, tuple[str, Path]] = {}
        for path in self.references if reference is None else [reference]:
            for name, label in self._read_reference(path):
                before, where = labels.setdefault(name, (label, path))
                if before != label:
                    raise DataError(
                        f"{path}: {name} is {label}, but {before} in {where}. "
                        "Keep the right file, or name it with --reference."
                    )
        if not labels:
            self.notes.append("no reference.csv with labels, so no test slide can be used; give it with --reference")
        return {name: label for name, (label, _) in labels.items()}

    def _read_reference(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yield (slide, label) of each row; a header and `.tif` are optional, and the label may be in any column."""
        if not path.is_file():
            raise DataError(f"{path}: no such file. Expected a CSV with rows such as test_001,Tumor,IDC,Macro.")
        try:
            rows = list(csv.reader(io.StringIO(path.read_text("utf-8-sig"))))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a CSV in UTF-8. Expected rows such as test_001,Tumor,IDC,Macro.") from error
        for line, row in enumerate(rows, start=1):
            name = slide_name(Path(row[0].strip()).stem) if row else None
            words = {cell.strip().lower() for cell in row[1:]}
            normal, tumor = bool(words & NORMAL_WORDS), bool(words & TUMOR_WORDS)
            if name is not None and normal != tumor:
                yield name, "tumor" if tumor else "normal"
            elif any(cell.strip() for cell in row) and (name is not None or line > 1):  # line 1 may be a header
                what = "expected a slide and its label, as test_001,Tumor,IDC,Macro; not used"
                self.problem(f"{path}, line {line}", what)

    def usable(self, labels: Mapping[str, str]) -> list[Item]:
        """Return the slides with a label in order of name; those without features are not used if there are any."""
        files = dict(self.slides)
        if self.features:
            for name in sorted(set(files) - set(self.features)):
                self.problem(name, "a slide without a feature file; not used")
            files = {name: files.get(name, path.with_name(f"{path.stem}.tif")) for name, path in self.features.items()}
        usable = []
        for name, path in sorted(files.items()):
            prefix = name.partition("_")[0]
            label = labels.get(name) if prefix == "test" else prefix
            if name in WITHDRAWN:
                self.problem(name, f"{WITHDRAWN[name]}; not used")
            elif label is None:
                self.problem(name, "a test slide without a row in reference.csv, so its label is not known; not used")
            elif labels.get(name, label) != label:
                self.problem(name, f"named {prefix}, but the reference says {labels[name]}; not used")
            else:
                mask, features = self.masks.get(name), self.features.get(name)
                usable.append(Item(name, path, {"label": label}, mask=mask, features=features))
        return usable

    def with_splits(self, slides: list[Item], val: float, seed: int) -> list[Item]:
        """Take test as published and draw validation from training; with too few slides, all are for training."""
        training = {slide.name: slide.labels["label"] for slide in slides if not slide.name.startswith("test")}
        splits = {slide.name: "train" if slide.name in training else "test" for slide in slides}
        if training and val > 0:
            samples = [Sample(name, None, label, [("label", label)]) for name, label in training.items()]
            try:
                splits |= zip(training, make_splits(samples, {"train": 1 - val, "val": val}, seed), strict=True)
            except DataError:
                self.problem("validation", f"all {len(training)} training slides train: too few to hold some out")
        return [replace(slide, split=splits[slide.name]) for slide in slides]

    def annotation(self, slide: Item) -> Path | None:
        """Return the lesion outlines of a slide if they can be read and do not contradict its label."""
        path = self.annotations.get(slide.name)
        if path is None:
            return None
        try:
            regions = read_regions(path)
        except DataError as error:
            self.problem(slide.name, f"its lesion outlines are not used: {error}")
            return None
        if slide.labels["label"] == "normal":
            self.problem(slide.name, f"a normal slide with lesion outlines, which are not used: {path}")
            return None
        if not regions:
            self.problem(slide.name, f"its file of lesion outlines has none: {path}")
        return path

    def compare(self, slides: list[Item], labels: Mapping[str, str]) -> None:
        """Note what differs from the official data set."""
        names = {slide.name for slide in slides}
        known = names | {name for problem in self.problems if (name := slide_name(Path(problem.name).stem))}
        for name in OFFICIAL:
            if name not in known:
                self.problem(name, "missing: an official slide that is not here")
        for name in sorted(names - set(OFFICIAL)):
            self.problem(name, "not an official slide; still used")
        for slide in slides:
            if slide.labels["label"] == "tumor" and slide.name not in self.annotations:
                self.problem(slide.name, "a tumor slide without lesion outlines (.xml)")
        for name in sorted(set(self.annotations) - known):
            self.problem(self.annotations[name], "lesion outlines without a slide")
        for name in sorted(set(labels) - known - set(WITHDRAWN)):
            if name.startswith("test"):  # training slides that are missing have been reported above
                self.problem(name, "a row in reference.csv without a slide")
        trained = {slide.labels["label"] for slide in slides if slide.split == "train"}
        if len(trained) < 2:
            only = " and ".join(trained) or "neither class"
            self.problem("training", f"slides of {only} only: nothing to tell apart")


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
