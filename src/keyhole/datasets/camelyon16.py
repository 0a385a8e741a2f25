"""CAMELYON16: the official tree on disk -> a manifest, and what is missing, double or contradictory in it.

Facts, from the data set's own pages and papers (Litjens et al., GigaScience 2018; camelyon17.grand-challenge.org):
159 normal, 111 tumor and 129 test slides (80 normal, 49 tumor), 160 files of lesion outlines. It began as 160, 110 and
130: normal_086 turned out to hold a tumor and became tumor_111, and test_049, a duplicate, was taken out.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from keyhole.data.splits import Sample, make_splits
from keyhole.datasets.camelyon16_files import Found, Problem, find_features, find_files, slide_name
from keyhole.errors import DataError
from keyhole.patches.foreground.regions import read_regions
from keyhole.util.wording import listed

KINDS = ("normal", "tumor", "test")
NUMBERS = {"normal": range(1, 161), "tumor": range(1, 112), "test": range(1, 131)}
WITHDRAWN = {
    "normal_086": "it holds a tumor and was replaced by tumor_111",
    "test_049": "a duplicate, taken out by the organisers",
}
OFFICIAL = tuple(
    name for kind in KINDS for number in NUMBERS[kind] if (name := f"{kind}_{number:03d}") not in WITHDRAWN
)
"""The names of the 399 slides."""
NORMAL_WORDS = frozenset({"normal", "negative"})
TUMOR_WORDS = frozenset({"tumor", "tumour", "positive", "macro", "micro", "itc"})


@dataclass(frozen=True)
class Slide:
    """A row of the manifest.

    Attributes:
        name: `tumor_001`.
        image: the slide; where there are only its features, the path that it would have.
        label: `normal` or `tumor`.
        split: `train`, `val` or `test`.
        annotation: outlines of its lesions.
        mask: its foreground.
        features: its stored features, where asked for.
    """

    name: str
    image: Path
    label: str
    split: str
    annotation: Path | None = None
    mask: Path | None = None
    features: Path | None = None


@dataclass(frozen=True)
class Camelyon16:
    """What a copy of the data set holds.

    Attributes:
        slides: that can be used, in order of their names.
        problems: everything missing, double, broken or contradictory.
        notes: what a reader should know beside.
    """

    slides: tuple[Slide, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    def manifest(self, folder: Path) -> str:
        """The CSV, with paths relative to the folder that it will lie in."""
        optional = [name for name in ("mask", "features") if any(getattr(slide, name) for slide in self.slides)]
        rows = [["image", "label", "split", "annotation", *optional]]
        for slide in self.slides:
            paths = [slide.annotation, *(getattr(slide, name) for name in optional)]
            files = ["" if path is None else _relative(path, folder) for path in paths]
            rows.append([_relative(slide.image, folder), slide.label, slide.split, *files])
        return _csv(rows)

    def problem_table(self) -> str:
        """CSV of all problems: name, problem."""
        return _csv([["name", "problem"], *([problem.name, problem.what] for problem in self.problems)])

    def lines(self) -> list[str]:
        """The counts against the official ones, then each sort of problem with the first names."""
        counts = Counter((slide.name.partition("_")[0], slide.split, slide.label) for slide in self.slides)
        lines = []
        for kind in KINDS:
            of_kind = {key[1:]: count for key, count in counts.items() if key[0] == kind}
            official = sum(name.startswith(kind) for name in OFFICIAL)
            parts = [
                f"{count} {label if kind == 'test' else split}" for (split, label), count in sorted(of_kind.items())
            ]
            lines.append(f"{kind}: {sum(of_kind.values())} of {official} slides{_in_brackets(parts)}")
        annotated = [slide for slide in self.slides if slide.annotation]
        lines.append(f"lesion outlines: {len(annotated)} of 160")
        lines += self.notes
        sorts: dict[str, list[str]] = {}
        for problem in self.problems:
            sorts.setdefault(problem.what, []).append(problem.name)
        lines += [f"problem: {listed(names, 5)}: {what}" for what, names in sorts.items()]
        return lines


def read_camelyon16(
    root: Path,
    val: float = 0.15,
    seed: int = 0,
    features: Path | None = None,
    reference: Path | None = None,
) -> Camelyon16:
    """Reads a copy of the data set; no pixel is read.

    Args:
        root: its folder.
        val: share of the training slides held out to choose the best model, stratified by label.
        seed: of that draw.
        features: folder of feature files; slides that have one count as there, also without the slide itself.
        reference: CSV with the labels of the test slides, where it is not in `root` as reference.csv.

    Raises:
        DataError: no such folder, nothing usable in it, or two answers for the label of a test slide.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Give the one that holds training and testing, or images.")
    found = find_files(root)
    if features is not None:
        find_features(features, found)
    labels = _labels(found, reference)
    usable = _usable(found, labels)
    if not usable:
        raise DataError(
            f"{root}: no usable slide of CAMELYON16: expected files such as normal_001.tif, tumor_001.tif, or "
            f"test_001.tif with a reference.csv{_first(found.problems)}."
        )
    splits = _splits(found, usable, val, seed)
    slides = tuple(
        Slide(
            name=name,
            image=path,
            label=label,
            split=splits[name],
            annotation=_annotation(found, name, label),
            mask=found.masks.get(name),
            features=found.features.get(name),
        )
        for name, (path, label) in sorted(usable.items())
    )
    _compare(found, slides, labels)
    return Camelyon16(slides, tuple(found.problems), tuple(found.notes))


# --- labels and splits -----------------------------------------------------------------------------------------------


