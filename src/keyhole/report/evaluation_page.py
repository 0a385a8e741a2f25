"""report.html of an evaluation: what each task reached, its figures, its cases, and what stands around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from keyhole.report.cases import CaseList
from keyhole.report.drawing import HOTTEST, percent
from keyhole.report.figures import Drawn, task_figures
from keyhole.report.page import METRIC_NAMES, HtmlTable, estimate_text, render, value_and_limits
from keyhole.report.read_table import PredictionTable
from keyhole.tasks.evaluation import TaskMetrics, describe_counts
from keyhole.tasks.intervals import IntervalEstimate
from keyhole.tasks.kinds import Task
from keyhole.tasks.learning import Learning
from keyhole.tasks.operating_point import BALANCED, DEFAULT, MIN_SENSITIVITY, SENSITIVE, OperatingPoint
from keyhole.util.files import file_names
from keyhole.util.version import VERSION
from keyhole.util.wording import listed

MAX_MISTAKES = 30
"""Wrong decisions that are listed; predictions.csv has all."""
MAX_TILES = 12
GLOSSARY = {
    "accuracy": "Share of the images that are decided right; of several labels, with all of them right.",
    "balanced_accuracy": "Mean over the classes of the share decided right; guessing reaches 1 / number of classes.",
    "auroc": "Probability that an image of the class gets a higher score than another image; guessing reaches 0.5.",
    "average_precision": "Area under the precision-recall curve; guessing reaches the share of the class.",
    "f1": "Harmonic mean of precision and recall.",
    "precision": "Share of the images called by the class that are of it (positive predictive value). It depends on "
    "how common the class is among these images.",
    "recall": "Share of the images of the class that are found.",
    "specificity": "Share of the other images that are not called by the class.",
    "ece": "How far stated probabilities are from what is observed, on average; 0 is best.",
    "mae": "Mean distance of the predicted from the true number, in the unit of the label.",
    "r2": "Share of the variance of the labels that is explained; always saying the mean reaches 0.",
}
RULES = {
    DEFAULT: "default: that of the predicted label",
    BALANCED: "balanced: largest sum of sensitivity and specificity",
    SENSITIVE: f"sensitive: at least {MIN_SENSITIVITY:.0%} sensitivity",
}


@dataclass(frozen=True, eq=False)
class EvaluatedTask:
    """One task of a report: its metrics, operating points with a note, and cases."""

    result: TaskMetrics
    points: Sequence[OperatingPoint]
    points_note: str
    cases: Sequence[CaseList]


class About(NamedTuple):
    """A part of a page: a sentence and a table, or figures."""

    about: str
    table: HtmlTable | None = None
    figures: Sequence[Drawn] = ()


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What a report says besides the figures of the tasks; all texts are shown as they are.

    Attributes:
        title, subtitle: What was evaluated, and when.
        subject: Sentences on the model and the images, at the beginning of the summary.
        learning: Whether the model is better than guessing.
        warnings: What readers should know before they trust the figures.
        data: Tables of the images by split, and of the labels of each task.
        facts: Sentences under these tables.
        lesions: Kept patches and attention on annotated regions, against chance; None without annotations.
        training: Learning curves; None without a run.
        left_out: Images that were not used, and why.
        settings: Name and value of each setting of the run that is not the default.
        config: All settings as YAML; "" if unknown.
        environment: Versions in training and in this evaluation.
    """

    title: str
    subtitle: str
    subject: str
    learning: Learning
    warnings: Sequence[str]
    data: Sequence[HtmlTable]
    facts: Sequence[str]
    lesions: About | None
    training: About | None
    left_out: About
    settings: HtmlTable
    config: str
    environment: About

    def html(self, tasks: Sequence[EvaluatedTask], table: PredictionTable) -> str:
        """Return the page; `table` has the predictions that the metrics are from."""
        ids = [name.lower() for name in file_names([each.result.task.name for each in tasks], "task")]
        sections = [_section(each, table, f"task-{name}") for name, each in zip(ids, tasks, strict=True)]
        shown = {metric for each in tasks for metric in (*each.result.overall, *_class_metrics(each.result))}
        return render(
            "evaluation.html",
            version=VERSION,
            report=self,
            title=self.title,
            summary=" ".join([self.subject, *map(_sentence, tasks), _verdict(self.learning)]),
            key_figures=list(_tiles(tasks)),
            tasks=sections,
            glossary=[*_terms(shown)],
            hottest=HOTTEST,
        )


