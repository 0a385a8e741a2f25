"""Gather what report.html of an evaluation says of the run, the images, what was left out, and the machine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keyhole.config.file import dump_config, leaves
from keyhole.config.inference import EvaluateSettings
from keyhole.config.settings import Config
from keyhole.data.item import SPLITS, Item
from keyhole.data.read_csv import read_csv
from keyhole.errors import KeyholeError
from keyhole.inference.evaluated import EvaluatedImages
from keyhole.inference.lesions import Lesions
from keyhole.inference.predictor import Predictor
from keyhole.inference.thresholds import TaskPoints
from keyhole.report.evaluation_page import About, EvaluatedTask, EvaluationReport
from keyhole.report.page import METRIC_NAMES, HtmlTable, value_and_limits
from keyhole.report.read_table import PredictionTable
from keyhole.runs.checkpoint import model_file, read_info
from keyhole.runs.run import Run, environment
from keyhole.tasks.evaluation import TaskMetrics
from keyhole.tasks.intervals import IntervalEstimate, short
from keyhole.tasks.kinds import Task
from keyhole.tasks.learning import Learning
from keyhole.util.tables import read_rows
from keyhole.util.version import VERSION
from keyhole.util.wording import counted, from_to

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True, eq=False)
class Findings:
    """What an evaluation found.

    Attributes:
        table: The predictions.
        metrics: One per task.
        points: Operating points by task.
        learning: Whether the model is better than guessing.
        lesions: Comparison with annotated regions; None without annotations.
        notes: What readers of the figures should know.
        config: Settings of the run; None if unknown.
    """

    table: PredictionTable
    metrics: Sequence[TaskMetrics]
    points: Mapping[str, TaskPoints]
    learning: Learning
    lesions: Lesions | None
    notes: Sequence[str]
    config: Config | None


def evaluation_report(asked: EvaluateSettings, predictor: Predictor, found: EvaluatedImages, findings: Findings) -> str:
    """Return the page report.html."""
    config = findings.config
    now = environment(str(predictor.device))
    what = f"{len(found.rows):,} {SPLIT_NAMES.get(asked.split, asked.split)} image{'s' * (len(found.rows) != 1)}"
    report = EvaluationReport(
        title=f"{predictor.name}: evaluation on {what}",
        subtitle=f"{now['started']}  \N{MIDDLE DOT}  keyhole {VERSION}  \N{MIDDLE DOT}  run {asked.run.absolute()}"
        f"  \N{MIDDLE DOT}  data {_data(asked, config)}",
        subject=_subject(asked, predictor, found, config, what),
        learning=findings.learning,
        warnings=[line.removeprefix("warning: ") for line in (*findings.notes, *findings.learning.lines(config))],
        data=_images(asked, found),
        facts=list(_facts(found)),
        lesions=None if findings.lesions is None else _lesions(findings.lesions),
        training=_training(asked.run, config),
        left_out=_left_out(asked.run, found.left_out),
        settings=_changed(config),
        config="" if config is None else dump_config(config),
        environment=_environment(asked.run, now),
    )
    tasks = [
        EvaluatedTask(
            result,
            findings.points[result.task.name].points,
            findings.points[result.task.name].note,
            found.cases.of(result.task),
        )
        for result in findings.metrics
    ]
    return report.html(tasks, findings.table)


def _data(asked: EvaluateSettings, config: Config | None) -> str:
    if asked.data is not None:
        return str(asked.data.absolute())
    return "of the run" if config is None else str(config.data.path)


def _subject(
    asked: EvaluateSettings, predictor: Predictor, found: EvaluatedImages, config: Config | None, what: str
) -> str:
    """Say which model was evaluated on which images, and what it had to do with them before."""
    info = read_info(model_file(asked.run))
    said = f"The model {predictor.name} was evaluated on {what}"
    said += f" of {asked.data}." if asked.data is not None else "."
    if epoch := info.get("epoch"):
        of = "" if config is None else f" of {config.train.epochs}"
        said += f" It is the model of epoch {epoch}{of}"
        metric = info.get("metric")
        said += (
            f", chosen by its {METRIC_NAMES.get(metric, metric)} on the validation split."
            if metric
            else ", the last one, since there is no validation split to choose by."
        )
    if asked.data is None:
        watched = config is not None and config.train.watch == asked.split
        said += {
            "train": " It was trained on these images.",
            "val": " Its epoch was chosen on these images.",
        }.get(
            asked.split,
            " Training did not learn from these images, but showed its figures on them after each epoch."
            if watched
            else " Training did not open these images.",
        )
    if left := len(found.left_out):
        said += f" {counted(left, 'image was', 'images were')} left out."
    return said


# Data


def _images(asked: EvaluateSettings, found: EvaluatedImages) -> list[HtmlTable]:
    """Count images, groups and labels of each task in the splits of the run and among the evaluated images."""
    run, columns = asked.run, dict[str, Sequence[Item]]()
    with suppress(KeyholeError):
        rows = read_csv(run / "manifest.csv").rows if (run / "manifest.csv").is_file() else []
        columns = {SPLIT_NAMES[split]: [row.item for row in rows if row.item.split == split] for split in SPLITS}
    columns = {name: items for name, items in columns.items() if items}
    if asked.data is None and len(columns.get(SPLIT_NAMES[asked.split], ())) == len(found.rows):
        columns = {
            f"{name} (evaluated)" if name == SPLIT_NAMES[asked.split] else name: columns[name] for name in columns
        }
    else:
        columns["evaluated"] = [item for item, _ in found.rows]
    table = [["images", *(f"{len(items):,}" for items in columns.values())]]
    if any(item.group for items in columns.values() for item in items):
        table.append(
            ["groups", *(f"{len({item.group or item.name for item in items}):,}" for items in columns.values())]
        )
    tables = [HtmlTable(["", *columns], table)]
    for task in found.tasks:
        texts = [[item.labels.get(task.name, "").strip() for item in items] for items in columns.values()]
        tables.append(HtmlTable.cut([task.name, *columns], _labels(task, texts), (0,), "manifest.csv of the run"))
    return tables


def _labels(task: Task, columns: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Yield how often each class occurs in each column of labels, or the range of numbers."""
    if task.classes:
        counts = [Counter(name for text in texts for name in task.classes_of(text)) for texts in columns]
        for name in task.classes:
            yield [name, *(f"{count[name]:,}" for count in counts)]
    else:
        numbers = [np.array([float(text) for text in texts if text]) for texts in columns]
        yield ["mean", *(f"{each.mean():.4g}" if len(each) else "" for each in numbers)]
        yield ["range", *(f"{each.min():.4g} to {each.max():.4g}" if len(each) else "" for each in numbers)]
    missing = [sum(not text for text in texts) for texts in columns]
    if any(missing):
        yield ["without a label", *(f"{count:,}" for count in missing)]


