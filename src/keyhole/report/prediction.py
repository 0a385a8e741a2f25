"""What a model says about one image and what that rests on: the kept patches, and the score of every patch.

A prediction also carries the pixels that show it (`Pictures`), so that nothing has to look at its image again.

Torch-free. All boxes are (x, y, width, height) in level-0 pixels and may reach over the border of the image.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import OutputError, RunError
from keyhole.images.geometry import Size
from keyhole.report.geojson import kept_geojson
from keyhole.tasks.kinds import Task
from keyhole.util.files import atomic_file, writable_folder, write_atomic
from keyhole.util.version import VERSION

BOX = ("x", "y", "width", "height")
FILES = ("prediction.json", "kept.csv", "kept.geojson", "scores.csv", "scores.npz")
"""What `write_prediction` writes."""
_ROWS = 10_000
"""Patches whose boxes are worked out and written at once."""


@dataclass(frozen=True, eq=False, repr=False)
class Kept:
    """The m patches that the prediction was made from, best first.

    Attributes:
        index: (m,) patch index in the grid.
        boxes: (m, 4) level-0 x, y, width, height.
        score: (m,) share of the attention over all patches, mean over the tasks: that of `Scores` at these patches.
        attention: by task, (m,) weight of each patch in the pooled embedding, mean over heads; sums to 1.

    Raises:
        RunError: attention is not a number, as from a model whose training diverged.
    """

    index: NDArray[np.int64]
    boxes: NDArray[np.int64]
    score: NDArray[np.float32]
    attention: Mapping[str, NDArray[np.float32]]

    def __post_init__(self) -> None:
        m = len(self.index)
        assert self.boxes.shape == (m, 4), self.boxes.shape
        assert self.score.shape == (m,), self.score.shape
        for task, weights in self.attention.items():
            assert weights.shape == (m,), weights.shape
            if not np.isfinite(weights).all():
                raise RunError(
                    f"{task}: the model gives attention that is no number. "
                    "Its weights are damaged or its training diverged; train with a lower rate."
                )
            assert abs(float(weights.sum()) - 1) < 1e-3, weights.sum()

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Kept({len(self)} patches)"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Plain values of one patch after the other: index, box, score, attention by task."""
        for i in range(len(self)):
            yield {
                "index": int(self.index[i]),
                "box": [int(value) for value in self.boxes[i]],
                "score": _plain(self.score[i]),
                "attention": {task: _plain(weights[i]) for task, weights in self.attention.items()},
            }


