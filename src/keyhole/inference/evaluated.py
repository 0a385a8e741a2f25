"""What an evaluation keeps of its predictions while it makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from keyhole.data.item import Item
from keyhole.data.manifest import Manifest
from keyhole.errors import KeyholeError
from keyhole.images.geometry import Size
from keyhole.inference.lesions import Judged, judge
from keyhole.report.cases import Cases
from keyhole.report.contact_sheet import Examples
from keyhole.report.files import write_scores
from keyhole.report.prediction import Prediction
from keyhole.report.read_table import PredictionTable
from keyhole.report.table import TableRow, labelled_row
from keyhole.tasks.kinds import Task
from keyhole.util.tally import Tally


class Looked(NamedTuple):
    """What was looked at in an image: its size, the number of its patches and of those kept, and their geometry."""

    size: Size
    patches: int
    kept: int
    side: int  # of a patch, in pixels that were read
    mpp: float | None


class EvaluatedImages:
    """The parts of its predictions that an evaluation keeps.

    Args:
        tasks: Tasks of the model.
        manifest: Images to evaluate.
        scores: Folder for the scores of every patch, a file for each image.
        on_bad_image: What an unreadable annotation does.
    """

    def __init__(
        self, tasks: Sequence[Task], manifest: Manifest, scores: Path, on_bad_image: Literal["fail", "skip"]
    ) -> None:
        self.tasks, self.manifest, self.scores, self.on_bad_image = tuple(tasks), manifest, scores, on_bad_image
        self.examples, self.cases = Examples(tasks[0]), Cases(tasks)
        self.left_out = {left.name: left.reason for left in manifest.left_out}
        self.judged: dict[str, Judged] = {}
        self.rows: list[tuple[Item, TableRow]] = []
        self.looked: list[Looked] = []
        self.doubts = Tally()
        self._grouped = any(item.group for item in manifest.items)

    def wants_pictures(self, item: Item, prediction: Prediction) -> bool:
        return self.examples.wants(item, prediction) or self.cases.wants(item, prediction)

    def add(self, item: Item, prediction: Prediction) -> TableRow:
        """Keep what is needed of a prediction, and return its row of predictions.csv."""
        if self.examples.wants(item, prediction):
            self.examples.add(item, prediction)
        self.cases.add(item, prediction)
        for note in prediction.notes:
            self.doubts.add(item.name, note)
        if item.annotation is not None:
            self.judged[item.name] = judge(prediction, item.annotation, self.on_bad_image)
        patch, scores = prediction.patch, prediction.scores
        patches = 0 if scores is None else len(scores)
        self.looked.append(Looked(prediction.size, patches, len(prediction.kept), patch["size"], patch["mpp"]))
        row = labelled_row(prediction, item, self._grouped)
        self.rows.append((item, row))
        write_scores(prediction, self.scores / f"{len(self.rows)}.npz")
        return row

    def leave_out(self, item: Item, error: KeyholeError) -> None:
        self.left_out[item.name] = str(error)

    def table(self) -> PredictionTable:
        """Return what predictions.csv holds."""
        items, rows = [item for item, _ in self.rows], [row for _, row in self.rows]
        return PredictionTable(
            self.tasks,
            tuple(item.name for item in items),
            tuple(str(item.image) for item in items),
            tuple(item.group for item in items) if self._grouped else None,
            {task.name: tuple(item.labels.get(task.name, "") for item in items) for task in self.tasks},
            self.manifest.targets(items),
            {task.name: np.array([row.probability[task.name] for row in rows]) for task in self.tasks},
        )