def _facts(found: EvaluatedImages) -> Iterator[str]:
    sizes = sorted({looked.size for looked in found.looked}, key=lambda size: size.width * size.height)
    ends = [f"{size.width:,} x {size.height:,}" for size in (sizes[0], sizes[-1])]
    first = found.looked[0]
    mpp = [looked.mpp for looked in found.looked if looked.mpp is not None]
    at = f" at {from_to(f'{min(mpp):.3g}', f'{max(mpp):.3g}')} microns per pixel" if mpp else ""
    patches, kept = [f.patches for f in found.looked], [f.kept for f in found.looked]
    yield (
        f"Evaluated images have {from_to(*ends)} pixels, and {_range(patches)} patches of {first.side} pixels{at}, of "
        f"which {_range(kept)} were kept."
    )


def _range(numbers: Sequence[int]) -> str:
    return from_to(f"{min(numbers):,}", f"{max(numbers):,}")


# Annotated regions


def _lesions(lesions: Lesions) -> About:
    def row(name: str, *estimates: IntervalEstimate) -> list[str]:
        value, limits = value_and_limits(estimates[0])
        return [
            name,
            value,
            limits,
            *("unknown" if each.value is None else short(each.value) for each in estimates[1:]),
        ]

    several = len(lesions.attention) > 1
    rows = [row("kept patches that touch a region", lesions.kept, lesions.looked_at, lesions.most_kept)]
    for task, estimate in lesions.attention.items():
        of = f" of {task}" if several else ""
        rows.append(row(f"attention{of} inside of regions", estimate, lesions.area, lesions.most_attention))
    about = (
        f"Means over {counted(lesions.images, 'image')} with an annotated region. By chance: of patches chosen at "
        "random, and of equal attention for all patches. At most: regions may be smaller than what is kept. Training "
        "does not use annotations; lesions.csv has a row for each image."
    )
    if lesions.empty:
        about += f" {counted(len(lesions.empty), 'annotation outlines', 'annotations outline')} nothing."
    if lesions.outside:
        lies = "annotation lies outside of its image", "annotations lie outside of their images"
        about += f" {counted(len(lesions.outside), *lies)}: in microns, or of another image?"
    if others := len(lesions.left_out) - len(lesions.outside):
        about += f" {counted(others, 'annotation')} could not be used."
    return About(about, HtmlTable(("", "share", "95 % interval", "by chance", "at most"), rows))


