"""Progress, saving, the best model, metrics and signals: everything around the steps of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from keyhole.errors import Interrupted
from keyhole.inference.predictor import describe
from keyhole.runs.checkpoint import save_model
from keyhole.runs.journal import MIN_JOURNAL_PATCHES
from keyhole.training.doubts import Doubts
from keyhole.training.duration import Estimate
from keyhole.training.epoch import Choice, Epoch
from keyhole.training.health import line as health_line
from keyhole.training.interrupt import Interrupt, StopRequested
from keyhole.training.job import Job
from keyhole.training.schedule import learning_rate
from keyhole.training.score import is_better, metric_value
from keyhole.training.trial import estimate
from keyhole.util.budget import memory_text
from keyhole.util.platform import peak_memory
from keyhole.util.progress import Progress, say
from keyhole.util.tables import write_rows
from keyhole.util.wording import counted


class Hooks:
    """Called by the loop around its steps; nothing here changes what is learned."""

    def __init__(self, job: Job, interrupt: Interrupt, doubts: Doubts) -> None:
        self.job, self.interrupt, self.doubts = job, interrupt, doubts
        self._saved = time.monotonic()
        self._first_epoch = job.state.epoch
        self._undefined = False  # True once the user knows that the metric is undefined
        self._estimate: Estimate | None = None
        self._progress: Progress | None = None

    def estimate(self) -> None:
        """Estimate and say how long the remaining epochs take."""
        if self.job.state.epoch < self.job.config.train.epochs and not self.job.state.stopped:
            self._estimate, line = estimate(self.job)
            if line is not None:
                self.job.tell([line])

    @contextmanager
    def progress(self, epoch: Epoch) -> Iterator[None]:
        """Show the progress of an epoch inside."""
        state, device, expected = self.job.state, self.job.device, self._estimate
        self.job.engine.timer.reset()
        share = epoch.images / max(1, len(epoch))  # time of all images over that of the remaining ones

        def after(seconds: float) -> float:
            assert expected is not None
            return expected.after(state.epoch, share * seconds, state.epoch == self._first_epoch)

        def device_bytes() -> int | None:
            return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

        name = f"epoch {state.epoch + 1}/{self.job.config.train.epochs}"
        rest = None if expected is None else after
        with Progress(len(epoch), name, after=rest, device_bytes=device_bytes) as self._progress:
            yield

    def after_chunk(self, patches: int) -> None:
        self.interrupt.check()
        assert self._progress is not None
        self._progress.update(patches=patches, timer=self.job.engine.timer)

    def progressed(self, images: int) -> None:
        """Show that a step on some images is done."""
        assert self._progress is not None
        self._progress.update(images=images, text=f"loss {self.job.state.mean_loss or 0.0:.4f}")
        self.job.engine.pace.after_pass()

    def save(self, patches: int) -> None:
        """Save the state if the last save was long ago, or if the step encoded many patches."""
        if patches >= MIN_JOURNAL_PATCHES or time.monotonic() - self._saved >= 60 * self.job.config.run.save_minutes:
            self.job.save()
            self._saved = time.monotonic()

    def row(self) -> dict[str, float]:
        """Return the figures of the epoch for metrics.csv."""
        state = self.job.state
        return {
            "epoch": state.epoch + 1,
            "step": state.step,
            "lr": learning_rate(self.job.config, max(0, state.step - 1), state.steps_per_epoch),
            "train.loss": math.nan if state.mean_loss is None else state.mean_loss,
            "patches": state.patches,
            "peak_gb": round(peak_memory() / 1e9, 3),
        }

    def end_epoch(self, row: dict[str, float]) -> None:
        """Keep the best model, then write metrics and state; in this order a killed process loses no best model."""
        job, state, config = self.job, self.job.state, self.job.config
        job.lock.check()
        loss = row.get("val.loss", math.nan)
        value = metric_value(state.metric, row, job.tasks) if state.metric else math.nan
        if is_better(state.metric, value, loss, state.best):
            state.best, state.best_epoch, state.waiting = (value, loss), state.epoch + 1, 0
            metric, figure = (state.metric, value) if math.isfinite(value) or not state.metric else ("loss", loss)
            chosen = {"epoch": state.epoch + 1, "metric": metric, "value": figure if math.isfinite(figure) else None}
            images = job.images
            chosen |= {"resolution": asdict(images.resolution), "usual_patches": images.usual_patches}
            about = describe(config, job.tasks, **chosen)
            about |= {"run": state.run, "manifest": state.manifest}
            with job.average.in_place():
                save_model(job.run.path / "best", job.model, about)
        else:
            state.waiting += 1
        state.stopped = bool(config.train.patience) and bool(state.metric) and state.waiting >= config.train.patience
        write_rows(job.run.path / "metrics.csv", [*state.history, row])
        figures = ", ".join(
            f"{name} {figure:.4g}" for name, figure in row.items() if name.startswith(("train", "val", "test", "kept"))
        )
        best = " (best so far)" if state.best_epoch == state.epoch + 1 else ""
        job.log(f"epoch {state.epoch + 1}: {figures}{best}")
        shown = f"validation loss {loss:.4f}" if math.isfinite(loss) else "no validation split"
        if config.train.watch == "test":
            named = {task.name: task.default_metric for task in job.tasks}
            watched = [f"{name} {metric} {row[f'test.{name}.{metric}']:.4f}" for name, metric in named.items()]
            shown = ", ".join([f"test loss {row['test.loss']:.4f}", *watched])
        if math.isfinite(value) and state.metric != "loss":
            shown += f", {state.metric} {value:.4f}"
        elif state.metric not in ("", "loss") and not self._undefined:
            self._undefined = True
            what = f"{state.metric} is undefined in epoch {state.epoch + 1}: such epochs are compared by the loss"
            job.log(what)
            shown += f"; {what}"
        kept = health_line(row)
        say(f"  {shown}{best}{'; ' if kept else ''}{kept}")
        state.end_epoch(row)
        new = self.doubts.new(state.history, state.told)
        job.tell(f"warning: {text}" for text in new.values())
        state.told += list(new)
        if state.stopped:
            job.tell([f"stopped early: no better {state.metric} for {state.waiting} epochs"])
        job.save()
        (job.run.path / "validation.jsonl").unlink(missing_ok=True)
        self.job.engine.pace.after_epoch()
        self._saved = time.monotonic()

    def end(self) -> None:
        """Log the peak memory and whether the model has learned, and say what could not be read."""
        job = self.job
        if job.device.type == "cpu" and (peak := peak_memory()):
            job.log(f"peak memory {memory_text(peak)}, predicted {memory_text(job.engine.plan.peak)}")
        for line in job.run.learning.get("lines", ()):
            job.log(line)
        if job.state.left_out:
            say(f"left out {counted(len(job.state.left_out))} after a failure; see left_out.csv")
        if (unread := job.damage.summary()) is not None:
            job.tell([unread])

    @contextmanager
    def stopping(self, choice: Choice) -> Iterator[None]:
        """Save the state when a signal asks the run to stop, and log errors.

        Raises:
            Interrupted: a signal came.
        """
        job, interrupt = self.job, self.interrupt
        try:
            yield
        except StopRequested as stop:
            if job.learning:  # otherwise the state is saved, and the model has the weights of the best epoch
                job.save()
            choice.journal.flush()
            job.log("stopped by a signal; the state is saved")
            assert interrupt.signal is not None
            raise Interrupted(
                f"stopped at epoch {job.state.epoch + 1}, step {job.state.step}; the state is saved. "
                f"Go on with: keyhole resume {job.run.path}",
                interrupt.signal,
            ) from stop
        except Exception as error:
            job.log(f"error: {error}")
            raise
        if interrupt.signal is not None:  # it came after the last check
            raise Interrupted(f"stopped; the run is complete: {job.run.path}", interrupt.signal)
