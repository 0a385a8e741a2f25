"""predictions.csv with one row per image, and the folder of each image beside it."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keyhole.data.item import Item
from keyhole.errors import OutputError
from keyhole.report.files import OWN, PATCHES, remove_files, write_prediction
from keyhole.report.prediction import Prediction
from keyhole.tasks.kinds import Task
from keyhole.tasks.learning import Learning, judge_task, unevenness
from keyhole.util.files import atomic_file, csv_text, encoded, remove_unfinished, writable_folder
from keyhole.util.wording import distinct

RUN_FILES = ("last.safetensors", "model.safetensors")
"""Files of a run or of a model, among which no predictions are written."""
RUN_FOLDERS = ("predictions", "evaluation")
"""Folders in a run, in which none are written either."""
PREDICTIONS, LEFT_OUT = "predictions.csv", "left_out.csv"
TABLES = {PREDICTIONS: ("image", "path"), LEFT_OUT: ("name", "reason")}
"""Tables of a folder of predictions, with columns that they have."""
TABLE_ENCODING = "utf-8-sig"
"""Excel puts a byte order mark before what it saves."""


@dataclass(frozen=True)
class TableRow:
    """The row of one image in predictions.csv, and what judging the table needs."""

    header: list[str]
    cells: list[str]
    unreadable: int  # number of patches
    probability: dict[str, list[float]] = field(default_factory=dict)  # by task, the numbers of `Task.probability`
    uneven: dict[str, float] = field(default_factory=dict)  # by task, how far the attention is from equal


def table_row(
    prediction: Prediction,
    known: Mapping[str, str] | None = None,
    folder: str | None = None,
    group: str | None = None,
) -> TableRow:
    """Return the row of a prediction: image, path, width, height, then TASK.predicted and TASK.probability.CLASS.

    The `known` labels add a column TASK.true; a `folder` and a `group` add columns. A number reads back as the same
    float64.
    """
    more = {name: cell for name, cell in (("folder", folder), ("group", group)) if cell is not None}
    cells = [prediction.name, str(prediction.image), *more.values(), *map(str, prediction.size)]
    for task in prediction.tasks:
        cells += [] if known is None else [known.get(task.name, "")]
        said = prediction.probability[task.name]
        cells += [task.table_cell(prediction.label[task.name], said)]
        cells += [repr(said[name]) for name in task.classes]
    return TableRow(
        table_header(prediction.tasks, known is not None, tuple(more)),
        cells,
        0 if prediction.unreadable is None else len(prediction.unreadable),
        {task: list(said.values()) for task, said in prediction.probability.items()},
        unevenness(prediction.kept.attention),
    )


def table_header(tasks: Sequence[Task], known: bool, more: Sequence[str] = ()) -> list[str]:
    """Return the columns of predictions.csv, with TASK.true where labels are `known`, and with `more` columns."""
    header = ["image", "path", *more, "width", "height"]
    for task in tasks:
        header += [f"{task.name}.true"] if known else []
        header += [f"{task.name}.predicted", *(f"{task.name}.probability.{name}" for name in task.classes)]
    return distinct(header)


def labelled_row(prediction: Prediction, item: Item, grouped: bool) -> TableRow:
    """Return the row of a prediction with the labels of its image, and with its group where images are `grouped`."""
    return table_row(prediction, item.labels, group=(item.group or "") if grouped else None)


def write_table(rows: Iterable[TableRow], path: str | Path) -> Path:
    """Write predictions.csv from rows of the same tasks, taken one at a time.

    If patches of any image could not be read, a last column `unreadable` counts them.
    """
    done: list[TableRow] = []
    with atomic_file(path) as file:  # opened first, so that a place that cannot be written is reported at once
        done += rows
        counted = any(row.unreadable for row in done)
        header = done[0].header if done else ["image", "path", "width", "height"]
        lines = [(header, "unreadable"), *((row.cells, row.unreadable) for row in done)]
        file.write(encoded(csv_text([*cells, *([last] if counted else [])] for cells, last in lines)))
    return Path(path)


def judge_rows(
    tasks: Sequence[Task], targets: Mapping[str, NDArray[np.float64]], rows: Sequence[tuple[Item, TableRow]], where: str
) -> Learning:
    """Return whether the predictions of a table are better than guessing, from labels (n, w) by task."""
    groups = [item.group for item, _ in rows]
    return Learning(
        where,
        tuple(
            judge_task(
                task,
                targets[task.name],
                np.array([row.probability[task.name] for _, row in rows]),
                [row.uneven[task.name] for _, row in rows],
                groups,
            )
            for task in tasks
        ),
    )


class AnswerFolder:
    """The folder for the predictions of some images; it may already hold predictions of the same images.

    `overlay` and `tiles` are those of `write_prediction`.

    Raises:
        OutputError: It cannot be written, or holds predictions of other images, an evaluation, a run, or tables of the
            same names that are not those of predictions.
    """

    def __init__(self, out: Path, images: Sequence[Path], *, overlay: bool = False, tiles: bool = False) -> None:
        self.out, self.overlay, self.tiles = out, overlay, tiles
        self._names = folder_names(images)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: is a file. Give a folder: --out DIR.")
        if found := next((name for name in RUN_FILES if (out / name).exists()), None):
            raise OutputError(f"{out}: holds a run or a model ({found}). Choose another --out.")
        if out.name in RUN_FOLDERS and (out.absolute().parent / "last.safetensors").exists():
            raise OutputError(f"{out}: is a folder of a run. Choose another --out.")
        for name, columns in TABLES.items():
            if not _is_table(out / name, columns):
                raise OutputError(f"{out / name}: is not a table of keyhole predict. Choose another --out.")
        self._earlier = _earlier(out)
        ours = {_key(image) for image in images}
        others = sorted({image for image in self._earlier.values() if image not in ours} | _named(out) - ours)
        if (out / "metrics.json").exists():
            raise OutputError(f"{out}: holds an evaluation. Choose another --out.")
        if others:
            raise OutputError(
                f"{out}: holds predictions of {len(others)} other images, such as {others[0]}. Choose another --out, "
                "or delete the folder."
            )
        self.replaced = len(set(self._earlier.values()))
        self._written: set[str] = set()
        if (out / LEFT_OUT).exists() and not (self._earlier or (out / PREDICTIONS).exists()):
            raise OutputError(
                f"{out / LEFT_OUT}: is of something else, since no predictions are here. Choose another --out."
            )
        writable_folder(out)
        remove_unfinished([out], re.compile(r"(predictions|left_out)\.csv"))
        folders = {*self._names.values(), *self._earlier}
        remove_unfinished((out / name / inner for name in folders for inner in (".", PATCHES)), OWN)

    def write(self, prediction: Prediction) -> TableRow:
        """Write the folder of one image, and return its row of predictions.csv, which names the folder."""
        name = self._names[prediction.image]
        drawn = self.overlay and prediction.pictures is not None  # a file that was lost in the meantime has none
        write_prediction(prediction, self.out / name, overlay=drawn, tiles=self.tiles)
        self._written.add(name)
        return table_row(prediction, folder=name)

    def finish(self) -> None:
        """Remove the files of earlier calls that predictions.csv does not name; other files stay."""
        for name in self._earlier.keys() - self._written:
            remove_files(self.out / name)


def folder_names(images: Collection[Path]) -> dict[Path, str]:
    """Return the name of each file, with a hash of its path where another image has the same name."""
    taken = Counter(image.name.lower() for image in images)
    return {
        image: image.name
        if taken[image.name.lower()] == 1
        else f"{image.name}-{hashlib.sha256(os.fsencode(image)).hexdigest()[:8]}"
        for image in images
    }


def _earlier(out: Path) -> dict[str, str]:
    """Return the image of each folder in `out`, by the name of the folder."""
    if not out.is_dir():
        return {}
    found = {}
    for folder in out.iterdir():
        try:
            found[folder.name] = _key(json.loads((folder / "prediction.json").read_text("utf-8"))["image"])
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError):
            found[folder.name] = f"{folder / 'prediction.json'} (damaged)"
    return found


def _named(out: Path) -> set[str]:
    """Return the images that an earlier predictions.csv names."""
    try:
        with (out / PREDICTIONS).open(newline="", encoding=TABLE_ENCODING, errors="replace") as file:
            return {row["path"] or "" for row in csv.DictReader(file)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except csv.Error as error:
        raise OutputError(f"{out / PREDICTIONS}: damaged ({error}). Choose another --out, or delete it.") from error


def _is_table(path: Path, columns: Collection[str]) -> bool:
    """Return whether a file has these columns, is empty, or is not there."""
    try:
        with path.open(newline="", encoding=TABLE_ENCODING, errors="replace") as file:
            return set(columns) <= set(csv.DictReader(file).fieldnames or columns)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, csv.Error):
        return False


def _key(image: str | Path) -> str:
    """Return a path as it is written to a CSV: bytes that are not UTF-8 become escapes."""
    return encoded(str(image)).decode()