def _labels(found: Found, reference: Path | None) -> dict[str, str]:
    """Label by slide, of every slide that a reference names; the AWS copy's names the training slides too."""
    labels: dict[str, str] = {}
    where: dict[str, Path] = {}
    for path in found.references if reference is None else [reference]:
        for name, label in _read_reference(path, found):
            if labels.setdefault(name, label) != label:
                raise DataError(
                    f"{path}: {name} is {label}, but {labels[name]} in {where[name]}. "
                    "Keep the right file, or name it with --reference."
                )
            where.setdefault(name, path)
    if not where:
        found.notes.append("no reference.csv with labels, so no test slide can be used; give it with --reference")
    return labels


def _read_reference(path: Path, found: Found) -> Iterator[tuple[str, str]]:
    """(slide, label) of each row: with or without a header, names with or without .tif, labels in any column."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Expected a CSV with rows such as test_001,Tumor,IDC,Macro.")
    try:
        rows = list(csv.reader(io.StringIO(path.read_text("utf-8-sig"))))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no CSV in UTF-8. Expected rows such as test_001,Tumor,IDC,Macro.") from error
    for line, row in enumerate(rows, start=1):
        name = slide_name(Path(row[0].strip()).stem) if row else None
        words = {cell.strip().lower() for cell in row[1:]}
        normal, tumor = bool(words & NORMAL_WORDS), bool(words & TUMOR_WORDS)
        if name is not None and normal != tumor:
            yield name, "tumor" if tumor else "normal"
        elif any(cell.strip() for cell in row) and (name is not None or line > 1):  # else a header, or an empty line
            found.problem(
                f"{path}, line {line}", "expected a slide and its label, as test_001,Tumor,IDC,Macro; not used"
            )


def _usable(found: Found, labels: Mapping[str, str]) -> dict[str, tuple[Path, str]]:
    """Path and label of each slide that has a file, or features where these are asked for, and one label."""
    files = dict(found.slides)
    if found.features:
        for name in sorted(set(files) - set(found.features)):
            found.problem(name, "a slide without a feature file; not used")
        files = {name: files.get(name, path.with_name(f"{path.stem}.tif")) for name, path in found.features.items()}
    usable = {}
    for name, path in sorted(files.items()):
        kind = name.partition("_")[0]
        label = labels.get(name) if kind == "test" else kind
        if name in WITHDRAWN:
            found.problem(name, f"{WITHDRAWN[name]}; not used")
        elif label is None:
            found.problem(name, "a test slide without a row in reference.csv, so its label is not known; not used")
        elif labels.get(name, label) != label:
            found.problem(name, f"named {kind}, but the reference says {labels[name]}; not used")
        else:
            usable[name] = path, label
    return usable


def _splits(found: Found, usable: Mapping[str, tuple[Path, str]], val: float, seed: int) -> dict[str, str]:
    """Test as published; validation drawn from training. With too few to draw from, all are for training."""
    labels = {name: label for name, (_, label) in usable.items() if not name.startswith("test")}
    splits = dict.fromkeys(usable, "test") | dict.fromkeys(labels, "train")
    if labels and val > 0:
        subjects = [Sample(name, None, label, [("label", label)]) for name, label in labels.items()]
        try:
            splits |= zip(labels, make_splits(subjects, {"train": 1 - val, "val": val}, seed), strict=True)
        except DataError:
            found.problem("validation", f"{len(labels)} training slides are too few to hold some out; none is")
    return splits


# --- what does not fit together --------------------------------------------------------------------------------------


def _annotation(found: Found, name: str, label: str) -> Path | None:
    """The outlines of a slide, if they can be read and a lesion is to be expected."""
    path = found.annotations.get(name)
    if path is None:
        return None
    try:
        regions = read_regions(path)
    except DataError as error:
        found.problem(name, f"its lesion outlines are not used: {error}")
        return None
    if label == "normal":
        found.problem(name, f"a normal slide with lesion outlines, which are not used: {path}")
        return None
    if not regions:
        found.problem(name, f"its file of lesion outlines has none: {path}")
    return path


def _compare(found: Found, slides: Iterable[Slide], labels: Mapping[str, str]) -> None:
    """Against the official list, and slides against outlines and reference."""
    there = {slide.name for slide in slides}
    known = there | {name for problem in found.problems if (name := slide_name(Path(problem.name).stem))}
    for name in OFFICIAL:
        if name not in known:
            found.problem(name, "missing: an official slide that is not here")
    for name in sorted(there - set(OFFICIAL)):
        found.problem(name, "not an official slide; used all the same")
    for slide in slides:
        if slide.label == "tumor" and slide.name not in found.annotations:
            found.problem(slide.name, "a tumor slide without lesion outlines (.xml)")
    for name in sorted(set(found.annotations) - known):
        found.problem(found.annotations[name], "lesion outlines without a slide")
    for name in sorted(set(labels) - known - set(WITHDRAWN)):
        if name.startswith("test"):  # the AWS copy's reference names training slides too; missing ones are said above
            found.problem(name, "a row in reference.csv without a slide")
    trained = {slide.label for slide in slides if slide.split == "train"}
    if len(trained) < 2:
        found.problem("training", f"slides of {' and '.join(trained) or 'neither class'} only: nothing to tell apart")


def _first(problems: list[Problem]) -> str:
    return f"; the first problem: {problems[0].name}: {problems[0].what}" if problems else ""


def _in_brackets(parts: list[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _relative(path: Path, folder: Path) -> str:
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # on another drive
        return str(path.absolute())


def _csv(rows: Iterable[Iterable[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
