"""Which predictions of an evaluation are shown: chosen while they come, so that none is made a second time."""

from __future__ import annotations

from dataclasses import replace

from keyhole.data.item import Item
from keyhole.report.contact_sheet import SheetEntry
from keyhole.report.prediction import Prediction
from keyhole.tasks.kinds import Task

SHOWN = 16
"""Images on the contact sheet."""


class Examples:
    """The first few predictions, wrong ones first: at most half are wrong, and no more are held than are shown.

    Args:
        task: by which a prediction is right or wrong; a number or several labels are neither.
        shown: how many are wanted.
    """

    def __init__(self, task: Task, shown: int = SHOWN) -> None:
        self.task, self.shown = task, shown
        self._wrong: list[SheetEntry] = []
        self._others: list[SheetEntry] = []

    def wants(self, item: Item, prediction: Prediction) -> bool:
        """Whether this prediction is to be shown, as far as is known now; it then needs its pictures."""
        if self._is_wrong(item, prediction):
            return len(self._wrong) < self.shown // 2
        return len(self._wrong) + len(self._others) < self.shown

    def add(self, item: Item, prediction: Prediction) -> None:
        """Holds a prediction that was wanted; of every other, and of one whose pictures could not be read, nothing."""
        if prediction.pictures is None:
            return
        count = None if prediction.scores is None else len(prediction.scores)
        truth = item.labels.get(self.task.name) or None
        entry = SheetEntry(replace(prediction, scores=None), truth, count)
        (self._wrong if self._is_wrong(item, prediction) else self._others).append(entry)
        if len(self._wrong) + len(self._others) > self.shown:
            self._others.pop()

    def entries(self) -> list[SheetEntry]:
        """Those to show, in their order."""
        return [*self._wrong, *self._others]

    def _is_wrong(self, item: Item, prediction: Prediction) -> bool:
        truth = item.labels.get(self.task.name, "")
        return self.task.exclusive and self.task.is_right(truth, prediction.label[self.task.name]) is False
