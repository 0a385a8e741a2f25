"""predictions.csv: one row per image, and what its rows say about learning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keyhole.data.item import Item
from keyhole.report.files import encoded
from keyhole.report.prediction import Prediction
from keyhole.tasks.kinds import Task
from keyhole.tasks.learning import Learning, judge_task, unevenness
from keyhole.util.files import atomic_file, csv_text
from keyhole.util.wording import distinct


@dataclass(frozen=True)
class TableRow:
    """One image's row of predictions.csv, and the number of its unreadable patches.

    By task, not written as such: the numbers of `Task.probability`, and how far the attention is from equal.
    """

    header: list[str]
    cells: list[str]
    unreadable: int
    probability: dict[str, list[float]] = field(default_factory=dict)
    uneven: dict[str, float] = field(default_factory=dict)


def table_row(prediction: Prediction, known: Mapping[str, str] | None = None, folder: str | None = None) -> TableRow:
    """Return the row of a prediction: image, path, width, height, then TASK.predicted and TASK.probability.CLASS.

    The `known` labels add TASK.true, the prediction's own `folder` a column. Numbers are written so that reading them
    gives the same float64 again.
    """
    header = ["image", "path", *([] if folder is None else ["folder"]), "width", "height"]
    cells = [prediction.name, str(prediction.image), *([] if folder is None else [folder])]
    cells += map(str, prediction.size)
    for task in prediction.tasks:
        header += [] if known is None else [f"{task.name}.true"]
        cells += [] if known is None else [known.get(task.name, "")]
        header += [f"{task.name}.predicted", *(f"{task.name}.probability.{name}" for name in task.classes)]
        said = prediction.probability[task.name]
        cells += [task.table_cell(prediction.label[task.name], said)]
        cells += [repr(said[name]) for name in task.classes]
    return TableRow(
        distinct(header),
        cells,
        0 if prediction.unreadable is None else len(prediction.unreadable),
        {task: list(said.values()) for task, said in prediction.probability.items()},
        unevenness(prediction.kept.attention),
    )


def write_table(rows: Iterable[TableRow], path: str | Path) -> Path:
    """Write predictions.csv from rows of the same tasks, taken one at a time.

    Where patches of any image could not be read, the last column `unreadable` counts them.
    """
    done: list[TableRow] = []
    with atomic_file(path) as file:  # open from the start, so that a place that cannot be written shows at once
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
