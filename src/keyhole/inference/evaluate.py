"""How good a run's best model is on images it was not trained on: metrics with intervals, one row per image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keyhole.config.amounts import Bytes
from keyhole.config.file import load_config
from keyhole.config.settings import DataConfig, Decode
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest, read_for_tasks, write_left_out
from keyhole.errors import DataError, KeyholeError, RunError
from keyhole.inference.evaluation_folder import Subject, finish, open_folder, seen_in_training, unfinished
from keyhole.inference.lesions import (
    Judged,
    Lesions,
    judge,
    lesion_means,
    lesion_table,
)
from keyhole.inference.predictor import Predictor, load
from keyhole.patches.foreground.region_files import read_regions
from keyhole.report.contact_sheet import Examples, contact_sheet
from keyhole.report.table import TableRow, judge_rows, table_row, write_table
from keyhole.runs.seal import check_images, check_own_manifest
from keyhole.tasks.evaluation import TaskMetrics, evaluate_task, evaluation_json, format_lines
from keyhole.tasks.kinds import Task
from keyhole.util.files import csv_text, file_names, writable_folder, write_atomic
from keyhole.util.progress import say
from keyhole.util.version import VERSION
from keyhole.util.wording import counted


@dataclass(frozen=True)
class Evaluation:
    """Where an evaluation was written, and what it found.

    Attributes:
        path: Folder with metrics.json, predictions.csv, confusion_TASK.csv, left_out.csv, contact_sheet.png, and
            lesions.csv where images are annotated. TASK is the task's name as a file can have it; metrics.json lists
            the files under `confusion_files`.
        metrics: One per task.
        left_out: Images that could not be read, with the reason.
        notes: What a reader of the figures should know.
        lesions: How much of the attention lies in annotated lesions; None where no image has an annotation.
        warnings: Evidence against the model, such as that it is no better than guessing.
    """

    path: Path
    metrics: tuple[TaskMetrics, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()
    lesions: Lesions | None = None
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the figures, as `accuracy 0.935 [0.900 0.965]`, and where the files are."""
        lines = [*self.notes, *format_lines(self.metrics)]
        if self.lesions is not None:
            lines += self.lesions.lines()
        if self.left_out:
            lines.append(f"left out {counted(len(self.left_out))}; see {self.path / 'left_out.csv'}")
        lines += [f"contact sheet: {self.path / 'contact_sheet.png'}", f"all files: {self.path}"]
        return [*lines, *self.warnings]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the best model of a run.

    Attributes:
        run: Run folder, or with `data` the folder of a model. It may be read-only where `out` is given.
        data: Other labelled images; default is the run's own. Their labels must be of the model's tasks.
        split: `train`, `val` or `test`; other data without splits count as `test`.
        out: Folder to write to; default is RUN/evaluation/SPLIT, or RUN/evaluation/NAME for other data. Results of the
            same run, data and split are replaced; a folder with results of anything else is refused.
        on_bad_image: What an unreadable image or annotation does. With "skip" a broken annotation is listed in
            lesions.csv, and its image still counts for the metrics.
        root: With `data`, the folder that relative paths of a CSV start from; else the folder that the run's own
            images were moved to, where they are found by relative path, size and SHA-256.
        features, masks: Folders for `data`, as `data.features` and `data.masks` of a run.
        device, memory, unreadable, decode: As for `keyhole.load`.
    """

    run: Path
    data: Path | None = None
    split: str = "test"
    out: Path | None = None
    on_bad_image: Literal["fail", "skip"] = "fail"
    root: str | Path | None = None
    features: str | Path | None = None
    masks: str | Path | None = None
    device: str = "auto"
    memory: str | Bytes | None = "auto"
    unreadable: str | float = "1%"
    decode: Decode = "auto"

    def __call__(self) -> Evaluation:
        subject = Subject(self.run, self.data, self.split)
        predictor = load(self.run, self.device, self.memory, self.unreadable, self.decode)
        tasks, names = predictor.tasks, [task.name for task in predictor.tasks]
        manifest = self._manifest(predictor)
        folder, replaced = open_folder(subject, self.out)
        begun = unfinished(self.run)
        notes = [f"{self.run}: {begun}"] if begun else []
        if self.data is not None:
            notes += [note] if (note := seen_in_training(self.run, manifest.items)) else []
            notes += manifest.notes
        keeps_test = self.data is None and self.out is None and self.split == "test" and not begun
        if keeps_test:
            writable_folder(self.run / "predictions")
        for item in manifest.items:  # before hours are spent on predicting
            if self.on_bad_image == "fail" and item.annotation is not None:
                read_regions(item.annotation)
        found = _Predictions(tasks[0], manifest)
        write_table(self._rows(predictor, found), folder / "predictions.csv")
        if (
            keeps_test
        ):  # those of train and val are written at the end of training, by the model that the run ended with
            write_atomic(self.run / "predictions" / "test.csv", (folder / "predictions.csv").read_bytes())
        notes += [f"{count} of {len(found.rows)} images: {text}" for text, count in found.doubts.items()]
        items = [item for item, _ in found.rows]
        targets, groups = manifest.targets(items), [item.group for item in items]
        said = {task: [row.probability[task.name] for _, row in found.rows] for task in tasks}
        metrics = tuple(evaluate_task(task, targets[task.name], said[task], groups) for task in tasks)
        learning = judge_rows(tasks, targets, found.rows, f"the {len(items)} {self.split} images")
        of = {item.name: item.group for item in items}
        lesions = lesion_means(found.judged, of, names) if found.judged else None
        config = None  # the settings of a run, used for advice alone; the folder of a model does not have them
        with suppress(KeyholeError):
            config = load_config(path) if (path := self.run / "config.yaml").is_file() else None
        confusions = _write_confusions(folder, metrics)
        about: dict[str, Any] = {"keyhole": VERSION, "model": predictor.name, **subject.to_json()}
        about |= {"notes": notes, "left_out": found.left_out}
        about |= {} if lesions is None else {"lesions": lesions.to_json()}
        about |= {"confusion_files": confusions, "learning": learning.to_json(config)}
        text = json.dumps(evaluation_json(metrics, **about), indent=2, allow_nan=False)
        write_atomic(folder / "metrics.json", text + "\n")
        write_left_out(folder / "left_out.csv", found.left_out.items())
        written = [*confusions.values()]
        if lesions is not None:
            write_atomic(folder / "lesions.csv", lesion_table(found.judged, names))
            written.append("lesions.csv")
        if shown := found.examples.entries():
            title = f"{predictor.name}: {self.split} images, wrong ones first, and the patches that were kept"
            contact_sheet(shown, folder / "contact_sheet.png", title)
            written.append("contact_sheet.png")
        finish(folder, written)
        return Evaluation(folder, metrics, found.left_out, (*replaced, *notes), lesions, tuple(learning.lines(config)))

    def _manifest(self, predictor: Predictor) -> Manifest:
        own = self.data is None
        path = self.run / "manifest.csv" if self.data is None else self.data
        if own and not path.is_file():
            raise RunError(f"{self.run}: no manifest.csv in it, so the images to evaluate are not known. Give --data.")
        if own:
            check_own_manifest(self.run)
        folders = {name: getattr(self, name) for name in ("root", "features", "masks")}
        given: dict[str, Any] = {name: None if folder is None else Path(folder) for name, folder in folders.items()}
        config = DataConfig(path=path, on_bad_image=self.on_bad_image, **given)
        manifest = read_for_tasks(config, predictor.tasks, (self.split,), run=own)
        if own:
            remedy = "Put the old files back, or evaluate the new ones as other data: --data."
            for line in check_images(self.run, manifest.items, predictor.config.run, remedy):
                say(line)
        return manifest

    def _rows(self, predictor: Predictor, found: _Predictions) -> Iterator[TableRow]:
        """Predict, and yield one row per image."""
        skip, items = self.on_bad_image == "skip", found.manifest.items
        for item, prediction in predictor.predict_items(
            items,
            left_out=found.leave_out if skip else None,
            description=f"evaluating {self.split}",
            pictures=found.examples.wants,
        ):
            found.examples.add(item, prediction)
            found.doubts.update(prediction.notes)
            if item.annotation is not None:
                found.judged[item.name] = judge(prediction, item.annotation, self.on_bad_image)
            row = table_row(prediction, item.labels)
            found.rows.append((item, row))
            yield row
        if not found.rows:
            where, first = self.data or self.run, next(iter(found.left_out.values()))
            raise DataError(f"{where}: none of the {len(items)} {self.split} images can be used; the first: {first}")


class _Predictions:
    """What an evaluation keeps of its predictions, each image being predicted once."""

    def __init__(self, task: Task, manifest: Manifest) -> None:
        self.manifest, self.examples = manifest, Examples(task)
        self.left_out = {left.name: left.reason for left in manifest.left_out}
        self.judged: dict[str, Judged] = {}
        self.rows: list[tuple[Item, TableRow]] = []
        self.doubts: Counter[str] = Counter()

    def leave_out(self, item: Item, error: KeyholeError) -> None:
        self.left_out[item.name] = str(error)


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    split: str = "test",
    out: str | Path | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate the best model of a run.

    Args:
        run, data, split, out: See `Evaluator`.
        settings: Other attributes of `Evaluator`: `on_bad_image`, `root`, `features`, `masks`, `device`, `memory`,
            `unreadable`, `decode`.

    Returns:
        The metrics with their intervals, and where everything was written.

    Raises:
        RunError: There is no model or no such split, the data are of other tasks, or the run's own images changed.
        ImageError: An image cannot be read and `on_bad_image` is "fail".
        DataError: Likewise an annotation; or images that were moved are not in `root`.
        OutputError: The folder cannot be written, or holds results of something else.

    Example:
        >>> evaluation = keyhole.evaluate("runs/one", device="cpu")
        >>> auroc = evaluation.metrics[0].overall["auroc"]
        >>> auroc.low <= auroc.value <= auroc.high
        True
    """
    return Evaluator(
        Path(run), None if data is None else Path(data), split, None if out is None else Path(out), **settings
    )()


def _write_confusions(folder: Path, metrics: Sequence[TaskMetrics]) -> dict[str, str]:
    """Write a table for each task whose confusion is one; return their names by task."""
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