# The paragraph and the figures at the top


def _sentence(each: EvaluatedTask) -> str:
    """Say how well a task was done."""
    result, task = each.result, each.result.task
    if not result.n:
        return f"No image has a label of {task.name}."
    if not task.classes:
        error, explained = (estimate_text(result.overall[metric]) for metric in ("mae", "r2"))
        return f"The mean absolute error of {task.name} is {error}, R² is {explained}."
    right = round((result.overall["accuracy"].value or 0.0) * result.n)
    all_labels = "" if task.exclusive else " in all labels"
    parts = [
        f"In the task {task.name}, {right:,} of {result.n:,} images were decided right{all_labels}: accuracy "
        f"{estimate_text(result.overall['accuracy'])}, AUROC {estimate_text(result.overall['auroc'])}."
    ]
    for point in each.points:
        judged = task.positive is not None and point.positive and point.negative
        if judged and point.threshold.rule == BALANCED:
            found = f"{point.found:,} of the {point.positive:,} images labelled {point.label}"
            cleared = f"{point.cleared:,} of the other {point.negative:,}"
            parts.append(
                f"At the threshold {point.threshold.value:.3f}, chosen on the validation split, it finds {found} "
                f"(sensitivity {estimate_text(point.sensitivity)}) and clears {cleared} "
                f"(specificity {estimate_text(point.specificity)})."
            )
    return " ".join(parts)


def _verdict(learning: Learning) -> str:
    """Say whether the model is better than guessing, task by task where these differ."""
    words = {
        True: "This is better than guessing",
        False: "This is not better than guessing",
        None: "There are too few labels to tell this from guessing",
    }
    tasks = {verdict: [task.task for task in learning.tasks if task.learned is verdict] for verdict in words}
    tasks = {verdict: names for verdict, names in tasks.items() if names}
    said = [
        words[verdict] + (f" in {listed(names, 6)}." if len(tasks) > 1 else ".") for verdict, names in tasks.items()
    ]
    return " ".join([*said, "Brackets hold 95 % intervals."])


def _tiles(tasks: Sequence[EvaluatedTask]) -> Iterator[tuple[str, str, str]]:
    for each in tasks[:MAX_TILES]:
        start = f"{each.result.task.name}: " if len(tasks) > 1 else ""
        wanted = ["auroc", "accuracy", "balanced_accuracy", "mae", "r2"]
        wanted = [metric for metric in wanted if metric in each.result.overall]
        if len(tasks) > 2:
            wanted = [each.result.task.default_metric]
        elif each.result.task.positive is not None:
            wanted = wanted[:2]
        for metric in wanted:
            yield (f"{start}{METRIC_NAMES.get(metric, metric)}", *value_and_limits(each.result.overall[metric]))
        for point in each.points:
            if len(tasks) <= 2 and each.result.task.positive is not None and point.threshold.rule == BALANCED:
                above = f"above {point.threshold.value:.3f}"
                yield f"{start}sensitivity {above}", *value_and_limits(point.sensitivity)
                yield f"{start}specificity {above}", *value_and_limits(point.specificity)


