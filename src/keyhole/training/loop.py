"""The training loop: for each batch select, learn from what was kept, step; for each epoch validate and save.

Everything random is drawn from (seed, epoch, image) or (seed, step), never from what was drawn before. A run that is
resumed from any saved state therefore ends with the same weights as one that was not stopped, to the bit on CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keyhole.config.auto import number
from keyhole.config.file import configuration
from keyhole.config.settings import Config
from keyhole.data.item import Item
from keyhole.engine.bags import Bags
from keyhole.engine.memory.meter import Trim
from keyhole.errors import DataError, Interrupted, NonFiniteLoss
from keyhole.inference.predictor import describe
from keyhole.loading import Batch, FetchOnly, Opener
from keyhole.loading.chunks import is_alone
from keyhole.nn import Kept, total_loss
from keyhole.runs.checkpoint import save_model
from keyhole.runs.journal import MIN_JOURNAL_PATCHES, SelectionJournal
from keyhole.runs.run import Run, find_run, write_rows
from keyhole.training.augment import draw, stack_colors
from keyhole.training.duration import Estimate
from keyhole.training.exploration import Exploration
from keyhole.training.finite import step_if_finite
from keyhole.training.interrupt import Interrupt, StopRequested
from keyhole.training.job import Job, open_job, start_job
from keyhole.training.loggers import open_loggers
from keyhole.training.score import is_better, metric_value
from keyhole.training.setup import learning_rate, targets
from keyhole.training.trial import estimate
from keyhole.training.validation import predict_splits, validate_epoch
from keyhole.util.budget import memory_text
from keyhole.util.platform import peak_memory
from keyhole.util.progress import Progress, say
from keyhole.util.wording import counted


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
        KeyholeError: a setting, the data or the output is not as it must be; one clear line.

    Example:
        >>> run = keyhole.train("photos", "runs/new", patch={"size": 16}, model={"width": 8}, train={"epochs": 1})
        >>> run.path.name, len(run.metrics)
        ('new', 1)
    """
    config = configuration(data, settings)
    return train_config(config if out is None else config.replace(out=Path(out)))


