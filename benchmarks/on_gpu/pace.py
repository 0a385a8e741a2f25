"""Milliseconds of a step of Megapixel MNIST at 1500 px in the real training loop, by chunk and by reading threads."""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing

import torch
from canvases import MNIST, write_canvases

from keyhole.config.settings import RunConfig
from keyhole.engine.opening import open_reader
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import start_job
from keyhole.training.loop import Loop
from on_gpu.bench import Bench
from on_gpu.digits import ADVISED, settings
from on_gpu.draw import SIDE

STEPS = 40
"""Of an epoch, with 16 canvases each."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An epoch: patches at a time and reading threads, None as planned."""

    chunk: int | None = None
    threads: int | None = None

    def __str__(self) -> str:
        threads = "threads as by default" if self.threads is None else f"{self.threads} threads"
        return f"chunks {'as planned' if self.chunk is None else f'of {self.chunk:,}'}, {threads}"


CASES = (Case(), Case(), Case(), Case(threads=4), Case(1024), Case(1024))
"""The first epoch with a chunk compiles."""


class Paced(Loop):
    """Times every epoch, each as a case says."""

    def __init__(self, bench: Bench, cases: tuple[Case, ...], key: str, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.bench, self.cases, self.key = bench, cases, key
        self.seen: set[int] = set()

    def learn(self) -> dict[str, float]:
        case, engine, device = self.cases[self.job.state.epoch], self.engine, self.bench.device
        engine.plan = dataclasses.replace(engine.plan, chunk=case.chunk or engine.plan.chunk)
        engine.close()
        engine.reader = open_reader(RunConfig(threads=case.threads), device)
        wait(device)
        start = time.perf_counter()
        row = super().learn()
        wait(device)
        steps = -(-len(self.job.manifest.split("train")) // self.job.config.train.batch)
        step = 1e3 * (time.perf_counter() - start) / steps
        first = " (compiling)" if engine.plan.chunk not in self.seen else ""
        self.seen.add(engine.plan.chunk)
        self.bench.say(f"{self.key}: {case}, {engine.plan.chunk:,} at a time: {step:.1f} ms a step{first}")
        if not first and case == Case():
            self.bench.figure(f"digits-pace.{self.key}", step, f"{step:.1f}")
        return row


def digits_pace(bench: Bench) -> None:
    count, size = (16, 300) if bench.dry else (16 * STEPS, SIDE)
    manifest = write_canvases(bench.scratch / "pace-canvases", bench.mnist or MNIST, size=size, train=count, test=1)
    for key, changes, cases in (("published", {}, CASES), ("advised", ADVISED, CASES[:4])):
        config = settings(bench, manifest).replace(**changes)
        out = bench.scratch / f"pace-{key}"
        config = config.replace(out=out, train={"epochs": len(cases), "warmup": 0 if len(cases) == 1 else 1})
        with Interrupt() as interrupt, closing(start_job(config, bench.say)) as job:
            Paced(bench, cases, key, job, interrupt).run()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