# The run


def _training(run: Path, config: Config | None) -> About | None:
    """Draw the learning curves; None for the folder of a model, or where metrics.csv is damaged."""
    if config is None or not (run / "metrics.csv").is_file():
        return None
    with suppress(KeyholeError):
        done, best = len(Run(run).metrics), Run(run).best.get("epoch")
        about = (
            f"{counted(done, 'epoch')} of {config.train.epochs}; the evaluated model is that of epoch {best or done}."
        )
        return About(about, figures=Run(run).curves())
    return None


def _left_out(run: Path, here: Mapping[str, str]) -> About:
    before: list[dict[str, str]] = []
    with suppress(KeyholeError):
        before = read_rows(run / "left_out.csv", columns=("name", "reason"))
    rows = [(name, reason, "this evaluation") for name, reason in here.items()]
    rows += [(row["name"], row["reason"], "the run") for row in before if here.get(row["name"]) != row["reason"]]
    table = HtmlTable.cut(("image, file or row", "reason", "left out of"), rows, (0, 1, 2), "left_out.csv")
    said = (
        "Nothing was left out." if not rows else f"{counted(len(rows), 'image, file or row', 'images, files or rows')}."
    )
    return About(said, table)


def _changed(config: Config | None) -> HtmlTable:
    pairs: Iterable[Any] = () if config is None else zip(leaves(config), leaves(Config()), strict=True)
    rows = [(name, _text(value), _text(default)) for (name, value), (_, default) in pairs if value != default]
    return HtmlTable(("setting", "value", "default"), rows, (0, 1, 2))


def _text(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _environment(run: Path, now: Mapping[str, Any]) -> About:
    """Return machine and versions of the training and of this evaluation; what is the same in both stands once."""
    then: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        then = json.loads((run / "environment.json").read_text("utf-8"))

    def flat(about: Mapping[str, Any]) -> dict[str, str]:
        plain = {**about, **about.get("versions", {}), "command": " ".join(map(str, about.get("command", ())))}
        return {name: str(value) for name, value in plain.items() if name != "versions"}

    first, second = flat(then), flat(now)
    differ = {name: (first.get(name, ""), value) for name, value in second.items() if value != first.get(name)}
    same = [f"{name} {value}" for name, value in second.items() if name not in differ]
    rows = [[name, *values] for name, values in differ.items()]
    about = f"The same in training and in this evaluation: {', '.join(same)}." if same else ""
    return About(about, HtmlTable(["", "training", "this evaluation"], rows, (0, 1, 2)))
