"""The end of an epoch (best model, metrics, state) and of a run (signals, errors, what there is to tell)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from keyhole.errors import Interrupted
from keyhole.inference.predictor import describe
from keyhole.runs.checkpoint import save_model
from keyhole.runs.run import write_rows
from keyhole.training.choice import Choice
from keyhole.training.interrupt import Interrupt, StopRequested
from keyhole.training.job import Job
from keyhole.training.score import is_better, metric_value
from keyhole.util.budget import memory_text
from keyhole.util.platform import peak_memory
from keyhole.util.progress import say
from keyhole.util.wording import counted


def keep_epoch(job: Job, row: dict[str, float]) -> None:
    """Keep the best model, write the metrics and the state; in this order, so that a kill loses no best model."""
    state, config = job.state, job.config
    job.lock.check()
    loss = row.get("val.loss", math.nan)
    value = metric_value(state.metric, row, job.tasks) if state.metric else math.nan
    if is_better(state.metric, value, loss, state.best):
        state.best, state.best_epoch, state.waiting = (value, loss), state.epoch + 1, 0
        metric, figure = (state.metric, value) if math.isfinite(value) or not state.metric else ("loss", loss)
        chosen = {"epoch": state.epoch + 1, "metric": metric, "value": figure if math.isfinite(figure) else None}
        about = describe(config, job.tasks, **chosen, resolution=asdict(job.images.resolution))
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
    elif state.metric not in ("", "loss") and not job.undefined:
        job.undefined = True
        what = f"{state.metric} is undefined in epoch {state.epoch + 1}: such epochs are compared by the loss"
        job.log(what)
        shown += f"; {what}"
    say(f"  {shown}{best}")
    state.end_epoch(row)
    if state.stopped:
        line = f"stopped early: no better {state.metric} for {state.waiting} epochs"
        job.log(line)
        say(line)
    job.save()
    (job.run.path / "validation.jsonl").unlink(missing_ok=True)


@contextmanager
def stopping(job: Job, interrupt: Interrupt, choice: Choice) -> Iterator[None]:
    """Save the state when a signal asks the run to stop, and log errors.

    Raises:
        Interrupted: a signal came.
    """
    try:
        yield
    except StopRequested as stop:
        if job.learning:  # else the state is that of the last epoch's end, and the model another
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
    if interrupt.signal is not None:  # after the last moment at which there was something to stop
        raise Interrupted(f"stopped; the run is complete: {job.run.path}", interrupt.signal)


def tell_end(job: Job) -> None:
    """Log the peak of memory and what the run has learned, and say what could not be read."""
    if job.device.type == "cpu" and (peak := peak_memory()):
        job.log(f"peak memory {memory_text(peak)}, predicted {memory_text(job.engine.plan.peak)}")
    for line in job.run.learning.get("lines", ()):
        job.log(line)
    if job.state.left_out:
        say(f"left out {counted(len(job.state.left_out))} after a failure; see left_out.csv")
    if (unread := job.damage.summary()) is not None:
        say(unread)
        job.log(unread)
