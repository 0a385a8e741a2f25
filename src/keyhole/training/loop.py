"""The training loop: for each batch select, learn from what was kept, step; for each epoch validate and save.

Everything random is drawn from (seed, epoch, image) or (seed, step), never from what was drawn before. A run that is
resumed from any saved state therefore ends with the same weights as one that was not stopped, to the bit on CPU.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from keyhole.checkpoint import save_model
from keyhole.config import Config
from keyhole.config_file import build, resolve, validate
from keyhole.data.manifest import Item
from keyhole.errors import DataError, Interrupted, NonFiniteLoss
from keyhole.metrics import point_metrics
from keyhole.nn import Kept, class_weights, explore, total_loss
from keyhole.passes import fetch_kept, infer, select_batch
from keyhole.predict import Predictor, describe
from keyhole.prediction import write_table
from keyhole.progress import Progress, peak_memory
from keyhole.reading import Batch
from keyhole.training.augment import draw, stack_colors
from keyhole.training.interrupt import Interrupt, StopRequested
from keyhole.training.job import Job, open_job, start_job
from keyhole.training.loggers import open_loggers
from keyhole.training.run import Run, find_run, read_rows, write_rows
from keyhole.training.score import is_better, metric_value
from keyhole.training.setup import learning_rate, targets


def train(data: str | Path | Mapping[str, Any], out: str | Path | None = None, **settings: Any) -> Run:
    """Trains a classifier and returns its run.

    Args:
        data: folder of classes, or CSV with `image` and one column per task; or the section `data` of the
            configuration as a mapping with `path`.
        out: run folder to create; default `runs/<data>-<time>`.
        **settings: other sections of `keyhole.Config` as mappings, such as `patch={"size": 100}, select={"m": 10}`;
            `recipe="traffic"` and `config="file.yaml"` are taken first.

    Returns:
        The run: `path`, `metrics`, `best`, `predictor()`.

    Raises:
        KeyholeError: a setting, the data or the output is not as it must be; one clear line.
    """
    section = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
    base = resolve(settings.pop("recipe", None), settings.pop("config", None))
    config = build(base, {**settings, "data": section})
    return train_config(validate(config if out is None else dataclasses.replace(config, out=Path(out))))


def train_config(config: Config) -> Run:
    """Trains as a configuration says; see `train`."""
    if config.out is None:
        name = config.data.path.resolve().stem if config.data.path is not None else "run"
        config = dataclasses.replace(config, out=Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    with Interrupt() as interrupt:
        return Loop(start_job(config, _say), interrupt).run()


def resume(path: str | Path) -> Run:
    """Goes on with a run that was stopped, killed or interrupted, and ends as it would have.

    Raises:
        RunError: not a run folder, or its state does not fit.
    """
    with Interrupt() as interrupt:
        return Loop(open_job(find_run(path), _say), interrupt).run()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Loop:
    """Takes a job from its state to the end."""

    def __init__(self, job: Job, interrupt: Interrupt) -> None:
        self.job, self.interrupt = job, interrupt
        self.saved = time.monotonic()
        train = job.manifest.split("train")
        labels = targets(job.manifest, train, job.device)
        balance = job.config.train.balance == "loss"
        weights = {task.name: class_weights(task, labels[task.name]) for task in job.tasks} if balance else {}
        self.weights = {name: weight for name, weight in weights.items() if weight is not None}

    def run(self) -> Run:
        job, config = self.job, self.job.config
        loggers = open_loggers(config.run.log, job.run.path)
        try:
            while job.state.epoch < config.train.epochs and not job.state.stopped:
                started = time.monotonic()
                row = self.learn() | self.validate()
                row["seconds"] = round(time.monotonic() - started, 2)
                self.end_epoch(row)
                for logger in loggers:
                    logger.log(row, job.state.epoch)
            self.predict_splits()
            if job.state.left_out:
                _say(f"left out {len(job.state.left_out)} images that failed; they are listed in left_out.csv")
        except StopRequested as stop:
            job.save()
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
            job.close()
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
        openers = [
            [job.images.opener(item, change.view, change.offset) for item, change in zip(*both, strict=True)]
            for both in zip(batches, draws, strict=True)
        ]
        waited, counted = job.reader.waited, job.reader.read_patches
        with Progress(sum(map(len, batches)), f"epoch {state.epoch + 1}/{config.train.epochs}") as progress:

            def on_chunk(patches: int) -> None:
                self.interrupt.check()
                nonlocal waited
                progress.update(patches=patches, waited=job.reader.waited - waited, device_bytes=self.device_bytes())
                waited = job.reader.waited

            stream = job.reader.stream(openers, config.select.chunk, self.on_error)
            for each, changes, batch in zip(batches, draws, stream, strict=True):
                colors = stack_colors(changes)
                kept = select_batch(
                    job.model,
                    batch,
                    config.select.m,
                    config.select.chunk,
                    config.select.rule,
                    colors,
                    on_chunk=on_chunk,
                )
                kept = self.explore(kept, batch)
                bags, _ = fetch_kept(job.model, batch, kept, colors)
                for row, error in batch.failed.items():
                    job.leave_out(each[row].name, str(error))
                if bags.rows:
                    rate = learning_rate(config, state.step, state.steps_per_epoch)
                    loss = self.step([each[row] for row in bags.rows], bags.patches, bags.position, bags.mask, rate)
                    state.loss_sum += loss * len(bags.rows)
                    state.loss_count += len(bags.rows)
                state.step += 1
                state.batch += 1
                progress.update(images=len(each), text=f"loss {state.loss_sum / max(1, state.loss_count):.4f}")
                self.save_now_and_then()
                self.interrupt.check()
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": learning_rate(config, max(0, state.step - 1), state.steps_per_epoch),
            "train.loss": state.loss_sum / state.loss_count if state.loss_count else math.nan,
            "patches": job.reader.read_patches - counted,
            "peak_gb": round(peak_memory() / 1e9, 3),
        }

    def explore(self, kept: list[Kept | None], batch: Batch) -> list[Kept | None]:
        """In the first `explore` epochs, keeps patches drawn at random in the place of some or all of the best.

        In the first half all are, and attention is held uniform (its key projection stays at zero): encoder and heads
        learn from what there is. Then attention learns too, and the share falls to none. Without this, scores that
        mean nothing yet can settle on patches that tell nothing, and what is not kept is never learned from.
        """
        state, config = self.job.state, self.job.config.train
        if not config.explore:
            return kept
        done = state.step / state.steps_per_epoch / config.explore
        self.job.model.pool.key_proj.requires_grad_(done >= 0.5)
        if done >= 1:
            return kept
        seed = int(np.random.SeedSequence([config.seed, state.step, 1]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        share = min(1.0, 2 * (1 - done))
        return [
            image if image is None or source is None else explore(image, len(source), share, generator)
            for image, source in zip(kept, batch.sources, strict=True)
        ]

    @property
    def on_error(self) -> Literal["raise", "skip"]:
        return "raise" if self.job.config.data.on_bad_image == "fail" else "skip"

    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.job.device) if self.job.device.type == "cuda" else None

    def epoch_items(self) -> list[Item]:
        """The training images in this epoch's order, without those that failed in an earlier epoch.

        Raises:
            DataError: none is left.
        """
        state, seed = self.job.state, self.job.config.train.seed
        usable = [item for item in self.job.manifest.split("train") if self.usable(item)]
        if not usable:
            raise DataError(f"{self.job.run.path}: every training image has failed; see left_out.csv")
        order = np.random.default_rng([seed, state.epoch]).permutation(len(usable))
        return [usable[place] for place in order]

    def usable(self, item: Item) -> bool:
        failed = self.job.state.left_out.get(item.name)
        return failed is None or failed[0] >= self.job.state.epoch

    def step(
        self,
        items: list[Item],
        patches: torch.Tensor,
        position: torch.Tensor | None,
        mask: torch.Tensor,
        rate: float,
    ) -> float:
        """The gradient step on the kept patches.

        Raises:
            NonFiniteLoss: the loss or the gradient is not a number; the weights are as they were.
        """
        job, config = self.job, self.job.config.train
        with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence([config.seed, job.state.step]).generate_state(1)[0]))
            job.model.train()
            logits = job.model(patches, position, mask)
            loss = total_loss(job.tasks, logits, targets(job.manifest, items, job.device), self.weights)
            job.optimizer.zero_grad(set_to_none=True)
            if loss.isfinite():
                loss.backward()
        learned = [parameter for parameter in job.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(learned, config.clip or math.inf)
        if not loss.isfinite() or not norm.isfinite():
            what = f"the loss is {loss.item()}" if not loss.isfinite() else f"the gradient's norm is {norm.item()}"
            raise NonFiniteLoss(
                f"epoch {job.state.epoch + 1}, step {job.state.step}: {what}. Lower --train.lr, or look at the images "
                f"of this step: {', '.join(item.name for item in items)}"
            )
        for group in job.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        job.optimizer.step()
        return loss.item()

    def validate(self) -> dict[str, float]:
        """Loss and metrics on the validation split; nothing is learned, the test split is not touched."""
        job, select, size = self.job, self.job.config.select, self.job.config.train.batch
        items = [item for item in job.manifest.split("val") if self.usable(item)]
        if not items:
            return {}
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        openers = [[job.images.opener(item) for item in each] for each in batches]
        seen: list[Item] = []
        logits: dict[str, list[torch.Tensor]] = {task.name: [] for task in job.tasks}
        stream = infer(job.model, job.reader, openers, select, self.on_error, on_chunk=self.interrupt.check)
        for each, done in zip(batches, stream, strict=True):
            for place, error in done.batch.failed.items():
                job.leave_out(each[place].name, str(error))
            seen += [each[place] for place in done.bags.rows]
            for name, values in done.logits.items():
                logits[name].append(values.cpu())
        if not seen:
            raise DataError(f"{job.run.path}: every validation image has failed; see left_out.csv")
        joined = {name: torch.cat(values) for name, values in logits.items()}
        labels = targets(job.manifest, seen)
        row = {"val.loss": total_loss(job.tasks, joined, labels, {k: v.cpu() for k, v in self.weights.items()}).item()}
        for task in job.tasks:
            found = point_metrics(task, labels[task.name].numpy(), task.probability(joined[task.name].numpy()))
            row |= {f"val.{task.name}.{name}": value for name, value in found.items()}
        return row

    def end_epoch(self, row: dict[str, float]) -> None:
        """Keeps the best model, writes the metrics and the state; in this order, so that a kill loses no best model."""
        job, state, config = self.job, self.job.state, self.job.config
        loss = row.get("val.loss", math.nan)
        value = metric_value(state.metric, row, job.tasks) if state.metric else math.nan
        if is_better(state.metric, value, loss, state.best):
            state.best, state.best_epoch, state.waiting = (value, loss), state.epoch + 1, 0
            about = describe(config, job.tasks, epoch=state.epoch + 1, metric=state.metric, value=_finite(value))
            save_model(job.run.path / "best", job.model, about)
        else:
            state.waiting += 1
        state.stopped = bool(config.train.patience) and bool(state.metric) and state.waiting >= config.train.patience
        path = job.run.path / "metrics.csv"
        before = [each for each in read_rows(path) if int(each["epoch"]) <= state.epoch]
        write_rows(path, [*before, row])
        figures = ", ".join(f"{name} {figure:.4g}" for name, figure in row.items() if name.startswith(("train", "val")))
        best = " (best so far)" if state.best_epoch == state.epoch + 1 else ""
        job.log(f"epoch {state.epoch + 1}: {figures}{best}")
        shown = f"validation loss {loss:.4f}" if math.isfinite(loss) else "no validation split"
        if math.isfinite(value) and state.metric != "loss":
            shown += f", {state.metric} {value:.4f}"
        _say(f"  {shown}{best}")
        state.epoch, state.batch, state.loss_sum, state.loss_count = state.epoch + 1, 0, 0.0, 0
        if state.stopped:
            job.log(f"stopped early: no better {state.metric} for {state.waiting} epochs")
            _say(f"stopped early: no better {state.metric} for {state.waiting} epochs")
        job.save()
        self.saved = time.monotonic()

    def save_now_and_then(self) -> None:
        if time.monotonic() - self.saved >= 60 * self.job.config.run.save_minutes:
            self.job.save()
            self.saved = time.monotonic()

    def predict_splits(self) -> None:
        """What the best model says of the training and validation images, one row each."""
        job = self.job
        predictor = Predictor.open(job.run.path, str(job.device))
        folder = job.run.path / "predictions"
        folder.mkdir(exist_ok=True)
        for split in ("train", "val"):
            items = [item for item in job.manifest.split(split) if item.name not in job.state.left_out]
            if not items or (folder / f"{split}.csv").is_file():
                continue
            found = predictor.predict_items(
                items,
                reader=job.reader,
                store=job.images.store,
                on_bad_image=job.config.data.on_bad_image,
                left_out=lambda item, error: job.leave_out(item.name, str(error)),
                on_chunk=self.interrupt.check,
                description=f"predicting {split}",
            )
            write_table((prediction for _, prediction in found), folder / f"{split}.csv")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
