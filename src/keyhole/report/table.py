"""predictions.csv: one row per image, whether it is written while predictions come or from rows that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from keyhole.report.files import csv_line, encoded
from keyhole.report.prediction import Prediction
from keyhole.tasks.learning import unevenness
from keyhole.util.files import atomic_file
from keyhole.util.wording import distinct


@dataclass(frozen=True)
class TableRow:
    """One image's row of predictions.csv: names of the columns, what stands in them, and how many patches failed.

    `probability` and `uneven` are not written: by task what is said, and how far its attention is from equal
    (`learning.unevenness`).
    """

    header: list[str]
    cells: list[str]
    unreadable: int
    probability: dict[str, list[float]] = field(default_factory=dict)
    uneven: dict[str, float] = field(default_factory=dict)


def table_row(prediction: Prediction, known: Mapping[str, str] | None = None, folder: str | None = None) -> TableRow:
    """The row of a prediction; with `known` labels by task, these too, empty where unknown; with its own `folder`."""
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


def write_table(
    predictions: Iterable[Prediction | TableRow],
    path: str | Path,
    truth: Callable[[Prediction], Mapping[str, str]] | None = None,
) -> Path:
    """One CSV row per image: image, path, width, height, then per task TASK.predicted and TASK.probability.CLASS.

    Numbers are written so that reading them gives the same float64 again.

    Where patches of any image could not be read, the last column `unreadable` says how many.

    Args:
        predictions: of the same tasks, in the order of the rows; taken one at a time, so that they need not all be
            in memory. Or their rows.
        path: the CSV.
        truth: the known labels of an image by task; adds TASK.true, empty where unknown.

    Raises:
        OutputError: it cannot be written; nothing of it is left then.
    """
    rows: list[TableRow] = []
    with atomic_file(path) as file:  # open from the start, so that a place that cannot be written shows at once
        for each in predictions:
            row = each if isinstance(each, TableRow) else table_row(each, None if truth is None else truth(each))
            rows.append(row)
        counted = any(row.unreadable for row in rows)
        header = rows[0].header if rows else ["image", "path", "width", "height"]
        file.write(encoded(csv_line([*header, *(["unreadable"] if counted else [])])))
        for row in rows:
            file.write(encoded(csv_line([*row.cells, *([row.unreadable] if counted else [])])))
    return Path(path)
