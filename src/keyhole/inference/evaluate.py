"""Evaluate a run's best model on images that it was not trained on: metrics with intervals, one row per image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keyhole.config.file import load_config
from keyhole.config.inference import EvaluateSettings
from keyhole.config.settings import DataConfig
from keyhole.data.companions import unused_masks
from keyhole.data.manifest import Manifest, read_for_tasks, write_left_out
from keyhole.errors import DataError, KeyholeError, RunError
from keyhole.inference.evaluated import EvaluatedImages
from keyhole.inference.evaluation_folder import (
    Subject,
    empty_scores,
    finish,
    groups_in_training,
    open_folder,
    seen_in_training,
    unfinished,
)
from keyhole.inference.evaluation_report import Findings, evaluation_report
from keyhole.inference.lesions import Lesions, lesion_means, lesion_table
from keyhole.inference.predictor import Predictor, load
from keyhole.inference.thresholds import TaskPoints, operating_points
from keyhole.patches.foreground.annotations import check_annotation
from keyhole.report.contact_sheet import contact_sheet
from keyhole.report.table import TableRow, judge_rows, write_table
from keyhole.runs.checkpoint import model_file, read_info
from keyhole.runs.seal import check_images, check_own_manifest
from keyhole.tasks.evaluation import TaskMetrics, evaluate_task, evaluation_json, format_lines
from keyhole.util.files import csv_text, encoded, file_names, writable_folder, write_atomic
from keyhole.util.progress import say
from keyhole.util.version import VERSION
from keyhole.util.wording import counted

SHOWN = {"report": "report.html", "contact sheet": "contact_sheet.png"}
"""Files that are named on the terminal."""


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        path: Folder with report.html, metrics.json, predictions.csv, confusion_TASK.csv, left_out.csv,
            contact_sheet.png, and lesions.csv where images are annotated. TASK is the task's name as a file can have
            it; metrics.json lists the files under `confusion_files`. scores/ROW.npz holds the score of every patch of
            the image in that row of predictions.csv, the first being 1; `keyhole view` shows them.
        metrics: One per task.
        left_out: Images that could not be read, with the reason.
        notes: Remarks that readers of the figures should know.
        lesions: Share of the attention in annotated regions; None if no image has an annotation.
        operating_points: By task, thresholds chosen on the validation split, and what they reach here.
        warnings: Evidence against the model, such as that it is no better than guessing.
    """

    path: Path
    metrics: tuple[TaskMetrics, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()
    lesions: Lesions | None = None
    warnings: tuple[str, ...] = ()
    operating_points: Mapping[str, TaskPoints] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return for example `Evaluation('runs/one/evaluation/test', label: accuracy 0.935 [0.900 0.965])`."""
        found = [
            f"{each.task.name}: {metric} {value}" for each in self.metrics for metric, value in each.overall.items()
        ]
        return f"Evaluation({str(self.path)!r}, {', '.join(found)})"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return the figures, as `accuracy 0.935 [0.900 0.965]`, and where the files are."""
        lines = [*self.notes, *format_lines(self.metrics)]
        lines += [
            line for name, found in self.operating_points.items() for line in found.lines(name, len(self.metrics))
        ]
        if self.lesions is not None:
            lines += self.lesions.lines()
        if self.left_out:
            lines.append(f"left out {counted(len(self.left_out))}; see {self.path / 'left_out.csv'}")
        lines += [f"{name}: {self.path / file}" for name, file in SHOWN.items()]
        lines.append(f"all files: {self.path}")
        return [*lines, *self.warnings]


def evaluate(
    run: str | os.PathLike[str],
    data: str | Path | None = None,
    split: str = "test",
    out: str | Path | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate the best model of a run.

    Args:
        run: Run folder, or with `data` the folder of a model. It may be read-only where `out` is given.
        data: Other labelled images; default is the run's own. Their labels must be of the model's tasks.
        split: `train`, `val` or `test`; other data without splits count as `test`.
        out: Folder to write to; default is RUN/evaluation/SPLIT, or RUN/evaluation/NAME for other data. Results of the
            same run, data and split are replaced; a folder with results of anything else is refused.
        settings: Other fields of `EvaluateSettings`: `on_bad_image`, `root`, `features`, `masks`, `device`, `memory`,
            `unreadable`, `decode`.

    Returns:
        The metrics with their intervals, and where everything was written.

    Raises:
        RunError: There is no model or no such split, the data are of other tasks, or the run's own images changed.
        ImageError: An image cannot be read and `on_bad_image` is "fail".
        DataError: An annotation cannot be read and `on_bad_image` is "fail", or moved images are not in `root`.
        OutputError: The folder cannot be written, or holds results of something else.

    Example:
        >>> evaluation = keyhole.evaluate("runs/one", device="cpu")
        >>> auroc = evaluation.metrics[0].overall["auroc"]
        >>> auroc.low <= auroc.value <= auroc.high
        True
    """
    paths = {"data": data, "out": out}
    settings |= {name: Path(path) for name, path in paths.items() if path is not None}
    asked = EvaluateSettings(run=Path(run), split=split, **settings)
    subject = Subject(asked.run, asked.data, asked.split)
    predictor = load(asked.run, asked.device, asked.memory, asked.unreadable, asked.decode)
    tasks, names = predictor.tasks, [task.name for task in predictor.tasks]
    predictor.check_masks("--masks", asked.masks)
    manifest = _manifest(asked, predictor)
    folder, replaced = open_folder(subject, asked.out)
    begun = unfinished(asked.run)
    notes = [f"{asked.run}: {begun}"] if begun else []
    if asked.data is not None:
        seen = (seen_in_training(asked.run, manifest.items), groups_in_training(asked.run, manifest.items))
        notes += filter(None, seen)
        notes += manifest.notes
    keeps_test = asked.data is None and asked.out is None and asked.split == "test" and not begun
    if keeps_test:
        writable_folder(asked.run / "predictions")
    for item in manifest.items:  # a mistake shows before hours of predicting
        if asked.on_bad_image == "fail" and item.annotation is not None:
            check_annotation(item.annotation)
    found = EvaluatedImages(tasks, manifest, empty_scores(folder), asked.on_bad_image)
    write_table(_rows(asked, predictor, found), folder / "predictions.csv")
    if keeps_test:  # training writes those of train and val
        write_atomic(asked.run / "predictions" / "test.csv", (folder / "predictions.csv").read_bytes())
    notes += unused_masks(manifest.items, predictor.config.patch.foreground, trained=True)
    notes += found.doubts.lines(len(found.rows))
    table = found.table()
    metrics = tuple(
        evaluate_task(task, table.targets[task.name], table.probability[task.name], table.groups) for task in tasks
    )
    points = operating_points(asked.run, table, asked.split if asked.data is None else None)
    learning = judge_rows(tasks, table.targets, found.rows, f"the {len(table)} {asked.split} images")
    of = {item.name: item.group for item, _ in found.rows}
    lesions = lesion_means(found.judged, of, names) if found.judged else None
    config = None  # only for advice; the folder of a model does not have one
    with suppress(KeyholeError):
        config = load_config(path) if (path := asked.run / "config.yaml").is_file() else None
    confusions = _write_confusions(folder, metrics)
    epoch = read_info(model_file(asked.run)).get("epoch")
    about: dict[str, Any] = {"keyhole": VERSION, "model": predictor.name, "epoch": epoch, **subject.to_json()}
    about |= {"notes": notes, "left_out": found.left_out}
    about |= {} if lesions is None else {"lesions": lesions.to_json()}
    about |= {"confusion_files": confusions, "learning": learning.to_json(config)}
    about |= {"operating_points": {task: each.to_json() for task, each in points.items()}}
    text = json.dumps(evaluation_json(metrics, **about), indent=2, allow_nan=False)
    write_atomic(folder / "metrics.json", text + "\n")
    write_left_out(folder / "left_out.csv", found.left_out.items())
    written = [*confusions.values()]
    if lesions is not None:
        write_atomic(folder / "lesions.csv", lesion_table(found.judged, names))
        written.append("lesions.csv")
    if shown := found.examples.entries():
        title = f"{predictor.name}: {asked.split} images, wrong ones first, and the patches that were kept"
        contact_sheet(shown, folder / "contact_sheet.png", title)
        written.append("contact_sheet.png")
    findings = Findings(table, metrics, points, learning, lesions, notes, config)
    write_atomic(folder / "report.html", encoded(evaluation_report(asked, predictor, found, findings)))
    finish(folder, written)
    return Evaluation(
        folder, metrics, found.left_out, (*replaced, *notes), lesions, tuple(learning.lines(config)), points
    )


def _manifest(asked: EvaluateSettings, predictor: Predictor) -> Manifest:
    own = asked.data is None
    path = asked.run / "manifest.csv" if asked.data is None else asked.data
    if own and not path.is_file():
        raise RunError(f"{asked.run}: no manifest.csv in it, so the images to evaluate are not known. Give --data.")
    if own:
        check_own_manifest(asked.run)
    given = {name: getattr(asked, name) for name in ("on_bad_image", "root", "features", "masks")}
    config = DataConfig(path=path, **given)
    manifest = read_for_tasks(config, predictor.tasks, (asked.split,), run=own)
    if own:
        remedy = "Put the old files back, or evaluate the new ones as other data: --data."
        for line in check_images(asked.run, manifest.items, predictor.config.run, remedy):
            say(line)
    return manifest


def _rows(asked: EvaluateSettings, predictor: Predictor, found: EvaluatedImages) -> Iterator[TableRow]:
    """Predict, and yield one row per image."""
    skip, items = asked.on_bad_image == "skip", found.manifest.items
    for item, prediction in predictor.predict_items(
        items,
        left_out=found.leave_out if skip else None,
        description=f"evaluating {asked.split}",
        pictures=found.wants_pictures,
    ):
        yield found.add(item, prediction)
    if not found.rows:
        where, first = asked.data or asked.run, next(iter(found.left_out.values()))
        raise DataError(f"{where}: none of the {len(items)} {asked.split} images can be used; the first: {first}")


def _write_confusions(folder: Path, metrics: Sequence[TaskMetrics]) -> dict[str, str]:
    """Write the confusion table of each task with exclusive classes; return the files' names by task."""
    names = file_names([result.task.name for result in metrics], "task")
    written = {}
    for name, result in zip(names, metrics, strict=True):
        if result.confusion is not None and result.task.exclusive:
            classes = result.task.classes
            rows = [["true \\ predicted", *classes]]
            rows += [[name, *counts] for name, counts in zip(classes, result.confusion.tolist(), strict=True)]
            written[result.task.name] = f"confusion_{name}.csv"
            write_atomic(folder / written[result.task.name], csv_text(rows))
    return written
