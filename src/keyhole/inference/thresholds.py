"""Thresholds chosen on the validation images of a run: to predict with, or judged on the images of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.config.file import load_config
from keyhole.errors import ConfigError, KeyholeError
from keyhole.report.read_table import PredictionTable, read_table
from keyhole.runs.checkpoint import model_file, read_info
from keyhole.tasks.evaluation import groups_of
from keyhole.tasks.kinds import Task
from keyhole.tasks.measures import ClassMeasures, RegressionMeasures
from keyhole.tasks.operating_point import (
    BALANCED,
    DEFAULT,
    SENSITIVE,
    OperatingPoint,
    Threshold,
    choose_thresholds,
    judge_threshold,
)
from keyhole.tasks.task import Floats
from keyhole.util.files import write_atomic
from keyhole.util.wording import counted, listed

RULES, GIVEN = (BALANCED, SENSITIVE), "given"
STORED = "thresholds.json"
"""File beside a model, so that a copy of it has the thresholds that were chosen on the validation images of its run."""
MIN_GAIN, MAX_CHANCE = 0.3, 0.01
"""Another threshold than one half is advised where its sum of sensitivity and specificity on the validation images is
larger by so much, and where chance would rank them as well with no more than this probability."""
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


@dataclass(frozen=True)
class Chosen:
    """The thresholds that validation images give.

    Attributes:
        images: By task, how many of them are labelled.
        thresholds: By task and class, one for each rule; none for a class that all or none of the images have.
    """

    images: Mapping[str, int]
    thresholds: Mapping[str, Mapping[str, Sequence[Threshold]]]

    @classmethod
    def on(cls, answers: PredictionTable, tasks: Sequence[Task]) -> Chosen:
        """Choose on predictions."""
        images, thresholds = {}, {}
        for task in tasks:
            measured = answers.measures(task)
            if isinstance(measured, ClassMeasures) and task.thresholded:
                images[task.name] = len(measured.truth)
                thresholds[task.name] = {
                    label: choose_thresholds(measured.truth[:, c], measured.probability[:, c])
                    for c, label in enumerate(task.classes)
                    if label in task.thresholded
                }
        return cls(images, thresholds)

    def by(self, rule: str, task: Task) -> dict[str, Threshold]:
        """Return the threshold of one rule for each class of a task that has one."""
        found = self.thresholds.get(task.name, {})
        return {label: each for label, rules in found.items() for each in rules if each.rule == rule}


def store_thresholds(run: Path, tasks: tuple[Task, ...]) -> None:
    """Write the thresholds that the validation images of a run give beside its best model."""
    known, _ = validation_answers(run, tasks)
    if known is None:
        return
    file = model_file(run)
    text = json.dumps({**_model_of(file), **asdict(Chosen.on(known, tasks))}, indent=2, allow_nan=False) + "\n"
    path = file.with_name(STORED)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def chosen_thresholds(run: Path, tasks: tuple[Task, ...]) -> tuple[Chosen | None, str]:
    """Return the thresholds of a run, or of a model alone that has them stored, or None and why there are none."""
    known, reason = validation_answers(run, tasks)
    if known is not None:
        return Chosen.on(known, tasks), ""
    file = model_file(run)
    path = file.with_name(STORED)
    if file.parent != run or not path.is_file():
        return None, reason
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {name: found[name] for name in ("run", "epoch")} != _model_of(file):
            return None, f"{path} is of another model; copy it again"
        thresholds = {
            task: {label: [Threshold(**rule) for rule in rules] for label, rules in each.items()}
            for task, each in found["thresholds"].items()
        }
        return Chosen({task: int(n) for task, n in found["images"].items()}, thresholds), ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{path} is damaged ({error}); copy it again"


def _model_of(file: Path) -> dict[str, Any]:
    """Return what tells the model of one run and epoch from others."""
    info = read_info(file)
    return {name: info.get(name) for name in ("run", "epoch")}


def decisions(run: Path, tasks: tuple[Task, ...], threshold: float | str) -> dict[str, dict[str, Threshold]]:
    """Return the threshold of each class that has one, by task.

    Args:
        run: Run folder, whose `predictions/val.csv` a rule chooses on; or a copy of its best model.
        tasks: Tasks of its model.
        threshold: A probability, the same for all; or the rule `balanced` or `sensitive`, which leaves out classes that
            all or none of the validation images have.

    Raises:
        ConfigError: It is neither, no task has a threshold, or the rule cannot choose one.
    """
    number = isinstance(threshold, Real | np.number) and not isinstance(threshold, bool) and 0 <= float(threshold) <= 1
    if not number and (not isinstance(threshold, str) or threshold not in RULES):
        raise ConfigError(f"threshold {threshold}: expected a probability from 0 to 1, {' or '.join(RULES)}")
    if not any(task.thresholded for task in tasks):
        raise ConfigError(
            f"threshold {threshold}: {listed([task.describe() for task in tasks])} has none. Leave it out."
        )
    if not isinstance(threshold, str):
        return {task.name: dict.fromkeys(task.thresholded, Threshold(GIVEN, float(threshold))) for task in tasks}
    known, reason = chosen_thresholds(run, tasks)
    if known is None:
        raise ConfigError(f"threshold {threshold}: {reason.rstrip('.')}. Give a probability instead.")
    chosen = {task.name: known.by(threshold, task) for task in tasks}
    if not any(chosen.values()):
        classes = [label for task in tasks for label in task.thresholded]
        raise ConfigError(
            f"threshold {threshold}: none can be chosen for {listed(classes)}, since all or none of the labelled "
            "validation images are of it. Give a probability instead."
        )
    return chosen


def threshold_lines(tasks: tuple[Task, ...], thresholds: Mapping[str, Mapping[str, Threshold]]) -> list[str]:
    """Return a line for each class whose threshold a rule was asked to choose; none if no rule was."""
    lines = []
    for task in tasks if thresholds else ():
        start = f"{task.name} " if len(tasks) > 1 else ""
        for label in task.thresholded:
            each = thresholds[task.name].get(label)
            if each is None:
                why = "all or none of the labelled validation images are of it"
                lines.append(f"{start}{label} above {task.threshold:g}: no other threshold can be chosen, since {why}")
            elif each.rule != GIVEN:
                lines.append(
                    f"{start}{label} above {each.value:.3g}: sensitivity {each.sensitivity:.3f}, "
                    f"specificity {each.specificity:.3f} on the validation images"
                )
    return lines


def advice(run: Path, tasks: tuple[Task, ...]) -> str | None:
    """Return what to say where one half decides much worse than another threshold, by the validation images."""
    known, _ = validation_answers(run, tasks)
    if known is None:
        return None
    said, chosen = [], Chosen.on(known, tasks)
    for task in tasks:
        measured = known.measures(task)
        for label, best in chosen.by(BALANCED, task).items():
            assert isinstance(measured, ClassMeasures)
            c = task.classes.index(label)
            assert task.threshold is not None
            now = judge_threshold(
                label, Threshold(DEFAULT, task.threshold), measured.truth[:, c], measured.probability[:, c]
            )
            assert best.sensitivity is not None
            assert best.specificity is not None
            gain = best.sensitivity + best.specificity - now.found / now.positive - now.cleared / now.negative
            if gain >= MIN_GAIN and _ranks_above(measured.truth[:, c], measured.probability[:, c]):
                start = f"{task.name}, " if len(tasks) > 1 else ""
                said.append(
                    f"{start}above {task.threshold:g}, {label!r} finds {now.found} of {now.positive} validation images "
                    f"and clears {now.cleared} of {now.negative}; above {best.value:.3g} it would find "
                    f"{round(best.sensitivity * now.positive)} and clear {round(best.specificity * now.negative)}"
                )
    return f"{'; '.join(said)}. To use that: --threshold balanced" if said else None


def _ranks_above(truth: NDArray[np.bool_], score: Floats) -> bool:
    """Return whether images of a class have higher scores than others by more than chance (Mann and Whitney's test)."""
    from scipy.stats import mannwhitneyu

    return bool(mannwhitneyu(score[truth], score[~truth], alternative="greater").pvalue < MAX_CHANCE)


def operating_points(run: Path, answers: PredictionTable, split: str | None) -> dict[str, TaskPoints]:
    """Return the operating points of every task on evaluated images.

    Args:
        run: Run folder, whose `predictions/val.csv` the thresholds are chosen on; or a copy of its best model.
        answers: Evaluated images.
        split: Their split of the run; None for other data.
    """
    chosen, reason = chosen_thresholds(run, answers.tasks)
    return {task.name: _of_task(task, answers, chosen, reason, split) for task in answers.tasks}


def validation_answers(run: Path, tasks: tuple[Task, ...]) -> tuple[PredictionTable | None, str]:
    """Return the predictions for the validation split of a run, or None and the reason why there are none."""
    path = run / "predictions" / "val.csv"
    if path.is_file():
        try:
            return read_table(path, tasks, REMEDY), ""
        except KeyholeError as error:
            return None, str(error)
    if not (run / "last.safetensors").is_file():
        return (
            None,
            f"the folder holds a model without its run, and no {STORED}, which a run writes beside its best model",
        )
    try:
        watched = load_config(run / "config.yaml").train.watch == "test"
    except KeyholeError:
        watched = False
    if watched:
        return None, "the run has no validation split (train.watch test)"
    return None, (
        "the run has no predictions/val.csv: it has no validation split, or is not finished, or the file was deleted; "
        "then keyhole resume RUN writes it again"
    )


def _of_task(task: Task, answers: PredictionTable, chosen: Chosen | None, reason: str, split: str | None) -> TaskPoints:
    measured = answers.measures(task)
    if task.threshold is None or isinstance(measured, RegressionMeasures):
        what = "the class with the largest probability is predicted" if task.classes else "a number is predicted"
        return TaskPoints((), f"A {task.kind} task has no threshold: {what}.")
    groups = groups_of(answers.groups, answers.known(task))
    thresholds = None if chosen is None else chosen.thresholds.get(task.name)
    points, unusable = [], []
    for label in task.thresholded:
        c = task.classes.index(label)
        picked = [Threshold(DEFAULT, task.threshold)]
        if thresholds is not None:
            picked += (found := thresholds[label])
            unusable += [] if found else [label]
        points += [
            judge_threshold(label, each, measured.truth[:, c], measured.probability[:, c], groups) for each in picked
        ]
    if chosen is None or thresholds is None:
        return TaskPoints(tuple(points), f"No threshold could be chosen: {reason.rstrip('.')}.")
    note = f"Chosen on {counted(chosen.images[task.name], 'validation image')}"
    if split in ("train", "val"):
        note += f"; the {split} split that is evaluated here was used to {'fit' if split == 'train' else 'choose'} "
        note += "the model, so that the figures are too good"
    if unusable:
        note += f"; not for {listed(unusable)}: the validation images are all or none of it"
    return TaskPoints(tuple(points), f"{note}.")
