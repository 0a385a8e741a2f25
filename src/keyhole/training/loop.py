"""The training loop: for each batch select, fetch, backward and step; for each epoch validate and save.

All random numbers depend on (seed, epoch, image) or (seed, step) alone. A run that is resumed from any saved state
therefore ends with the same weights as one that was not stopped, to the bit on CPU.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from keyhole.config.file import configuration
from keyhole.config.settings import Config
from keyhole.data.item import Item
from keyhole.engine.bags import Bags
from keyhole.errors import NonFiniteLoss
from keyhole.nn import total_loss
from keyhole.runs.run import Run, find_run
from keyhole.training.doubts import Doubts
from keyhole.training.epoch import Choice, Epoch
from keyhole.training.finite import optimizer_step
from keyhole.training.hooks import Hooks
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import Job, open_job, start_job
from keyhole.training.loggers import open_loggers
from keyhole.training.samples import Samples
from keyhole.training.schedule import learning_rate
from keyhole.training.setup import targets
from keyhole.training.validation import predict_splits, validate_epoch
from keyhole.util.progress import say


def train(data: str | Path | Mapping[str, Any] | Config, out: str | Path | None = None, **settings: Any) -> Run:
    """Train a classifier.

    Args:
        data: folder of classes, or CSV with `image` and one column per task; or the section `data` of the
            configuration as a mapping with `path`; or a whole `keyhole.Config`.
        out: run folder to create; default `runs/<data>-<time>`.
        **settings: other sections of `keyhole.Config` as mappings, such as `patch={"size": 100}, select={"m": 10}`;
            `recipe="traffic"` and `config="file.yaml"` are taken first.

    Returns:
        The run: `path`, `metrics`, `best`, `predictor()`.

    Raises:
        KeyholeError: a setting, the data or the output folder is invalid; the message is one line.

    Example:
        >>> settings = {"patch": {"size": 16}, "model": {"encoder": "small"}, "train": {"epochs": 1}}
        >>> run = keyhole.train("photos", "runs/new", **settings)
        >>> run.path.name, len(run.metrics)
        ('new', 1)
    """
    config = configuration(data, settings)
    return train_config(config if out is None else config.replace(out=Path(out)))


def train_config(config: Config) -> Run:
    """Train with a configuration; see `train`."""
    if config.out is None:
        name = config.data.path.resolve().stem if config.data.path is not None else "run"
        config = config.replace(out=Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    with Interrupt() as interrupt, closing(start_job(config, say)) as job:
        return Loop(job, interrupt).run()


def resume(path: str | os.PathLike[str], root: str | Path | None = None, epochs: int | None = None) -> Run:
    """Continue a run that was stopped, killed or interrupted, with the same result as an uninterrupted run.

    Args:
        path: the run folder.
        root: folder that the images were moved to; they are found there by relative path, size and SHA-256.
        epochs: total number of epochs of the run; default as before. A larger number continues a finished run. From
            now on the learning rate follows the schedule of that number.

    Returns:
        The run, as for `train`.

    Raises:
        RunError: `path` is not a run folder or is in use by another process, or one of its files or images changed.
        ConfigError: the run has done more epochs than `epochs`.

    Example:
        >>> run = keyhole.resume("runs/one", epochs=3)
        >>> len(run.metrics)
        3
    """
    moved = None if root is None else Path(root)
    with Interrupt() as interrupt, closing(open_job(find_run(path), moved, epochs)) as job:
        return Loop(job, interrupt).run()


class Loop:
    """Trains a job from its saved state to the end."""

    def __init__(self, job: Job, interrupt: Interrupt) -> None:
        self.job, self.engine, self.interrupt = job, job.engine, interrupt
        self.choice, self.samples = Choice(job), Samples(job)
        self.weights: dict[str, Tensor] = {}
        if job.config.train.balance == "loss":
            labels = targets(job.manifest, job.manifest.split("train"))
            weights = {task.name: task.class_weights(labels[task.name]) for task in job.tasks}
            self.weights = {name: weight.to(job.device) for name, weight in weights.items() if weight is not None}
        self.hooks = Hooks(job, interrupt, Doubts.of(job, self.weights))

    def run(self) -> Run:
        job, state, config = self.job, self.job.state, self.job.config
        loggers = open_loggers(config.run.log, job.run.path)
        with self.engine.limit(), self.hooks.stopping(self.choice), loggers as log_row:
            self.hooks.estimate()
            job.tell(self.samples.lines())
            while state.epoch < config.train.epochs and not state.stopped:
                started = time.monotonic()
                row = self.learn()
                with job.average.in_place():
                    row |= validate_epoch(job, self.interrupt, self.weights, self.samples)
                row["seconds"] = round(time.monotonic() - started, 2)
                self.end_epoch(row)
                log_row(row, state.epoch, self.samples.pictures())
            self.choice.journal.end()  # a killed process may have left it and the next file
            (job.run.path / "validation.jsonl").unlink(missing_ok=True)
            predict_splits(job, self.interrupt)
            self.hooks.end()
        return job.run

    def learn(self) -> dict[str, float]:
        """Train on the remaining batches of an epoch; return its figures."""
        job, state, engine = self.job, self.job.state, self.engine
        epoch = Epoch(job, self.choice)
        with self.hooks.progress(epoch):
            for items, batch in epoch:
                kept = self.choice.select(items, batch, self.hooks.after_chunk)  # pass 1, without gradients
                bags = engine.fetch(batch, kept, together=True)
                job.note_unreadable(items, batch)
                if bags.rows:
                    engine.pace.after_pass()  # returns the memory of pass 1
                    loss = self.step([items[row] for row in bags.rows], bags)  # pass 2, and the optimizer's step
                    state.add_loss(loss, len(bags.rows))
                state.advance(epoch.patches())
                self.hooks.progressed(len(items))
                self.after_step(sum(job.images.counts[item.name] for item in items))
                self.choice.journal.end()
                self.interrupt.check()
        return self.hooks.row()

    def step(self, items: list[Item], bags: Bags) -> float:
        """Take an optimizer step on the kept patches of some images; return the loss.

        Raises:
            NonFiniteLoss: the loss or the gradient is NaN or infinite; the weights are unchanged.
        """
        job, config = self.job, self.job.config
        labels = targets(job.manifest, items)
        seed = int(np.random.SeedSequence([config.train.seed, job.state.step]).generate_state(1)[0])

        def criterion(logits: dict[str, Tensor]) -> Tensor:
            return total_loss(job.tasks, logits, labels, self.weights)

        with self.engine.timer.part("learning"):
            loss = self.engine.backward(bags, criterion, seed)
            rate = learning_rate(config, job.state.step, job.state.steps_per_epoch)
            value, norm = optimizer_step(job.optimizer, job.model.parameters(), loss, rate, config.train.clip)
            job.average.add(job.state.step)
        job.state.plan = self.engine.plan.to_json()
        if not (math.isfinite(value) and math.isfinite(norm)):
            what = f"the gradient's norm is {norm}" if math.isfinite(value) else f"the loss is {value}"
            raise NonFiniteLoss(
                f"epoch {job.state.epoch + 1}, step {job.state.step}: {what}. Lower --train.lr, or look at the images "
                f"of this step: {', '.join(item.name for item in items)}"
            )
        return value

    def after_step(self, patches: int) -> None:
        """Save the state if the last save was long ago or the step encoded many patches."""
        self.hooks.save(patches)

    def end_epoch(self, row: dict[str, float]) -> None:
        self.hooks.end_epoch(row)
