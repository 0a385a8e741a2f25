"""Thresholds chosen on the validation images of a run, judged on the images of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyhole.config.file import load_config
from keyhole.errors import KeyholeError
from keyhole.report.read_table import PredictionTable, read_table
from keyhole.tasks.evaluation import groups_of
from keyhole.tasks.kinds import Task
from keyhole.tasks.measures import ClassMeasures, RegressionMeasures
from keyhole.tasks.operating_point import (
    BALANCED,
    DEFAULT,
    OperatingPoint,
    Threshold,
    choose_thresholds,
    judge_threshold,
)
from keyhole.util.wording import counted, listed

REMEDY = "Delete it; keyhole resume RUN writes it again."


@dataclass(frozen=True)
class TaskPoints:
    """The operating points of a task, one or more for each class that is called positive.

    Attributes:
        points: Empty where the kind of task has no threshold.
        note: Where the thresholds were chosen, or why there is none.
    """

    points: tuple[OperatingPoint, ...]
    note: str

    def lines(self, task: str, tasks: int) -> list[str]:
        """Return a line for each balanced threshold; `task` is named where there are several `tasks`."""
        start = f"{task} " if tasks > 1 else ""
        return [
            f"{start}{point.label} above {point.threshold.value:.3f}, chosen on the validation split: "
            f"sensitivity {point.sensitivity}, specificity {point.specificity}"
            for point in self.points
            if point.threshold.rule == BALANCED
        ]

    def to_json(self) -> dict[str, Any]:
        return {"note": self.note, "points": [point.to_json() for point in self.points]}


def operating_points(run: Path, answers: PredictionTable, split: str | None) -> dict[str, TaskPoints]:
    """Return the operating points of every task on evaluated images.

    Args:
        run: Run folder, whose `predictions/val.csv` the thresholds are chosen on.
        answers: Evaluated images.
        split: Their split of the run; None for other data.
    """
    chosen_on, reason = validation_answers(run, answers.tasks)
    return {task.name: _of_task(task, answers, chosen_on, reason, split) for task in answers.tasks}


def validation_answers(run: Path, tasks: tuple[Task, ...]) -> tuple[PredictionTable | None, str]:
    """Return the predictions for the validation split of a run, or None and the reason why there are none."""
    path = run / "predictions" / "val.csv"
    if path.is_file():
        try:
            return read_table(path, tasks, REMEDY), ""
        except KeyholeError as error:
            return None, str(error)
    if not (run / "last.safetensors").is_file():
        return None, "the folder holds a model without its run, and so no predictions for validation images"
    try:
        watched = load_config(run / "config.yaml").train.watch == "test"
    except KeyholeError:
        watched = False
    if watched:
        return None, "the run has no validation split (train.watch test)"
    return None, "the run has no predictions for a validation split: it is not finished, or has no such split"


def _of_task(
    task: Task, answers: PredictionTable, chosen_on: PredictionTable | None, reason: str, split: str | None
) -> TaskPoints:
    measured = answers.measures(task)
    if task.threshold is None or isinstance(measured, RegressionMeasures):
        what = "the class with the largest probability is predicted" if task.classes else "a number is predicted"
        return TaskPoints((), f"A {task.kind} task has no threshold: {what}.")
    groups = groups_of(answers.groups, answers.known(task))
    chosen = None if chosen_on is None else chosen_on.measures(task)
    points, unusable = [], []
    for c, label in enumerate(task.classes):
        if task.positive not in (None, label):
            continue
        picked = [Threshold(DEFAULT, task.threshold)]
        if isinstance(chosen, ClassMeasures):
            picked += (found := choose_thresholds(chosen.truth[:, c], chosen.probability[:, c]))
            unusable += [] if found else [label]
        points += [
            judge_threshold(label, each, measured.truth[:, c], measured.probability[:, c], groups) for each in picked
        ]
    if not isinstance(chosen, ClassMeasures):
        return TaskPoints(tuple(points), f"No threshold could be chosen: {reason.rstrip('.')}.")
    note = f"Chosen on {counted(len(chosen.truth), 'validation image')}"
    if split in ("train", "val"):
        note += f"; the {split} split that is evaluated here was used to {'fit' if split == 'train' else 'choose'} "
        note += "the model, so that the figures are too good"
    if unusable:
        note += f"; not for {listed(unusable)}: the validation images are all or none of it"
    return TaskPoints(tuple(points), f"{note}.")
