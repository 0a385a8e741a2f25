"""What is looked at: the images and predictions of a run, of a folder of predictions, or image files alone.

Only tables are read here. Images and scores are opened by `worker`, in another process.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keyhole.data.hashes import stored_hashes
from keyhole.data.item import SPLITS, DataTable, Item, Row, absolute
from keyhole.data.listing import expand_images
from keyhole.data.rows import moved_to
from keyhole.errors import DataError, RunError
from keyhole.util.wording import counted

PREDICTED, TRUE, PROBABILITY = ".predicted", ".true", ".probability."
TABLE = "predictions.csv"
WITHOUT_SCORES = "its scores are not stored"


@dataclass(frozen=True)
class Answer:
    """What was predicted for one task of one image.

    Attributes:
        predicted: The label, or the number of a regression.
        true: The label that the data state; "" if they do not.
        probability: By class; empty for a regression.
    """

    predicted: str
    true: str = ""
    probability: Mapping[str, float] = field(default_factory=dict)

    def confidence(self) -> float | None:
        """Return the probability of the answer: of its class, or of the least certain of several labels."""
        if not self.probability:
            return None
        if self.predicted in self.probability:
            return self.probability[self.predicted]
        return min(max(share, 1 - share) for share in self.probability.values())

    def error(self) -> float | None:
        """Return how wrong the answer is: 0 or 1, or the distance of numbers; None if that is not known."""
        if not self.true:
            return None
        if self.probability:
            return float(set(self.true.split("|")) != set(self.predicted.split("|")))
        try:
            return abs(float(self.true) - float(self.predicted))
        except ValueError:
            return None

    def to_json(self) -> dict[str, Any]:
        return {
            "predicted": self.predicted,
            "true": self.true,
            "probability": dict(self.probability),
            "confidence": self.confidence(),
            "error": self.error(),
        }


@dataclass(frozen=True)
class Entry:
    """One image.

    Attributes:
        name: As the user wrote it.
        path: The file.
        split: Split of a run; "" where there are none.
        answers: By task.
        scores: File with the score of every patch, if there is one.
        bytes: Size of the file when the run began, if it was recorded.
    """

    name: str
    path: Path
    split: str = ""
    answers: Mapping[str, Answer] = field(default_factory=dict)
    scores: Path | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Collection:
    """Everything that one server shows; images are known to browsers by their index in it.

    Attributes:
        title: What was opened, as the user wrote it.
        entries: The images.
        notes: What a reader should know, such as how scores can be had.
    """

    title: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> dict[str, list[str]]:
        """The classes of each task, as far as the predictions name them."""
        tasks: dict[str, list[str]] = {}
        for entry in self.entries:
            for task, answer in entry.answers.items():
                tasks.setdefault(task, list(answer.probability))
        return tasks

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "notes": list(self.notes),
            "tasks": [{"name": name, "classes": classes} for name, classes in self.tasks.items()],
            "images": [
                {
                    "name": entry.name,
                    "split": entry.split,
                    "scores": entry.scores is not None,
                    "answers": {task: answer.to_json() for task, answer in entry.answers.items()},
                }
                for entry in self.entries
            ],
        }


def open_collection(paths: Sequence[Path], root: Path | None = None) -> Collection:
    """Return what a command line names: one run, one folder of predictions, or images and folders of them.

    Args:
        paths: As the user gave them; at least one.
        root: Folder to which the images of the predictions were moved.

    Raises:
        DataError: There are no images, or a path does not exist.
        RunError: A run without predictions, or a damaged table.
    """
    tables = [path for path in paths if (path / TABLE).is_file() or _is_run(path)]
    if tables and len(paths) > 1:
        raise DataError(f"{tables[0]}: a run or a folder of predictions is shown alone. Give it without other paths.")
    if not tables:
        if root is not None:
            raise DataError("--root is for the images of a run or of predictions. Leave it out for image files.")
        files, left_out = expand_images(paths)
        notes = (f"{counted(len(left_out), 'file', 'files')} not shown: no image.",) if left_out else ()
        return Collection(", ".join(map(str, paths)), _named(files), notes)
    (path,) = paths
    collection = _of_run(path) if _is_run(path) else Collection(str(path), tuple(_rows(path / TABLE, path)))
    if not collection.entries:
        raise RunError(f"{path}: holds no predictions. Predict again: keyhole predict RUN IMAGES... --out DIR")
    return collection if root is None else replace(collection, entries=_moved(path, collection.entries, root))


def _is_run(path: Path) -> bool:
    return (path / "manifest.csv").is_file() and (path / "config.yaml").is_file()


def _named(files: Sequence[Path]) -> tuple[Entry, ...]:
    """Return image files under the part of their path that tells them apart."""
    folder = files[0].parent
    while not all(file.is_relative_to(folder) for file in files):
        folder = folder.parent
    return tuple(Entry(file.relative_to(folder).as_posix(), file) for file in files)


def _of_run(run: Path) -> Collection:
    """Return the predictions of a run, those of an evaluation first, since they have the score of every patch."""
    sizes = {name: stored.bytes for name, stored in stored_hashes(run / "manifest.csv").items()}
    entries: list[Entry] = []
    without: list[str] = []
    for split in reversed(SPLITS):
        evaluated = run / "evaluation" / split
        if (evaluated / TABLE).is_file():
            found = list(_rows(evaluated / TABLE, evaluated))
        elif (table := run / "predictions" / f"{split}.csv").is_file():
            found = list(_rows(table, None))
        else:
            continue
        entries += [replace(entry, split=split, bytes=sizes.get(entry.name)) for entry in found]
        without += [split] if not any(entry.scores for entry in found) else []
    if not entries:
        raise RunError(f"{run}: no predictions in it yet. Make them: keyhole evaluate {run}")
    commands = ", ".join(f"keyhole evaluate {run} --split {split}" for split in without)
    notes = (f"Scores of patches are stored by: {commands}",) if without else ()
    return Collection(str(run), tuple(entries), notes)


def _rows(table: Path, folder: Path | None) -> Iterable[Entry]:
    """Yield the images of predictions.csv; their scores are looked for in `folder` and nowhere else."""
    remedy = "Write it again with keyhole predict or keyhole evaluate."
    try:
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.DictReader(file)
            header = list(rows.fieldnames or ())
            if not {"image", "path"} <= set(header):
                raise RunError(f"{table}: has no columns image and path. {remedy}")
            tasks = [name.removesuffix(PREDICTED) for name in header if name.endswith(PREDICTED)]
            columns = {
                task: {name.removeprefix(start): name for name in header if name.startswith(start)}
                for task in tasks
                if (start := f"{task}{PROBABILITY}")
            }
            for number, row in enumerate(rows, start=1):
                answers = {
                    task: Answer(
                        row[f"{task}{PREDICTED}"],
                        row.get(f"{task}{TRUE}") or "",
                        {name: float(row[column]) for name, column in columns[task].items()},
                    )
                    for task in tasks
                }
                scores = _scores_file(folder, row, number)
                yield Entry(row["image"], absolute(Path(row["path"])), answers=answers, scores=scores)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise RunError(f"{table}: cannot be read ({error}). {remedy}") from error


def _scores_file(folder: Path | None, row: Mapping[str, str], number: int) -> Path | None:
    """Return the scores of a row if they are there, also with links followed: a table may come from anywhere."""
    if folder is None:
        return None
    name = Path("scores", f"{number}.npz") if "folder" not in row else Path(row["folder"], "scores.npz")
    file = (folder / name).resolve()
    return file if file.is_relative_to(folder.resolve()) and file.is_file() else None


def _moved(path: Path, entries: Sequence[Entry], root: Path) -> tuple[Entry, ...]:
    table = DataTable((), [Row(Item(entry.name, entry.path, {}), entry.name) for entry in entries])
    rows = moved_to(path, table, root).rows
    return tuple(replace(entry, path=row.item.image) for entry, row in zip(entries, rows, strict=True))