@dataclass(frozen=True, eq=False, repr=False)
class Boxes:
    """Boxes by patch index, as of a grid that is no longer there.

    Attributes:
        of: (n, 4) level-0 x, y, width, height of every patch.
    """

    of: NDArray[np.int64]

    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.of[index]


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """The score of every patch that was looked at, a by-product of the selection.

    Attributes:
        rows: of the full grid, patches left out by a mask included.
        columns: likewise.
        index: (n,) patch index in the grid.
        cells: (n, 2) row and column in the full grid.
        score: (n,) mean over the tasks.
        per_task: by task, (n,).
        boxes: patch indices (k,) to level-0 boxes (k, 4); `PatchGrid.boxes`.
        arrived: (n,) False where a patch could not be read, which has score 0; None if all could.
    """

    rows: int
    columns: int
    index: NDArray[np.int64]
    cells: NDArray[np.int64]
    score: NDArray[np.float32]
    per_task: Mapping[str, NDArray[np.float32]]
    boxes: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    arrived: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        n = len(self.index)
        assert self.cells.shape == (n, 2), self.cells.shape
        assert self.score.shape == (n,), self.score.shape
        assert all(score.shape == (n,) for score in self.per_task.values())
        assert self.arrived is None or self.arrived.shape == (n,)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Scores({len(self)} patches on {self.rows} x {self.columns})"

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the boxes themselves instead of the grid, which holds the open image."""
        return {**self.__dict__, "boxes": Boxes(np.asarray(self.boxes(self.index), np.int64))}

    def map(self, task: str | None = None) -> NDArray[np.float32]:
        """Scores (rows, columns) on the full grid, of one task or their mean; NaN where no patch was looked at.

        Stored features need not lie on one grid: of several in one cell the highest score is shown.
        """
        out = np.full((self.rows, self.columns), np.nan, np.float32)
        seen = slice(None) if self.arrived is None else self.arrived
        row, column = self.cells[seen].T
        np.fmax.at(out, (row, column), (self.score if task is None else self.per_task[task])[seen])
        return out


@dataclass(frozen=True, eq=False, repr=False)
class Pictures:
    """Pixels that show a prediction, taken from its own source while that was open.

    Attributes:
        thumbnail: (h, w, c) uint8 of the whole image, c = 1 or 3; a picture of the scores where there is no image.
        downsample: level-0 pixels per pixel of the thumbnail.
        patches: (k, s, s, c) uint8, kept patches as the model saw them, made smaller where they are large.
        place: (k,) which of the kept patches these are; with very many kept, those with the highest attention.
        note: where the pixels are not what the model saw, what they are; else "".
    """

    thumbnail: NDArray[np.uint8]
    downsample: float
    patches: NDArray[np.uint8]
    place: NDArray[np.int64]
    note: str = ""

    def __post_init__(self) -> None:
        assert self.place.shape == (len(self.patches),), self.place.shape

    def __repr__(self) -> str:
        height, width = self.thumbnail.shape[:2]
        return f"Pictures({width} x {height} pixels and {len(self.patches)} patches)"


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a model says about one image. It can be pickled, also to another process.

    Attributes:
        name: the image as the user wrote it; `array` or `picture` of pixels in memory.
        image: the file; the name again where there is none.
        size: width and height of level 0 in pixels; of stored features whose slide is not known, what holds them all.
        tasks: what was predicted.
        probability: by task and class; {"value": x} for regression.
        label: by task; labels of a multilabel task joined by `|`.
        kept: the patches that the prediction was made from.
        scores: of every patch; None where they were not asked for.
        patch: geometry of the grid: size and stride in pixels of what was read, level, mpp, scale (level-0 pixels per
            pixel read), and edge, the rule for patches over the border. Of stored features not `edge` but `features`,
            the file, and `size_known`, False where the size is told from the coordinates.
        model: which model said so.
        origin: level-0 x, y from which QuPath counts on this image; (0, 0) but for slides that state bounds.
        unreadable: (k, 4) boxes of the patches that could not be read; None if all could.
        pictures: pixels that show it; None where they were not asked for.
        notes: what makes it doubtful, such as another resolution than the model learned at.
    """

    name: str
    image: Path
    size: Size
    tasks: tuple[Task, ...]
    probability: Mapping[str, Mapping[str, float]]
    label: Mapping[str, str]
    kept: Kept
    scores: Scores | None
    patch: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    unreadable: NDArray[np.int64] | None = None
    pictures: Pictures | None = None
    origin: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """`Prediction('red/1.png', label: red 0.90, kept 4 of 16 patches)`."""
        said = []
        for task, label in self.label.items():
            share = self.probability[task].get(label)
            said.append(f"{task}: {label or '(none)'}" + ("" if share is None else f" {share:.2f}"))
        of = "" if self.scores is None else f" of {len(self.scores)}"
        return f"Prediction({self.name!r}, {', '.join(said)}, kept {len(self.kept)}{of} patches)"

    def to_json(self) -> dict[str, Any]:
        """Everything but the score of every patch, as a plain dict."""
        return {
            "keyhole": VERSION,
            "model": self.model,
            "name": self.name,
            "image": str(self.image),
            "size": {"width": self.size.width, "height": self.size.height},
            "qupath_origin": list(self.origin),
            "tasks": {
                task.name: {
                    "kind": task.kind,
                    "classes": list(task.classes),
                    "label": self.label[task.name],
                    "probability": dict(self.probability[task.name]),
                }
                for task in self.tasks
            },
            "patch": dict(self.patch),
            "notes": list(self.notes),
            "unreadable": [] if self.unreadable is None else self.unreadable.tolist(),
            "kept": {"box_order": list(BOX), "box_unit": "level-0 pixels", "patches": list(self.kept.rows())},
            "scores": None
            if self.scores is None
            else {"rows": self.scores.rows, "columns": self.scores.columns, "patches": len(self.scores)},
        }