def train_config(config: Config) -> Run:
    """Trains as a configuration says; see `train`."""
    if config.out is None:
        name = config.data.path.resolve().stem if config.data.path is not None else "run"
        config = config.replace(out=Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    with Interrupt() as interrupt, closing(start_job(config, say)) as job:
        return Loop(job, interrupt).run()


def resume(path: str | Path, root: str | Path | None = None, epochs: int | None = None) -> Run:
    """Continue a run that was stopped, killed or interrupted; it ends as it would have without that.

    Args:
        path: the run folder.
        root: folder that the images were moved to; they are found there by relative path, size and SHA-256.
        epochs: number of epochs of the run in all, so that a finished run learns more; default as before. The learning
            rate follows the schedule of that number from there on.

    Returns:
        The run, as for `train`.

    Raises:
        RunError: not a run folder, in use by another process, or a file of it or an image changed.
        ConfigError: it has done more epochs than `epochs`.

    Example:
        >>> run = keyhole.resume("runs/one", epochs=3)
        >>> len(run.metrics)
        3
    """
    moved = None if root is None else Path(root)
    with Interrupt() as interrupt, closing(open_job(find_run(path), say, moved, epochs)) as job:
        return Loop(job, interrupt).run()


class Loop:
    """Takes a job from its state to the end."""

    def __init__(self, job: Job, interrupt: Interrupt) -> None:
        self.job, self.interrupt = job, interrupt
        self.saved = time.monotonic()
        self.undefined = False
        self.engine = job.engine
        self.trim = Trim(self.engine.plan.peak, job.device)
        self.estimate: Estimate | None = None
        self.first_epoch = job.state.epoch
        self.journal = SelectionJournal(job.run.path / "selection.safetensors")
        explore = number(job.config.train.explore, "train.explore")
        self.exploration = Exploration(explore, job.state.steps_per_epoch, job.config.train.seed)
        train = job.manifest.split("train")
        labels = targets(job.manifest, train)
        balance = job.config.train.balance == "loss"
        weights = {task.name: task.class_weights(labels[task.name]) for task in job.tasks} if balance else {}
        self.weights = {name: weight.to(job.device) for name, weight in weights.items() if weight is not None}

    def run(self) -> Run:
        with self.engine.limit():
            return self._run()

    def _run(self) -> Run:
        job, config = self.job, self.job.config
        loggers = open_loggers(config.run.log, job.run.path)
        if job.state.epoch < config.train.epochs and not job.state.stopped:
            self.estimate, line = estimate(job)
            if line is not None:
                say(line)
                job.log(line)
        try:
            while job.state.epoch < config.train.epochs and not job.state.stopped:
                started = time.monotonic()
                row = self.learn() | validate_epoch(job, self.interrupt, self.weights)
                row["seconds"] = round(time.monotonic() - started, 2)
                self.end_epoch(row)
                for logger in loggers:
                    logger.log(row, job.state.epoch)
            self.remove_journals()
            predict_splits(job, self.interrupt)
            if job.device.type == "cpu" and (peak := peak_memory()):
                job.log(f"peak memory {memory_text(peak)}, predicted {memory_text(self.engine.plan.peak)}")
            for line in job.run.learning.get("lines", ()):
                job.log(line)
            if job.state.left_out:
                say(f"left out {counted(len(job.state.left_out))} after a failure; see left_out.csv")
            if (unread := job.damage.summary()) is not None:
                say(unread)
                job.log(unread)
        except StopRequested as stop:
            if job.learning:  # else the state is that of the last epoch's end, and the model another
                job.save()
            self.journal.flush()
            job.log("stopped by a signal; the state is saved")
            assert self.interrupt.signal is not None
            raise Interrupted(
                f"stopped at epoch {job.state.epoch + 1}, step {job.state.step}; the state is saved. "
                f"Go on with: keyhole resume {job.run.path}",
                self.interrupt.signal,
            ) from stop
        except Exception as error:
            job.log(f"error: {error}")
            raise
        finally:
            for logger in loggers:
                logger.close()
        if self.interrupt.signal is not None:  # after the last moment at which there was something to stop
            raise Interrupted(f"stopped; the run is complete: {job.run.path}", self.interrupt.signal)
        return job.run

    def learn(self) -> dict[str, float]:
        """One epoch over the training images, from the batch the state is at."""
        job, state, config = self.job, self.job.state, self.job.config
        items = self.epoch_items()
        size = config.train.batch
        batches = [items[start : start + size] for start in range(0, len(items), size)][state.batch :]
        stride = config.patch.stride or config.patch.size
        draws = [
            [
                draw(config.augment, config.train.seed, state.epoch, item.name, stride, config.model.channels)
                for item in each
            ]
            for each in batches
        ]
        openers: list[list[Opener]] = [
            [job.images.opener(item, change.view, change.offset) for item, change in zip(*both, strict=True)]
            for both in zip(batches, draws, strict=True)
        ]
        if batches:  # a run that was killed in the middle of a batch knows what some of its images keep
            for row in self.journal.begin(state.step, [item.name for item in batches[0]]):
                openers[0][row] = FetchOnly(openers[0][row])
        for step, wanted in enumerate(openers, start=state.step):
            if self.exploration.is_blind(step):
                wanted[:] = [FetchOnly(one) for one in wanted]
        reader, engine = self.engine.reader, self.engine
        counted = reader.read_patches
        engine.timer.reset()
        name = f"epoch {state.epoch + 1}/{config.train.epochs}"
        after = None if self.estimate is None else partial(self._after, len(items) / max(1, sum(map(len, batches))))
        with Progress(sum(map(len, batches)), name, after=after, device_bytes=self.device_bytes) as progress:

            def on_chunk(patches: int) -> None:
                self.interrupt.check()
                progress.update(patches=patches, timer=engine.timer)

            self.chunk = engine.plan.chunk
            for each, changes, batch in zip(batches, draws, engine.stream(openers, "mask"), strict=True):
                batch.color = stack_colors(changes)
                kept = self.select(each, batch, on_chunk)
                bags = engine.fetch(batch, kept, together=True)
                self.job.note_unreadable(each, batch)
                if bags.rows:
                    rate = learning_rate(config, state.step, state.steps_per_epoch)
                    self.trim.after_pass()
                    with engine.timer.part("learning"):
                        loss = self.step([each[row] for row in bags.rows], bags, rate)
                    state.loss_sum += loss * len(bags.rows)
                    state.loss_count += len(bags.rows)
                state.patches += reader.read_patches - counted + self.seen_before
                counted = reader.read_patches
                state.step += 1
                state.batch += 1
                progress.update(images=len(each), text=f"loss {state.loss_sum / max(1, state.loss_count):.4f}")
                self.trim.after_pass()
                self.save_now_and_then(sum(job.images.counts[item.name] for item in each))
                self.journal.end()
                self.interrupt.check()
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": learning_rate(config, max(0, state.step - 1), state.steps_per_epoch),
            "train.loss": state.loss_sum / state.loss_count if state.loss_count else math.nan,
            "patches": state.patches,
            "peak_gb": round(peak_memory() / 1e9, 3),
        }

    def _after(self, share: float, seconds: float) -> float:
        """Seconds of the run that follow the training images of this epoch; `share` of it where some are done."""
        assert self.estimate is not None
        epoch = self.job.state.epoch
        return self.estimate.after(epoch, share * seconds, epoch == self.first_epoch)

    def select(self, items: list[Item], batch: Batch, on_chunk: Callable[[int], None]) -> list[Kept | None]:
        """What the images of a batch keep for learning."""
        job, step = self.job, self.job.state.step
        job.model.pool.key_proj.requires_grad_(not self.exploration.is_blind(step))
        known = self.journal.begin(step, [item.name for item in items])
        sources = [source for row in known if (source := batch.sources[row]) is not None]
        self.seen_before = sum(map(len, sources))  # by a process that was killed
        if self.exploration.is_blind(step):
            for _ in batch.chunks():  # there are none, but what cannot be opened shows
                raise AssertionError("patches were streamed that nobody wants")
            return self.exploration.draw(step, batch.sources, job.config.select.m)
        kept = self.engine.select(batch, on_chunk=on_chunk, known=known, on_image=partial(self.note_image, batch))
        return self.exploration.mix(step, kept, batch.sources)

    def note_image(self, batch: Batch, row: int, finish: Callable[[], Kept]) -> None:
        """Writes down what an image keeps if it is large; a small one's last bits depend on its neighbours' chunks."""
        source = batch.sources[row]
        if source is not None and is_alone(len(source), self.chunk):
            self.journal.add(row, finish())

    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.job.device) if self.job.device.type == "cuda" else None

    def epoch_items(self) -> list[Item]:
        """The training images in this epoch's order, without those that failed in an earlier epoch.

        Raises:
            DataError: none is left.
        """
        state, seed = self.job.state, self.job.config.train.seed
        usable = [item for item in self.job.manifest.split("train") if self.job.usable(item)]
        if not usable:
            raise DataError(f"{self.job.run.path}: every training image has failed; see left_out.csv")
        order = np.random.default_rng([seed, state.epoch]).permutation(len(usable))
        return [usable[place] for place in order]

    def step(self, items: list[Item], bags: Bags, rate: float) -> float:
        """The gradient step on the kept patches, as many at a time as the plan says.

        Raises:
            NonFiniteLoss: the loss or the gradient is not a number; the weights are as they were.
        """
        job, config = self.job, self.job.config.train
        labels = targets(job.manifest, items)
        seed = int(np.random.SeedSequence([config.seed, job.state.step]).generate_state(1)[0])

        def criterion(logits: dict[str, torch.Tensor]) -> torch.Tensor:
            return total_loss(job.tasks, logits, labels, self.weights)

        loss = self.engine.backward(bags, criterion, seed)
        job.state.plan = self.engine.plan.to_json()
        learned = [parameter for parameter in job.model.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in learned]
        norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        if config.clip:
            torch.nn.utils.clip_grads_with_norm_(learned, config.clip, norm)
        for group in job.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        value, length = step_if_finite(job.optimizer, torch.stack([loss, norm]))
        if not (math.isfinite(value) and math.isfinite(length)):
            what = f"the gradient's norm is {length}" if math.isfinite(value) else f"the loss is {value}"
            raise NonFiniteLoss(
                f"epoch {job.state.epoch + 1}, step {job.state.step}: {what}. Lower --train.lr, or look at the images "
                f"of this step: {', '.join(item.name for item in items)}"
            )
        return value

    def end_epoch(self, row: dict[str, float]) -> None:
        """Keeps the best model, writes the metrics and the state; in this order, so that a kill loses no best model."""
        job, state, config = self.job, self.job.state, self.job.config
        job.lock.check()
        loss = row.get("val.loss", math.nan)
        value = metric_value(state.metric, row, job.tasks) if state.metric else math.nan
        if is_better(state.metric, value, loss, state.best):
            state.best, state.best_epoch, state.waiting = (value, loss), state.epoch + 1, 0
            named = (state.metric, value) if math.isfinite(value) or not state.metric else ("loss", loss)
            chosen = {"epoch": state.epoch + 1, "metric": named[0], "value": _finite(named[1])}
            about = describe(config, job.tasks, **chosen, resolution=job.images.resolution.to_json())
            about |= {"run": state.run, "manifest": state.manifest}
            save_model(job.run.path / "best", job.model, about)
        else:
            state.waiting += 1
        state.stopped = bool(config.train.patience) and bool(state.metric) and state.waiting >= config.train.patience
        write_rows(job.run.path / "metrics.csv", [*state.history, row])
        figures = ", ".join(f"{name} {figure:.4g}" for name, figure in row.items() if name.startswith(("train", "val")))
        best = " (best so far)" if state.best_epoch == state.epoch + 1 else ""
        job.log(f"epoch {state.epoch + 1}: {figures}{best}")
        shown = f"validation loss {loss:.4f}" if math.isfinite(loss) else "no validation split"
        if math.isfinite(value) and state.metric != "loss":
            shown += f", {state.metric} {value:.4f}"
        elif state.metric not in ("", "loss") and not self.undefined:
            self.undefined = True
            what = f"{state.metric} is undefined in epoch {state.epoch + 1}: such epochs are compared by the loss"
            job.log(what)
            shown += f"; {what}"
        say(f"  {shown}{best}")
        state.end_epoch(row)
        if state.stopped:
            job.log(f"stopped early: no better {state.metric} for {state.waiting} epochs")
            say(f"stopped early: no better {state.metric} for {state.waiting} epochs")
        job.save()
        (job.run.path / "validation.jsonl").unlink(missing_ok=True)
        self.trim.after_epoch()
        self.saved = time.monotonic()

    def remove_journals(self) -> None:
        """Remove the journals of the last batch and epoch, which a kill after saving the state leaves."""
        self.journal.end()
        (self.job.run.path / "validation.jsonl").unlink(missing_ok=True)

    def save_now_and_then(self, patches: int) -> None:
        """After a step that took long in time, or that has looked at many patches."""
        if patches >= MIN_JOURNAL_PATCHES or time.monotonic() - self.saved >= 60 * self.job.config.run.save_minutes:
            self.job.save()
            self.saved = time.monotonic()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
