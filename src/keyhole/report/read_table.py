"""Read predictions.csv of labelled images back: what was predicted, the true labels, and the groups.

Letters: n images, k columns of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import DataError, RunError
from keyhole.tasks.kinds import Task
from keyhole.tasks.metrics import Measures
from keyhole.util.tables import read_rows

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PredictionTable:
    """The predictions of n labelled images.

    Attributes:
        tasks: Tasks that were predicted.
        images: Names of the images.
        files: Path of each image when it was predicted.
        groups: Group of each image, None for an image without one; None if no image has one.
        truth: By task, the label of each image as written; empty where unknown.
        targets: By task, (n, w) as `Task.encode` returns them.
        probability: By task, (n, k) as `Task.probability` returns them.
    """

    tasks: tuple[Task, ...]
    images: tuple[str, ...]
    files: tuple[str, ...]
    groups: tuple[str | None, ...] | None
    truth: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, Floats]
    probability: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(self.images)

    def known(self, task: Task) -> NDArray[np.bool_]:
        """Return which images have a label (n,)."""
        return np.asarray(~np.isnan(self.targets[task.name]).any(axis=1))

    def measures(self, task: Task) -> Measures:
        """Return what the metrics of a task are computed from, of the images with a label."""
        known = self.known(task)
        return task.measure(self.targets[task.name][known], self.probability[task.name][known])

    def said(self, task: Task) -> list[str]:
        """Return the predicted label of each image."""
        return [task.label(probability) for probability in self.probability[task.name]]

    def at(self, places: Sequence[int]) -> PredictionTable:
        """Return the answers for some of the images, in the given order."""

        def some(values: Sequence[str]) -> tuple[str, ...]:
            return tuple(values[place] for place in places)

        return PredictionTable(
            self.tasks,
            some(self.images),
            some(self.files),
            None if self.groups is None else tuple(self.groups[place] for place in places),
            {task: some(texts) for task, texts in self.truth.items()},
            {task: values[list(places)] for task, values in self.targets.items()},
            {task: values[list(places)] for task, values in self.probability.items()},
        )


def read_table(path: Path, tasks: Sequence[Task], remedy: str) -> PredictionTable:
    """Return the answers of a table that `labelled_row` filled.

    Args:
        path: predictions.csv, or a table in the folder `predictions` of a run.
        tasks: Tasks of the model that predicted.
        remedy: What to do if the table cannot be used; ends the message of an error.

    Raises:
        RunError: The table is damaged, or does not hold the true labels of these tasks.
    """
    rows = read_rows(path, remedy, ("image", "path"))
    if not rows:
        raise RunError(f"{path}: holds no predictions. {remedy}")
    columns = {
        task.name: [f"{task.name}.probability.{name}" for name in task.classes] or [f"{task.name}.predicted"]
        for task in tasks
    }
    needed = [name for task in tasks for name in (f"{task.name}.true", *columns[task.name])]
    if missing := [name for name in needed if name not in rows[0]]:
        raise RunError(f"{path}: has no column {missing[0]!r}. {remedy}")
    truth = {task.name: tuple(row[f"{task.name}.true"] for row in rows) for task in tasks}
    try:
        numbers = {
            name: np.array([[float(row[column]) for column in found] for row in rows])
            for name, found in columns.items()
        }
        for name, values in numbers.items():
            if not np.isfinite(values).all():
                raise RunError(f"{path}: damaged (a number of {name} is not finite). {remedy}")
        targets = {task.name: np.stack([task.encode(text) for text in truth[task.name]]) for task in tasks}
    except (ValueError, DataError) as error:
        raise RunError(f"{path}: damaged ({error}). {remedy}") from error
    groups = tuple(row.get("group") or None for row in rows)
    return PredictionTable(
        tuple(tasks),
        tuple(row["image"] for row in rows),
        tuple(row["path"] for row in rows),
        groups if any(groups) else None,
        truth,
        {name: np.asarray(values, np.float64) for name, values in targets.items()},
        numbers,
    )
