"""How good a run's best model is on images it has not learned from: metrics with intervals, one row per image."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keyhole.config.file import load_config
from keyhole.config.settings import Config, Decode
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest, read_for_tasks, write_left_out
from keyhole.errors import DataError, KeyholeError, RunError
from keyhole.inference.evaluation_folder import Subject, finish, open_folder
from keyhole.inference.evaluation_notes import seen_in_training, unfinished
from keyhole.inference.lesions import (
    Judged,
    Lesions,
    check_annotations,
    judge,
    lesion_means,
    lesion_table,
)
from keyhole.inference.predictor import Predictor
from keyhole.report.contact_sheet import Examples, contact_sheet
from keyhole.report.prediction import Prediction
from keyhole.report.table import write_table
from keyhole.runs.seal import check_evaluated, check_own_manifest
from keyhole.tasks.evaluation import TaskMetrics, evaluate_task, evaluation_json, format_lines
from keyhole.tasks.kinds import Task
from keyhole.tasks.learning import Learning, judge_task, unevenness
from keyhole.util.files import file_names, writable_folder, write_atomic
from keyhole.util.progress import say
from keyhole.util.version import VERSION
from keyhole.util.wording import counted


@dataclass(frozen=True)
class Evaluation:
    """Where an evaluation was written, and what it found.

    Attributes:
        path: folder with metrics.json, predictions.csv, confusion_TASK.csv, left_out.csv, contact_sheet.png, and
            lesions.csv where images are annotated. TASK is the task's name as a file can have it; metrics.json lists
            the files under `confusion_files`.
        metrics: one per task.
        left_out: images that could not be read, with the reason.
        notes: what a reader of the figures should know.
        lesions: how much of the attention lies in annotated lesions; None where no image has an annotation.
        warnings: what speaks against the model, such as that it is no better than guessing.
    """

    path: Path
    metrics: tuple[TaskMetrics, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...] = ()
    lesions: Lesions | None = None
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The figures, as `accuracy 0.935 [0.900 0.965]`, and where the files are."""
        lines = [*self.notes, *format_lines(self.metrics)]
        if self.lesions is not None:
            lines += self.lesions.lines()
        if self.left_out:
            lines.append(f"left out {counted(len(self.left_out))}; see {self.path / 'left_out.csv'}")
        lines += [f"contact sheet: {self.path / 'contact_sheet.png'}", f"all files: {self.path}"]
        return [*lines, *self.warnings]


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    split: str = "test",
    out: str | Path | None = None,
    device: str = "auto",
    on_bad_image: Literal["fail", "skip"] = "fail",
    root: str | Path | None = None,
    memory: str = "auto",
    unreadable: str = "1%",
    features: str | Path | None = None,
    masks: str | Path | None = None,
    decode: Decode = "auto",
) -> Evaluation:
    """Evaluates the best model of a run.

    Args:
        run: run folder, or with `data` the folder of a model. It may be read-only where `out` is given.
        data: other labelled images; default the run's own. Their labels must be of the model's tasks.
        split: `train`, `val` or `test`; other data without splits count as `test`.
        out: folder to write to; default RUN/evaluation/SPLIT, or RUN/evaluation/NAME for other data. Results of the
            same run, data and split are replaced; a folder with results of anything else is refused.
        device: where to compute.
        on_bad_image: what an unreadable image or annotation does. With "skip" a broken annotation is listed in
            lesions.csv, and its image still counts for the metrics.
        root: with `data`, the folder that relative paths of a CSV start from; else the folder that the run's own
            images were moved to, where they are found by relative path, size and SHA-256.
        memory, unreadable, decode: as in `keyhole.load`.
        features, masks: folders for `data`, as `data.features` and `data.masks` of a run.

    Raises:
        RunError: no model, no such split, data of other tasks, or the run's own images changed.
        ImageError: an image cannot be read and `on_bad_image` is "fail".
        DataError: likewise an annotation; or images that were moved are not in `root`.
        OutputError: the folder cannot be written, or holds results of something else.
    """
    run = Path(run)
    subject = Subject(run, None if data is None else Path(data), split)
    predictor = Predictor.open(run, device, memory, unreadable, decode)
    given = {"root": root, "features": features, "masks": masks}
    folders = {name: None if path is None else Path(path) for name, path in given.items()}
    if data is None and (run / "manifest.csv").is_file():
        check_own_manifest(run)
    manifest = _manifest(run, data, predictor.tasks, split, on_bad_image, folders)
    if data is None:
        for line in check_evaluated(run, manifest, predictor.config.run):
            say(line)
    items = manifest.items
    folder, replaced = open_folder(subject, out)
    begun = unfinished(run)
    notes = _notes(run, subject, manifest, begun)
    keeps_test = data is None and out is None and split == "test" and not begun
    if keeps_test:
        writable_folder(run / "predictions")
    left_out = {left.name: left.reason for left in manifest.left_out}
    seen: list[tuple[Item, dict[str, np.ndarray]]] = []
    if on_bad_image == "fail":
        check_annotations(items)
    judged: dict[str, Judged] = {}
    uneven: list[dict[str, float]] = []
    doubts: Counter[str] = Counter()
    examples = Examples(predictor.tasks[0])

    def predictions() -> Iterator[Prediction]:
        def tell(item: Item, error: KeyholeError) -> None:
            left_out[item.name] = str(error)

        for item, prediction in predictor.predict_items(
            items,
            on_bad_image=on_bad_image,
            left_out=tell,
            description=f"evaluating {split}",
            pictures=examples.wants,
        ):
            examples.add(item, prediction)
            seen.append((item, {name: np.array(list(of.values())) for name, of in prediction.probability.items()}))
            uneven.append(unevenness(prediction.kept.attention))
            doubts.update(prediction.notes)
            if item.annotation is not None:
                judged[item.name] = judge(prediction, item.annotation, on_bad_image)
            yield prediction
        if not seen:
            first = next(iter(left_out.values()))
            raise DataError(f"{data or run}: none of the {len(items)} {split} images can be used; the first: {first}")

    truth = {str(item.image): item.labels for item in items}
    write_table(predictions(), folder / "predictions.csv", lambda prediction: truth[str(prediction.image)])
    if keeps_test:  # those of train and val are written at the end of training, by the model that the run ended with
        write_atomic(run / "predictions" / "test.csv", (folder / "predictions.csv").read_bytes())
    metrics = tuple(_metrics(task, manifest, seen) for task in predictor.tasks)
    lesions = None
    if judged:
        names = [task.name for task in predictor.tasks]
        lesions = lesion_means(judged, {item.name: item.group for item, _ in seen}, names)
        write_atomic(folder / "lesions.csv", lesion_table(judged, names))
    about: dict[str, Any] = {"keyhole": VERSION, "model": predictor.name, **subject.to_json()}
    notes += [f"{count} of {len(seen)} images: {text}" for text, count in doubts.items()]
    about |= {"notes": notes, "left_out": left_out} | ({} if lesions is None else {"lesions": lesions.to_json()})
    tables = dict(zip(predictor.tasks, file_names([task.name for task in predictor.tasks], "task"), strict=True))
    about["confusion_files"] = {
        result.task.name: f"confusion_{tables[result.task]}.csv" for result in metrics if _has_table(result)
    }
    learning = _learning(predictor.tasks, manifest, seen, uneven, split)
    config = _config_of(run)
    about["learning"] = learning.to_json(config)
    found = evaluation_json(metrics, **about)
    write_atomic(folder / "metrics.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_left_out(folder / "left_out.csv", left_out.items())
    for result in metrics:
        if _has_table(result):
            write_atomic(folder / about["confusion_files"][result.task.name], _confusion(result))
    title = f"{predictor.name}: {split} images, wrong ones first, and the patches that were kept"
    shown = examples.entries()
    if shown:
        contact_sheet(shown, folder / "contact_sheet.png", title)
    lesions_written, sheet_written = ["lesions.csv"] * bool(judged), ["contact_sheet.png"] * bool(shown)
    finish(folder, [*about["confusion_files"].values(), *lesions_written, *sheet_written])
    return Evaluation(folder, metrics, left_out, (*replaced, *notes), lesions, tuple(learning.lines(config)))


def _notes(run: Path, subject: Subject, manifest: Manifest, begun: str) -> list[str]:
    """What is to be said before the figures; `begun` is what `unfinished` says."""
    notes = [f"{run}: {begun}"] if begun else []
    if subject.data is not None:
        notes += [note] if (note := seen_in_training(run, manifest.items)) else []
        notes += manifest.notes
    return notes


def _manifest(
    run: Path,
    data: str | Path | None,
    tasks: Sequence[Task],
    split: str,
    on_bad_image: Literal["fail", "skip"],
    folders: Mapping[str, Path | None],
) -> Manifest:
    path = run / "manifest.csv" if data is None else Path(data)
    if data is None and not path.is_file():
        raise RunError(f"{run}: no manifest.csv in it, so the images to evaluate are not known. Give --data.")
    given: dict[str, Any] = {"path": path, "on_bad_image": on_bad_image, **folders}
    config = dataclasses.replace(Config().data, **given)
    return read_for_tasks(config, tasks, (split,), run=data is None)


def _metrics(task: Task, manifest: Manifest, seen: Sequence[tuple[Item, dict[str, np.ndarray]]]) -> TaskMetrics:
    targets = manifest.targets([item for item, _ in seen])[task.name]
    probabilities = np.stack([probability[task.name] for _, probability in seen])
    return evaluate_task(task, targets, probabilities, [item.group for item, _ in seen])


def _learning(
    tasks: Sequence[Task],
    manifest: Manifest,
    seen: Sequence[tuple[Item, dict[str, np.ndarray]]],
    uneven: Sequence[Mapping[str, float]],
    split: str,
) -> Learning:
    groups = [item.group for item, _ in seen]
    labels = manifest.targets([item for item, _ in seen])
    return Learning(
        f"the {len(seen)} {split} images",
        tuple(
            judge_task(
                task,
                labels[task.name],
                np.stack([probability[task.name] for _, probability in seen]),
                [each[task.name] for each in uneven],
                groups,
            )
            for task in tasks
        ),
    )


def _config_of(run: Path) -> Config | None:
    """The settings of a run, for advice alone: what the folder of a model does not have is not missed."""
    path = run / "config.yaml"
    with suppress(KeyholeError):
        return load_config(path) if path.is_file() else None
    return None


def _has_table(result: TaskMetrics) -> bool:
    """Whether the confusion of a task is one table."""
    return result.confusion is not None and result.task.exclusive


def _confusion(result: TaskMetrics) -> str:
    assert result.confusion is not None
    header = ["true \\ predicted", *result.task.classes]
    return _csv(
        [header, *([name, *row] for name, row in zip(result.task.classes, result.confusion.tolist(), strict=True))]
    )


def _csv(rows: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