def write_prediction(prediction: Prediction, folder: str | Path) -> dict[str, Path]:
    """Writes prediction.json, kept.csv, kept.geojson and, where there are scores, scores.csv and scores.npz.

    scores.npz holds `index`, `cells`, `score` and `map`, `score.TASK` and `map.TASK` per task, and `arrived` where
    patches could not be read.

    Returns:
        The paths by file name.

    Raises:
        OutputError: the folder cannot be written; each file is whole or not there.
    """
    folder = writable_folder(folder)
    paths = {
        name: write_atomic(folder / name, encoded(text))
        for name, text in {
            "prediction.json": _json(prediction.to_json(), indent=2),
            "kept.geojson": _json(kept_geojson(prediction)),
            "kept.csv": "".join(_kept_lines(prediction)),
        }.items()
    }
    if prediction.scores is not None:
        paths["scores.csv"] = _write_lines(folder / "scores.csv", _score_lines(prediction.scores))
        paths["scores.npz"] = _write_scores(folder / "scores.npz", prediction.scores)
    return paths


def _kept_lines(prediction: Prediction) -> Iterator[str]:
    kept = prediction.kept
    yield csv_line(["rank", "index", *BOX, "score", *(f"attention.{task}" for task in kept.attention)])
    for rank, row in enumerate(kept.rows(), start=1):
        yield csv_line([rank, row["index"], *row["box"], row["score"], *row["attention"].values()])


def _score_lines(scores: Scores) -> Iterator[str]:
    yield csv_line(["index", "row", "column", *BOX, "score", *(f"score.{task}" for task in scores.per_task)])
    columns = [scores.score, *scores.per_task.values()]
    for start in range(0, len(scores), _ROWS):
        some = slice(start, start + _ROWS)
        index = scores.index[some]
        whole = np.column_stack([index, scores.cells[some], scores.boxes(index)]).tolist()
        values = [[f"{value:.9g}" for value in column[some].tolist()] for column in columns]
        yield "".join(",".join([*map(str, row), *numbers]) + "\n" for row, *numbers in zip(whole, *values, strict=True))


def _write_scores(path: Path, scores: Scores) -> Path:
    arrays = {"index": scores.index, "cells": scores.cells, "score": scores.score, "map": scores.map()}
    if scores.arrived is not None:
        arrays["arrived"] = scores.arrived
    for task, score in scores.per_task.items():
        arrays |= {f"score.{task}": score, f"map.{task}": scores.map(task)}
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return path


def _write_lines(path: Path, lines: Iterator[str]) -> Path:
    with atomic_file(path) as file:
        for line in lines:
            file.write(encoded(line))
    return path


def csv_line(values: Iterable[object]) -> str:
    """A row of a CSV, with its end of line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def encoded(text: str) -> bytes:
    """UTF-8 of what is written to a file."""
    # A file name need not be valid text; what cannot be encoded is written as an escape, which JSON reads as such.
    return text.encode("utf-8", "backslashreplace")


def _json(data: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise OutputError(f"a prediction holds a value that is not a number and cannot be written ({error})") from error


def _plain(value: np.float32) -> float:
    """The shortest decimal number that is this float32 again, the same in CSV and JSON."""
    return float(str(np.float32(value)))
