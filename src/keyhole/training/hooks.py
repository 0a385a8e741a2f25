"""What happens around a training step: progress, interrupts, saving, and memory that is given back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from keyhole.data.item import Item
from keyhole.engine.memory.meter import Trim
from keyhole.runs.journal import MIN_JOURNAL_PATCHES
from keyhole.training.duration import Estimate
from keyhole.training.epoch import Epoch
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import Job
from keyhole.training.setup import learning_rate
from keyhole.training.trial import estimate
from keyhole.util.platform import peak_memory
from keyhole.util.progress import Progress, say


class Hooks:
    """Called by the loop around its steps; nothing here changes what is learned."""

    def __init__(self, job: Job, interrupt: Interrupt) -> None:
        self.job, self.interrupt = job, interrupt
        self._trim = Trim(job.engine.plan.peak, job.device)
        self._saved = time.monotonic()
        self._first_epoch = job.state.epoch
        self._estimate: Estimate | None = None
        self._progress: Progress | None = None

    def estimate(self) -> None:
        """Say how long the rest of the run takes, if there is any."""
        if self.job.state.epoch < self.job.config.train.epochs and not self.job.state.stopped:
            self._estimate, line = estimate(self.job)
            if line is not None:
                say(line)
                self.job.log(line)

    @contextmanager
    def progress(self, epoch: Epoch) -> Iterator[None]:
        """Show the progress of an epoch inside."""
        state, engine = self.job.state, self.job.engine
        engine.timer.reset()
        name = f"epoch {state.epoch + 1}/{self.job.config.train.epochs}"
        after = None if self._estimate is None else partial(self._after, epoch.images / max(1, len(epoch)))
        with Progress(len(epoch), name, after=after, device_bytes=self._device_bytes) as self._progress:
            yield

    def after_chunk(self, patches: int) -> None:
        self.interrupt.check()
        assert self._progress is not None
        self._progress.update(patches=patches, timer=self.job.engine.timer)

    def before_learning(self) -> None:
        self._trim.after_pass()

    def progressed(self, items: Sequence[Item]) -> None:
        """Show that a step on some images is done."""
        assert self._progress is not None
        self._progress.update(images=len(items), text=f"loss {self.job.state.mean_loss or 0.0:.4f}")
        self._trim.after_pass()

    def save(self, patches: int) -> None:
        """Save the state if that is long ago, or if the step has encoded many patches."""
        if patches >= MIN_JOURNAL_PATCHES or time.monotonic() - self._saved >= 60 * self.job.config.run.save_minutes:
            self.job.save()
            self._saved = time.monotonic()

    def after_epoch(self) -> None:
        self._trim.after_epoch()
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

    def _after(self, share: float, seconds: float) -> float:
        """Seconds of the run that follow the training images of this epoch, of which `share` times as many take as
        long."""
        assert self._estimate is not None
        epoch = self.job.state.epoch
        return self._estimate.after(epoch, share * seconds, epoch == self._first_epoch)

    def _device_bytes(self) -> int | None:
        device = self.job.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
