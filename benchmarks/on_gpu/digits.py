"""Megapixel MNIST: the published setting and what is advised, trained for the time that is left.

Accuracy and seconds of every epoch.
"""

from __future__ import annotations

import signal
import time
from contextlib import closing
from pathlib import Path

from canvases import MNIST, write_canvases

from keyhole.config.file import resolve
from keyhole.config.settings import Config
from keyhole.errors import Interrupted
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import start_job
from keyhole.training.loop import Loop, train_config
from on_gpu.bench import Bench
from on_gpu.draw import SIDE, write_digits

EPOCHS, WARMUP = 24, 3
"""As the published code was run on one H200, so that every epoch has its counterpart."""
TASKS = ("majority", "max", "top", "multi")
PUBLISHED = {9: ".61 .72 .60 .06", 13: ".95 .83 .83 .41", 24: ".981 .905 .904 .655"}
"""Accuracy of the tasks after an epoch, published code and generator, seed 0."""
REACHED = 0.981, 0.905, 0.904, 0.655
"""The last of them, after 434 s on one H200."""
ADVISED: dict[str, dict[str, object]] = {
    "patch": {"foreground": "non-empty"},
    "select": {"rule": "global", "order": "file", "chunk": None},
    "train": {"decay": "matrices", "clip": 1.0, "average": "auto"},
    "augment": {"shift": True},
}
"""What is advised in place of the published settings; M, batch, rate and epochs stay."""
SPARE = 5.0
"""Seconds that the end of a run takes."""


class Timed(Loop):
    """Tells of every epoch, and asks the run to stop where there is no time for another."""

    def __init__(self, bench: Bench, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.bench, self.passed, self.reached = bench, 0.0, False

    def learn(self) -> dict[str, float]:
        start = time.monotonic()
        row = super().learn()
        self.seconds = time.monotonic() - start
        return row

    def end_epoch(self, row: dict[str, float]) -> None:
        super().end_epoch(row)
        bench, epoch, last = self.bench, int(row["epoch"]), row["seconds"]
        self.passed += last
        accuracy = {task: self.accuracy(row, task) for task in TASKS}
        bench.figure(f"{bench.name}.epochs", epoch, f"{epoch}, in {self.passed:.0f} s with their evaluations")
        rest = f"with the 1,000 canvases to measure on {last:.1f} s"
        bench.figure(f"{bench.name}.seconds", self.seconds, f"{self.seconds:.1f}, {rest}")
        if not self.reached:
            self.reached = all(accuracy[task] >= least for task, least in zip(TASKS, REACHED, strict=True))
            shown = f"{self.passed:.0f}, after epoch {epoch}" if self.reached else f"not in {epoch} epochs"
            bench.figure(f"{bench.name}.reached", self.passed if self.reached else float("inf"), shown)
        published = f" (published {PUBLISHED[epoch]})" if epoch in PUBLISHED else ""
        shown = " ".join(f"{task} {value:.3f}" for task, value in accuracy.items())
        bench.say(f"epoch {epoch}: {shown}{published}; loss {row['train.loss']:.4f}; {last:.1f} s")
        for task, value in accuracy.items():
            bench.figure(f"{bench.name}.{task}", value, f"{value:.3f} after epoch {epoch} of {EPOCHS}")
        if bench.left < SPARE + 1.1 * last:
            bench.say(f"{bench.left:.0f} s are left: no time for another epoch")
            signal.raise_signal(signal.SIGTERM)

    def accuracy(self, row: dict[str, float], task: str) -> float:
        return next(
            (row[key] for key in (f"test.{task}.accuracy", f"test.{task}.exact_match") if key in row), float("nan")
        )


def digits(bench: Bench) -> None:
    learn(bench, settings(bench, write_digits(bench)))


def digits_advised(bench: Bench) -> None:
    learn(bench, settings(bench, write_digits(bench)).replace(**ADVISED))


def learn(bench: Bench, config: Config) -> None:
    source = "MNIST" if bench.mnist else "scikit-learn's digits, enlarged: another, harder problem"
    bench.say(f"canvases of the published construction from {source}; {EPOCHS} epochs, {WARMUP} of them warm-up")
    with Interrupt() as interrupt, closing(start_job(config, bench.say)) as job:
        try:
            Timed(bench, job, interrupt).run()
        except Interrupted as stop:
            bench.say(str(stop))


def train_some(bench: Bench, changes: dict[str, dict[str, object]]) -> None:
    """An epoch on a few canvases: what it compiles lies in torch's cache on disk afterwards."""
    count, folder = 16 if bench.dry else 64, bench.scratch / f"{bench.name}-canvases"
    size = 300 if bench.dry else SIDE
    manifest = write_canvases(folder, bench.mnist or MNIST, size=size, train=count, test=1)
    config = settings(bench, manifest).replace(**changes)
    config = config.replace(out=folder / "run", train={"epochs": 1, "warmup": 0})
    start = time.monotonic()
    train_config(config)
    bench.say(f"an epoch of {count} canvases, from the start of the run to its end: {time.monotonic() - start:.1f} s")


def compile_published(bench: Bench) -> None:
    train_some(bench, {})


def compile_advised(bench: Bench) -> None:
    train_some(bench, ADVISED)


def settings(bench: Bench, manifest: Path) -> Config:
    """The recipe `megapixel-mnist` with the epochs of the run that it is compared with."""
    kinds = [f"{task}={'multilabel' if task == 'multi' else 'multiclass'}" for task in TASKS]
    changed: dict[str, dict[str, object]] = {
        "data": {"path": str(manifest), "tasks": kinds},
        "train": {"epochs": 2 if bench.dry else EPOCHS, "warmup": 1 if bench.dry else WARMUP},
        "run": {"device": str(bench.device), "compile": "off" if bench.dry else "on"},
    }
    if bench.dry:
        changed["model"] = {"encoder": "small", "width": 4, "stages": 2, "hidden": 16, "channels": 1}
        changed["select"] = {"m": 4, "chunk": 8}
        changed["train"] |= {"batch": 2}
    return resolve("megapixel-mnist").replace(out=bench.scratch / bench.name, **changed)
