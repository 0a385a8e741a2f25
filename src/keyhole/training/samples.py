"""After each validation, draw what the model keeps of a few fixed images: RUN/samples.png.

The predictions are those of the validation: no image is opened for the picture, and the model does not run again.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from keyhole.data.item import Item
from keyhole.engine import Inference
from keyhole.errors import RunError
from keyhole.inference.answer import Answers
from keyhole.report.predicted import Pictures, Predicted
from keyhole.report.sample_sheet import Look, SampleRow, sample_sheet
from keyhole.tasks.kinds import Task
from keyhole.training.job import Job
from keyhole.training.loggers import TENSORBOARD
from keyhole.training.trial import blind_epochs
from keyhole.util.files import write_atomic
from keyhole.util.wording import counted

MAX_SAMPLES = 4
NAME = "samples"


class Samples:
    """The fixed images of a run, and what was kept of them.

    samples.json holds what was kept in the very first epoch and, of those that select, in the 1st, 2nd, 4th, 8th and so
    on, so that a resumed run shows them too.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.task = job, job.tasks[0]
        self.path, self._looks_path = job.run.samples, job.run.samples.with_suffix(".json")
        self.items = {item.name: item for item in chosen(job.manifest.split(job.config.train.watch), self.task)}
        resolution = job.images.resolution
        self._answers = Answers(job.engine, job.tasks, "", resolution, told=set(), silent=True)
        self._pictures: dict[str, Pictures] = {}  # the thumbnails stay for the next epochs
        self._now: dict[str, Predicted] = {}

    def lines(self) -> list[str]:
        """Say where the picture is, and the event files of TensorBoard where it is on; nothing without validation."""
        folder, log = self.job.run.path, self.job.config.run.log
        shown = f", and in TensorBoard: tensorboard --logdir {folder / TENSORBOARD}" if "tensorboard" in log else ""
        split = {"val": "validation", "test": "test"}[self.job.config.train.watch]
        what = f"what the model keeps of {counted(len(self.items), f'{split} image')}"
        return [f"{what} is drawn after each epoch: {self.path}{shown}"] if self.items else []

    def pictures(self) -> dict[str, Path]:
        """Return the picture that was drawn last, by its name for loggers."""
        return {NAME: self.path} if self.path.is_file() else {}

    def add(self, items: Sequence[Item], found: Inference) -> None:
        """Take the fixed images of a validated batch."""
        for row in found.bags.rows:
            if (item := items[row]).name not in self.items:
                continue
            try:
                prediction = self._answers.prediction(found, item, row)
            except RunError as error:  # attention is NaN
                self.job.log(f"{item.name} is not drawn: {error}")
                continue
            before = self._pictures.get(item.name)
            if item.features is not None and before is not None:  # its slide is opened once in a run
                prediction = replace(prediction, pictures=before)
            else:
                prediction = self._answers.with_pictures(found, prediction, row, before)
            if (pictures := prediction.pictures) is None:
                continue
            if item.features is not None:
                pictures = replace(pictures, patches=pictures.patches[:0], place=pictures.place[:0])
            if not pictures.of_scores:
                self._pictures[item.name] = pictures
            self._now[item.name] = replace(prediction, pictures=pictures)

    def draw(self) -> None:
        """Write the picture of the epoch that is being validated, if any of the images was."""
        epoch, task = self.job.state.epoch + 1, self.task
        if not self._now:
            return
        earlier = self._earlier(epoch)
        samples = [
            SampleRow(self._now[name], item.labels.get(task.name) or None, earlier.get(name, ()))
            for name, item in self.items.items()
            if name in self._now
        ]
        blind = blind_epochs(self.job.config)
        title = f"{self.job.run.path.name}: what the model keeps, epoch by epoch"
        data = io.BytesIO()
        sample_sheet(samples, task, epoch, title, blind).save(data, "PNG", compress_level=1)
        write_atomic(self.path, data.getvalue())
        selecting = epoch - math.floor(blind)
        if epoch == 1 or (selecting > 0 and selecting & (selecting - 1) == 0):
            for name, prediction in self._now.items():
                earlier.setdefault(name, []).append(Look.of(prediction, task, epoch))
            text = {name: [look.to_json(task) for look in looks] for name, looks in earlier.items()}
            write_atomic(self._looks_path, json.dumps(text) + "\n")
        self._now.clear()

    def _earlier(self, epoch: int) -> dict[str, list[Look]]:
        """Return what was kept in the epochs before, by image; nothing if it cannot be read."""
        if not self._looks_path.is_file():
            return {}
        try:
            stored = json.loads(self._looks_path.read_text())
            looks = {name: [Look.from_json(each, self.task) for each in stored[name]] for name in stored}
        except (ValueError, TypeError, RunError) as error:
            self.job.log(f"{self._looks_path}: damaged ({error}); pictures begin again")
            return {}
        return {name: [look for look in found if look.epoch < epoch] for name, found in looks.items()}


def chosen(items: Sequence[Item], task: Task) -> list[Item]:
    """Return at most `MAX_SAMPLES` images, of each label in turn, so that every class is seen if there are few."""
    by_label: dict[str, list[Item]] = {}
    for item in items:
        by_label.setdefault(item.labels.get(task.name, ""), []).append(item)
    return [item for round_ in zip_longest(*by_label.values()) for item in round_ if item is not None][:MAX_SAMPLES]
