"""Validate after each epoch; after the last one, predict every image of the training and validation splits.

A journal holds the results of images with very many patches, so that a resumed run does not read them again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keyhole.data.item import Item
from keyhole.errors import DataError
from keyhole.inference.predictor import load
from keyhole.inference.thresholds import store_thresholds
from keyhole.nn import total_loss
from keyhole.report.table import TableRow, judge_rows, labelled_row, write_table
from keyhole.runs.journal import MIN_JOURNAL_PATCHES, RowJournal
from keyhole.tasks.evaluation import point_metrics
from keyhole.training.health import compared_names, few_items, figures, measure
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import Job
from keyhole.training.samples import Samples
from keyhole.training.setup import targets
from keyhole.training.trial import blind_epochs
from keyhole.util.files import write_atomic


def validate_epoch(job: Job, interrupt: Interrupt, weights: Mapping[str, Tensor], samples: Samples) -> dict[str, float]:
    """Return loss and metrics on the split that `train.watch` names and the figures of `health`, and draw `samples`.

    Raises:
        DataError: none of its images can be read.
        TooMuchUnreadable: more of this epoch's patches are unreadable than allowed.
    """
    split, state, pixels = job.config.train.watch, job.state, job.config.model.feature_width is None
    items = [item for item in job.manifest.split(split) if job.usable(item)]
    chosen = blind_epochs(job.config) < state.epoch + 1  # else attention is uniform, and keeps the first patches
    if not items:
        some = few_items([item for item in job.manifest.split("train") if job.usable(item)], job.images.counts)
        measured = [row["health"] for _, row in _answers(job, interrupt, some, samples, chosen)] if chosen else []
        row, state.kept = figures(measured, state.kept, pixels)
        return row if some else {}
    answers = _answers(job, interrupt, items, samples, chosen)
    seen = [each[place] for each, row in answers for place in row["seen"]]
    if not seen:
        raise DataError(
            f"{job.run.path}: every image of the {split} split has failed; see left_out.csv and unreadable.csv"
        )
    logits = _joined(job, [row["logits"] for _, row in answers])
    labels = targets(job.manifest, seen)

    def loss(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> float:
        return total_loss(job.tasks, logits, labels, {name: weight.cpu() for name, weight in weights.items()}).item()

    row = {f"{split}.loss": loss(logits, labels)}
    for task in job.tasks:
        metrics = point_metrics(task, labels[task.name].numpy(), task.probability(logits[task.name].numpy()))
        row |= {f"{split}.{task.name}.{name}": value for name, value in metrics.items()}
    gain, measured = math.nan, [row["health"] for _, row in answers if chosen]
    place = {item.name: number for number, item in enumerate(seen)}
    rows = [place[name] for each in measured for name in each["compared"]]
    if rows:
        of_rows = {name: values[rows] for name, values in labels.items()}
        random = _joined(job, [each["random"] for each in measured])
        gain = loss(random, of_rows) - loss({name: values[rows] for name, values in logits.items()}, of_rows)
    found, state.kept = figures(measured, state.kept, pixels, gain)
    return row | found


def _answers(
    job: Job, interrupt: Interrupt, items: Sequence[Item], samples: Samples, compare: bool
) -> list[tuple[list[Item], dict[str, Any]]]:
    """Return what the model says about each batch of images: logits and, with `compare`, the `measure` of health."""
    watched = items[0].split == job.config.train.watch if items else False
    compared = compared_names(job.manifest.split(items[0].split), job.config.select.m) if items else ()
    journal = RowJournal(job.run.path / "validation.jsonl", {"epoch": job.state.epoch, "compare": compare})
    done = {tuple(row["names"]): row for row in journal.read()}
    batches = _batches(job, items)
    todo = [each for each in batches if tuple(item.name for item in each) not in done]
    openers = [[job.images.opener(item) for item in each] for each in todo]
    stream = job.engine.infer(
        openers, "mask", keep_logits=bool(samples.items), on_chunk=interrupt.check, compare=compare
    )
    for each, found in zip(todo, stream, strict=True):
        if watched:  # else training has noted it
            job.note_unreadable(each, found.batch)
        samples.add(each, found)
        result: dict[str, Any] = {
            "names": [item.name for item in each],
            "seen": list(found.bags.rows),
            "logits": {name: values.tolist() for name, values in found.logits.items()},
            "health": measure(found, each, compared) if compare else None,
        }
        done[tuple(result["names"])] = result
        if sum(job.images.counts[item.name] for item in each) >= MIN_JOURNAL_PATCHES:
            journal.add(result)
    samples.draw()
    return [(each, done[tuple(item.name for item in each)]) for each in batches]


def _joined(job: Job, parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the logits of all batches."""
    return {
        task.name: torch.tensor([values for part in parts if part for values in part[task.name]]) for task in job.tasks
    }


def _batches(job: Job, items: Sequence[Item]) -> list[list[Item]]:
    """Return batches of images; an image with very many patches is a batch alone."""
    found: list[list[Item]] = []
    full = True
    for item in items:
        alone = job.images.counts[item.name] >= MIN_JOURNAL_PATCHES
        if full or alone:
            found.append([])
        found[-1].append(item)
        full = alone or len(found[-1]) == job.config.train.batch
    return found


def predict_splits(job: Job, interrupt: Interrupt) -> None:
    """Predict the training and validation images with the best model, whose weights go into the job's model."""
    job.end_learning()
    predictor = load(job.run.path, decode=job.config.run.decode, engine=job.engine)
    predictor.config = predictor.config.replace(unreadable="100%")
    predictor.silent = True  # training has warned already
    folder = job.run.path / "predictions"
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        items = [item for item in job.manifest.split(split) if item.name not in job.state.left_out]
        if not items or (folder / f"{split}.csv").is_file():
            continue
        grouped = any(item.group for item in items)
        journal = RowJournal(folder / f".{split}.jsonl", {"epoch": job.state.best_epoch})
        done = {each["row"]["cells"][0]: TableRow(**each["row"]) for each in journal.read()}
        found = predictor.predict_items(
            [item for item in items if item.name not in done],
            engine=job.engine,
            images=job.images.store,
            left_out=lambda item, error: job.leave_out(item.name, str(error)),
            on_chunk=interrupt.check,
            description=f"predicting {split}",
        )
        for item, prediction in found:
            done[item.name] = labelled_row(prediction, item, grouped)
            if job.images.counts[item.name] >= MIN_JOURNAL_PATCHES:
                journal.add({"row": dataclasses.asdict(done[item.name])})
        rows = [(item, done[item.name]) for item in items if item.name in done]
        write_learning(job, split, rows)
        write_table((row for _, row in rows), folder / f"{split}.csv")
        journal.end()
    store_thresholds(job.run.path, tuple(job.tasks))


def write_learning(job: Job, split: str, rows: Sequence[tuple[Item, TableRow]]) -> None:
    """Write learning.json: whether the best model is better than guessing on the images of a split.

    The validation split decides. If its labels do not allow that, such as labels of one class, the training split does.
    """
    rows = [(item, row) for item, row in rows if row.probability]
    if not rows:
        return
    labels = job.manifest.targets([item for item, _ in rows])
    where = f"the {len(rows)} {'validation' if split == 'val' else 'training'} images"
    learning = judge_rows(job.tasks, labels, rows, where)
    path = job.run.path / "learning.json"
    if split == "val" and not learning.judged and path.is_file():
        return
    found = {"epoch": job.state.best_epoch, "split": split, **learning.to_json(job.config)}
    write_atomic(path, json.dumps(found, indent=2) + "\n")