def _terms(metrics: set[str]) -> Iterator[tuple[str, str]]:
    for metric, meaning in GLOSSARY.items():
        if metric in metrics:
            yield METRIC_NAMES.get(metric, metric), meaning
    yield (
        "95 % interval",
        "If the evaluation were repeated with other images of the same kind, 95 of 100 such intervals would hold the "
        "true value. Where images have groups, such as patients, the groups and not the images count as independent.",
    )
    yield "Kept patches", "The patches that the prediction was made from; the model ignored all others."
    yield (
        "Score and attention",
        "The score of a patch is its share of the attention over all patches; by it the patches were chosen. The "
        "attention of a kept patch is its weight in the answer. Neither says which class a patch speaks for.",
    )


# A task


def _section(each: EvaluatedTask, table: PredictionTable, name: str) -> dict[str, Any]:
    result, task = each.result, each.result.task
    return {
        "id": name,
        "name": task.name,
        "about": f"{task.kind}; {describe_counts(result)}.",
        "metrics": HtmlTable(
            ("metric", "value", "95 % interval", "method, remarks"),
            [
                (METRIC_NAMES.get(metric, metric), *value_and_limits(estimate), _remark(estimate))
                for metric, estimate in result.overall.items()
            ],
            words=(0, 3),
        ),
        "classes": _classes(result),
        "figures": task_figures(result, table.measures(task), each.points, name),
        "points": _points(task, each.points),
        "points_note": each.points_note,
        "cases": each.cases,
        "mistakes": _mistakes(task, table),
    }


def _remark(estimate: IntervalEstimate) -> str:
    return "; ".join(text for text in (estimate.method, estimate.note) if text)


def _class_metrics(result: TaskMetrics) -> Sequence[str]:
    """Return the metrics of the classes, for tasks whose own metrics are not those of one class."""
    classes = result.task.classes
    return list(result.per_class[classes[0]]) if classes and result.task.positive is None else ()


def _classes(result: TaskMetrics) -> HtmlTable:
    metrics = [metric for metric in _class_metrics(result) if metric not in ("accuracy", "ece")]
    head = ["class", "images", *(METRIC_NAMES.get(metric, metric) for metric in metrics)]
    rows = [
        [name, f"{result.support[name]:,}", *(estimate_text(result.per_class[name][metric]) for metric in metrics)]
        for name in (result.task.classes if metrics else ())
    ]
    return HtmlTable.cut(head, rows, (0,), "metrics.json")


def _points(task: Task, points: Sequence[OperatingPoint]) -> HtmlTable:
    several = len({point.label for point in points}) > 1
    head = ("threshold", "above", "sensitivity", "95 % interval", "specificity", "95 % interval", "found", "cleared")
    rows = [
        [
            *([point.label] if several else []),
            RULES[point.threshold.rule],
            f"{point.threshold.value:.3f}",
            *value_and_limits(point.sensitivity),
            *value_and_limits(point.specificity),
            f"{point.found:,} of {point.positive:,}",
            f"{point.cleared:,} of {point.negative:,}",
        ]
        for point in points
    ]
    return HtmlTable.cut(["class", *head] if several else head, rows, (0, 1) if several else (0,), "metrics.json")


def _mistakes(task: Task, table: PredictionTable) -> HtmlTable:
    """List the wrong decisions, the surest ones first."""
    truth, said = table.truth[task.name], table.said(task)
    wrong = [i for i in range(len(table)) if task.is_right(truth[i], said[i]) is False]
    credit = {i: task.credit(table.targets[task.name][i], table.probability[task.name][i]) or 0.0 for i in wrong}
    rows = [
        (
            table.images[i],
            truth[i],
            said[i] or "none",
            percent(float(np.max(table.probability[task.name][i]))),
            percent(credit[i]),
        )
        for i in sorted(wrong, key=lambda i: credit[i])
    ]
    more = f"and {len(rows) - MAX_MISTAKES:,} more: see predictions.csv" if len(rows) > MAX_MISTAKES else ""
    credited = "probability of the true class" if task.exclusive else "of the true labels, on average"
    head = ("image", "true", "predicted", "highest probability", credited)
    return HtmlTable(head, rows[:MAX_MISTAKES], (0, 1, 2), more)
