"""Estimate the time of a run: read, score and learn from a few chunks before it starts.

Weights, statistics and random state do not change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.config.auto import number, settle_learning
from keyhole.config.settings import Config
from keyhole.engine import Engine, split_backward
from keyhole.engine.bags import positions
from keyhole.engine.device import choose_device, choose_precision
from keyhole.engine.encoders import wait
from keyhole.engine.memory.probe import as_it_was, example_positions
from keyhole.errors import KeyholeError
from keyhole.loading import Opener
from keyhole.nn import build_classifier
from keyhole.nn.build import patch_shape
from keyhole.nn.tensors import AsRead, as_read, on_device
from keyhole.tasks.kinds import Task
from keyhole.training.duration import Costs, Estimate, Work
from keyhole.training.job import Job
from keyhole.util.budget import out_of_memory
from keyhole.util.tf32 import tf32
from keyhole.util.threads import default_threads

MIN_SECONDS = 0.3
"""A measurement on a CPU that takes less is repeated, since the first one is slower."""
MAX_TRIAL_BYTES = 16_000_000
"""Maximum number of bytes written to time saving."""
FEW_LEARNED, MAX_LEARNED = 16, 256
"""Patches of the first timed step, which takes seconds with a large encoder on a CPU, and of a second one after a fast
first, in which the constant time of a step counts less."""


def estimate(job: Job) -> tuple[Estimate | None, str | None]:
    """Return the estimate (None if a trial failed) and a line for users (None for a short run)."""
    config, counts = job.config, job.images.counts
    try:
        costs, how = _measured(job)
    except (KeyholeError, RuntimeError, MemoryError) as error:
        if not isinstance(error, KeyholeError) and not out_of_memory(error):
            raise
        return None, f"time: not estimated, since a trial failed ({' '.join(str(error).split())})"
    train, val = ([counts[item.name] for item in job.manifest.split(split)] for split in ("train", config.train.watch))
    sizes = len(train), sum(train), len(val), sum(val)
    work = Work(*sizes, config.select.m, config.train.epochs, blind_epochs(config), job.images.held_bytes > 0)
    found = Estimate(work, costs)
    return found, found.line(how, job.state.epoch)


def blind_epochs(config: Config) -> float:
    """Return the number of epochs that draw patches at random: the first half of exploring."""
    return number(config.train.explore, "train.explore") / 2


def forecast(config: Config, work: Work, reading: tuple[float, float], feature_width: int | None) -> str | None:
    """Measure the model of a configuration on noise, and say how long a run takes; None for a short run.

    Args:
        config: configuration of the planned run; this downloads no weights.
        work: work of the planned run.
        reading: seconds to open an image and to read a patch, on one thread.
        feature_width: width of stored features, or None for images.
    """
    try:
        config, _ = settle_learning(config, features=feature_width is not None)
        device = choose_device(config.run.device)
        settings = config.model.replace(feature_width=feature_width)
        shape = patch_shape(settings, config.patch.size)
        model = build_classifier(
            settings, [Task("label", "binary", ("no", "yes"))], config.patch.size, pretrained=False
        )
        model = model.to(device)
        engine = Engine(model, arithmetic=choose_precision(config.train.precision, model.encoder, shape))
        for count in (4, 64):  # 64 only where 4 are fast
            noise = np.random.default_rng(0).integers(0, 256, (count, *shape))
            pixels = noise.astype(np.uint8 if shape[1:] else np.float32)
            where = example_positions(model, (count,), device)
            began = time.perf_counter()
            kept = min(config.select.m * config.train.batch, count)
            score, learn = _model_seconds(engine, pixels, where, kept, config.augment.color > 0)
            if time.perf_counter() - began > MIN_SECONDS:
                break
    except (KeyholeError, ValueError, RuntimeError) as error:
        return f"time: not estimated, since the model cannot be built or tried ({' '.join(str(error).split())})"
    threads = min(config.run.threads or default_threads(device.type == "cuda"), default_threads())
    costs = Costs(*reading, score, learn, threads, overlap=device.type != "cpu")
    found = Estimate(dataclasses.replace(work, blind=blind_epochs(config)), costs)
    return found.line(f"reading a few patches of each image, scoring {count} patches of noise and learning from some")


class _Piece(NamedTuple):
    """Some patches of an image with their positions, and the seconds to open the image and to read a patch."""

    image: float
    patch: float
    pixels: NDArray[Any]
    where: Tensor | None


def _measured(job: Job) -> tuple[Costs, str]:
    items, plan, reader = job.manifest.split("train"), job.engine.plan, job.engine.reader
    openers = [job.images.opener(item) for item in {items[k].name: items[k] for k in (0, len(items) // 2)}.values()]
    pieces = [reader.run(each.name, partial(_read, each, job)) for each in openers]
    pixels = np.concatenate([piece.pixels for piece in pieces])[: plan.chunk]
    there = [piece.where for piece in pieces if piece.where is not None]
    where = torch.cat(there)[: plan.chunk] if there else None
    score, learn = _model_seconds(job.engine, pixels, where, plan.split or plan.kept, job.config.augment.color > 0)
    image, patch = (sum(part) / len(pieces) for part in list(zip(*pieces, strict=True))[:2])
    threads = min(reader.threads.count, default_threads())
    costs = Costs(image, patch, score, learn, threads, job.device.type != "cpu", _saving(job.run.path))
    images = f"{len(pieces)} image{'s' * (len(pieces) > 1)}"
    return costs, f"reading {images}, scoring {len(pixels)} patches and learning from some of them"


def _saving(run: Path) -> float:
    """Estimate the seconds to save the state by writing a part of its size to a temporary file; 0 if that fails."""
    size = (run / "last.safetensors").stat().st_size
    part = bytes(min(size, MAX_TRIAL_BYTES))
    began = time.perf_counter()
    with suppress(OSError), tempfile.TemporaryFile(dir=run) as file:  # the next save reports it
        file.write(part)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        for data in (part, file.read()):  # saving reads the file back and compares it
            hashlib.sha256(data).digest()
        return (time.perf_counter() - began) * size / len(part)
    return 0.0


def _read(opener: Opener, job: Job) -> _Piece:
    """Read patches twice; the additional time of the first read is the time to open the image."""
    began = time.perf_counter()
    source = opener()
    try:
        half = max(1, min(job.engine.plan.chunk, len(source)) // 2)
        first = source.read(np.arange(half))
        opened = time.perf_counter()
        index = np.arange(len(source) - half, len(source))
        second = source.read(index)
        again = time.perf_counter() - opened
        where = None
        if job.model.position is not None:
            both = np.concatenate([np.arange(half), index])
            where = on_device(positions(job.model, source, both), job.device)
        return _Piece(max(0.0, opened - began - again), again / half, np.concatenate([first, second]), where)
    finally:
        source.close()


def _model_seconds(
    engine: Engine, pixels: NDArray[Any], where: Tensor | None, step: int, color: bool
) -> tuple[float, float]:
    """Return the seconds to score a patch and to learn from one; the model does not change.

    Args:
        engine: engine of the model.
        pixels: (k h w c) uint8, or (k f) features, as read.
        where: positions (k) or (k 2), if the model has a position code.
        step: number of patches in a gradient step.
        color: training changes colours.
    """
    model, encoders, device = engine.model, engine.encoders, engine.device
    colors = None
    if color and pixels.dtype == np.uint8:
        channels = pixels.shape[-1]
        colors = torch.eye(channels, channels + 1, device=device).expand(len(pixels), -1, -1)

    def learn(count: int) -> None:
        rows = np.resize(np.arange(len(pixels)), count)  # repeated where the images have fewer
        place = None if where is None else where[torch.from_numpy(rows).to(device)][None]

        def part(start: int, stop: int) -> Tensor | AsRead:
            some = rows[start:stop]
            return as_read(torch.from_numpy(pixels[some]), device, None if colors is None else colors[some])

        def loss(logits: dict[str, Tensor]) -> Tensor:
            return torch.stack([each.sum() for each in logits.values()]).sum()

        model.train()
        mask = torch.ones(1, count, dtype=torch.bool)
        with tf32(encoders.arithmetic.tf32):
            split_backward(model, part, place, mask, loss, encode=encoders.learn)

    def score() -> None:
        encoders.logits(encoders.embed(torch.from_numpy(pixels).to(device), colors), where)

    few, many = max(2, min(step, FEW_LEARNED)), max(2, min(step, MAX_LEARNED))
    if encoders.compiled:  # for few numbers of patches, and the run will need that of its steps
        few = many = max(2, step)
    timed = partial(_seconds, device=device, builds=device.type != "cpu" or encoders.compiled)
    with as_it_was(model, device):
        with encoders.inference():
            scored = timed(score)
        learned = timed(partial(learn, few)) / few
        if few < many and learned * many < MIN_SECONDS:
            learned = timed(partial(learn, many)) / many
        return scored / len(pixels), learned


def _seconds(work: Callable[[], object], device: torch.device, builds: bool) -> float:
    """Return the seconds of some work; of the second time where the first `builds` kernels, however long that takes."""
    for _ in range(2):
        began = time.perf_counter()
        work()
        wait(device)
        seconds = time.perf_counter() - began
        if seconds > MIN_SECONDS and not builds:
            break
    return seconds
