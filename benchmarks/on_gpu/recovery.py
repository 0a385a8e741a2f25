"""Memory: whether running out of it is survived, and how well the peak of whole steps is predicted."""

from __future__ import annotations

import copy
import gc
from contextlib import closing

import memory
import numpy as np
import torch
from memory_steps import plain_config
from torch import Tensor, nn

from keyhole.config.settings import Config, RunConfig, SelectConfig
from keyhole.engine import Engine
from keyhole.engine.memory.plan import Plan
from on_gpu.bench import Bench, new_engine
from on_gpu.streams import InMemory

ROOM = 2**31
"""Bytes beyond what the model takes: too few for 1,024 patches of 256 px at once, enough for a quarter of them."""


class NoRoom(nn.Module):
    """An encoder for a dry run that is out of memory for more than `most` patches, as a GPU would be."""

    def __init__(self, encoder: nn.Module, most: int) -> None:
        super().__init__()
        self.encoder, self.most = encoder, most

    def forward(self, patches: Tensor) -> Tensor:
        if len(patches) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (of a dry run)")
        found: Tensor = self.encoder(patches)
        return found


def recovery(bench: Bench) -> None:
    """Begins with chunks for which there is no room."""
    for compiled in (False, True):
        name = "recovery.compiled" if compiled else "recovery.eager"
        if not bench.attempt(name, lambda name=name, compiled=compiled: survive(bench, name, compiled)):  # type: ignore[misc]
            bench.figure(name, 0, "failed")


def survive(bench: Bench, name: str, compiled: bool) -> None:
    chunk, patches = (32, 64) if bench.dry else (1024, 2048)
    engine = new_engine(bench, compiled)
    if bench.dry:
        model = copy.deepcopy(engine.model)
        model.encoder = NoRoom(model.encoder, chunk // 4)
        engine = Engine(model, warn=bench.say)
    gc.collect()
    budget = 2**34
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        budget = torch.cuda.memory_reserved(bench.device) + ROOM
    engine.plan = Plan(chunk=chunk, budget=budget, named=bench.device.type == "cuda")
    kept = select(bench, engine, patches)
    below = engine.plan.chunk
    bench.figure(name, below < chunk and kept == 8, f"went on with chunks of {below} after {chunk}, kept {kept} of 8")


def select(bench: Bench, engine: Engine, patches: int) -> int:
    """How many patches a pass under the engine's plan keeps of 8."""
    pixels = np.random.default_rng(0).integers(0, 256, (patches, bench.side, bench.side, 3), np.uint8)
    engine.settings, engine.run, kept = SelectConfig(m=8), RunConfig(threads=2), 0
    with engine.limit(), closing(engine):
        for batch in engine.stream([[InMemory(pixels)]]):
            kept = sum(len(image.index) for image in engine.select(batch) if image is not None)
    return kept


def plan(bench: Bench) -> None:
    """Whole steps under a budget, each number of patches in a process of its own, as `benchmarks/memory.py --quick`."""
    base, worst, peak = budgeted(bench), 1.0, 0
    for n in memory.QUICK[:1] if bench.dry else memory.QUICK:
        setting = memory.PLAIN | {"n": n} | ({"n": 200, "m": 16, "b": 1} if bench.dry else {})
        found = memory.steps(base, **setting)
        ratio = found.predicted / found.measured
        worst = max(worst, ratio, key=lambda each: abs(np.log(each)))
        peak = max(peak, found.measured)
        bench.say(memory.row(setting, found))
        bench.say(f"allocated {found.device / 1e6:,.0f} MB, reserved {found.measured / 1e6:,.0f} MB of {base.memory}")
        bench.figure("plan.ratio", worst, f"{worst:.2f}")
        bench.figure("plan.peak", peak / 1e9, f"{peak / 1e9:.2f}")


def budgeted(bench: Bench) -> Config:
    """The configuration that `benchmarks/memory.py` measures."""
    base = plain_config(not bench.dry)
    return base.replace(run=RunConfig(device=str(bench.device)))
