"""Measures how fast a model learns on this machine, compared with its encoder alone, and where the time goes.

The steps are those of `keyhole train`, on some of the training images and in a run folder that is removed afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from keyhole.config.auto import settle_learning
from keyhole.config.settings import Config
from keyhole.engine.scoring import blank_rows
from keyhole.errors import DataError, Interrupted
from keyhole.runs.checkpoint import load_weights, read_tensors
from keyhole.runs.run import Run
from keyhole.tools.bench.images import Data, measured_data
from keyhole.tools.bench.result import Facts, Speed, advice
from keyhole.training.duration import about, spoken
from keyhole.training.interrupt import Interrupt, StopRequested
from keyhole.training.job import Job, start_job
from keyhole.training.loop import Loop
from keyhole.training.trial import blind_epochs
from keyhole.util.platform import cores
from keyhole.util.timing import PARTS
from keyhole.util.wording import counted

MIN_FLOOR_RUNS, FLOOR_SECONDS = 5, 1.0
"""The encoder's rate is the median of as many runs over a chunk as fit into the time, but of at least this many."""


def speed(
    config: Config, run: Run | None, recipe: str | None, steps: int, seconds: float, say: Callable[[str], None]
) -> Speed:
    """Measure training steps and the encoder alone.

    Args:
        config: of the training. Without `data.path`, images are written to a folder that is removed afterwards.
        run: a run whose weights are used, and its images if `data.path` is not given.
        recipe: name of the recipe, which decides which kind of images is written.
        steps: number of steps to measure.
        seconds: time after which no further step begins, once one has been measured.
        say: called with a message before each part.
    """
    with tempfile.TemporaryDirectory(prefix="keyhole-bench-") as scratch:
        config, data = measured_data(config, run, recipe, Path(scratch), steps, say)
        job = start_job(_plain(config, Path(scratch)), lambda _: None)
        try:
            if run is not None:
                _load(job, run)
            compiled = _compile(job, config, data)
            # where images stay in memory, all are there after the first epoch
            warm = job.state.steps_per_epoch if job.images.held_bytes else 1
            say(f"{counted(warm, 'training step')} to warm up, then up to {steps}")
            with Interrupt() as interrupt, job.engine.limit():
                found = _Clocked(job, interrupt, warm, steps, seconds)
                found.measure()
            say("the encoder alone")
            alone = _floor(job)
        finally:
            job.close()
    return _summary(config, data, compiled, found, alone)


# The job


def _plain(config: Config, scratch: Path) -> Config:
    """Return the configuration without what is not measured: hashes, loggers, saving, blind exploring."""
    return config.replace(
        out=scratch / "run",
        data={"hash_gb": 0.0, "val": 0.0, "test": 0.0},
        # weights are random, or those of the run: nothing is downloaded
        model={"pretrained": False, "weights": None, "start": None},
        train={"explore": 0.0, "metric": "auto", "watch": "val"},
        # `_compile` decides for the whole run, not for this short one
        run={"log": (), "save_minutes": 1e6, "compile": "off"},
    )


def _load(job: Job, run: Run) -> None:
    """Load the run's weights; those of the heads only if the classes are the same."""
    path = run.path / "last.safetensors"
    tensors, _ = read_tensors(path)
    stored = {name.removeprefix("model."): each for name, each in tensors.items() if name.startswith("model.")}
    heads = {name: weight for name, weight in job.model.state_dict().items() if name.startswith("heads.")}
    if not all(name in stored and stored[name].shape == weight.shape for name, weight in heads.items()):
        stored = {name: weight for name, weight in stored.items() if not name.startswith("heads.")} | heads
    load_weights(job.model, stored, path)


def _compile(job: Job, config: Config, data: Data) -> str:
    """Compile the encoder if the run over all images would; return the reason in words."""
    expected = round(data.share * config.train.epochs * sum(job.images.counts.values()))
    choice = job.engine.choose_compile(config.run.compile, job.images.patch_shape, expected)
    if not choice.compile and len(job.images.patch_shape) == 1:
        return "none: the data are stored features, which are projected"
    return job.engine.encoders.describe(choice, job.images.patch_shape)


# Measuring


class _Enough(Exception):  # noqa: N818 - an event, not an error
    """Enough steps have been measured."""


class _Clocked(Loop):
    """The training loop, timed at the end of each step instead of saved.

    Attributes:
        first: seconds of the first step, with what it builds, compiles and allocates.
        seconds, images, patches, parts: of the `done` - `warm` steps after the warm-up.
    """

    def __init__(self, job: Job, interrupt: Interrupt, warm: int, steps: int, limit: float) -> None:
        super().__init__(job, interrupt)
        self.warm, self.steps, self.limit = warm, steps, limit
        self.done = self.patches = self.images = 0
        self.began = self.start = time.perf_counter()
        self.first = self.seconds = 0.0
        self.parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.before = dict(self.parts)

    def measure(self) -> None:
        """Train for as many epochs as it takes to make enough steps."""
        try:
            with suppress(_Enough):
                while True:
                    self.learn()
                    self.job.state.epoch, self.job.state.batch = self.job.state.epoch + 1, 0
        except StopRequested as stop:
            assert self.interrupt.signal is not None
            raise Interrupted("stopped; nothing was changed", self.interrupt.signal) from stop

    def learn(self) -> dict[str, float]:
        self.before = dict.fromkeys(PARTS, 0.0)  # the timer starts at 0 in each epoch
        return super().learn()

    def after_step(self, patches: int) -> None:
        """Note the time at the end of a step; end the loop after the last one."""
        parts = self.engine.timer.seconds()  # waits for the device
        now = time.perf_counter()
        self.done += 1
        if self.done == 1:
            self.first = now - self.began
        if self.done == self.warm:
            self.start = now
        elif self.done > self.warm:
            batch, images = self.job.config.train.batch, len(self.job.manifest.split("train"))
            self.patches += patches
            self.images += min(batch, images - (self.job.state.batch - 1) * batch)  # the last batch may have fewer
            self.parts = {name: self.parts[name] + parts[name] - self.before[name] for name in PARTS}
            self.seconds = now - self.start
            if self.done == self.warm + self.steps or self.seconds > self.limit:
                raise _Enough
        self.before = parts


class _Floor(NamedTuple):
    """The speed of the encoder alone."""

    rate: float  # patches/s
    colored: float  # rate with colors changed first, as a share of `rate`
    blank: float  # share of patches of one color


def _floor(job: Job) -> _Floor:
    """Measure the encoder over one full chunk of real patches that is on the device already."""
    pixels = _chunk(job)
    blank = float(blank_rows(pixels.cpu().numpy()).mean())
    plain, colored = _seconds(job, pixels, None), 1.0
    if pixels.dtype == torch.uint8 and job.config.augment.color:
        channels = pixels.shape[-1]
        color = torch.eye(channels, channels + 1, device=job.device).expand(len(pixels), -1, -1)
        colored = plain / _seconds(job, pixels, color)
    return _Floor(len(pixels) / plain, colored, blank)


def _seconds(job: Job, pixels: Tensor, color: Tensor | None) -> float:
    """Return the median seconds of encoding these patches once."""
    encoders = job.engine.encoders

    def now() -> float:
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        return time.perf_counter()

    times: list[float] = []
    with encoders.inference():
        for _ in range(2):  # builds, compiles, warms up
            encoders.embed(pixels, color)
        began = now()
        while len(times) < MIN_FLOOR_RUNS or time.perf_counter() - began < FLOOR_SECONDS:
            start = now()
            encoders.embed(pixels, color)
            times.append(now() - start)
    return sorted(times)[len(times) // 2]


def _chunk(job: Job) -> Tensor:
    """Return a chunk of real patches on the device, repeated if the images have fewer."""
    size, items, batch = job.engine.plan.chunk, job.manifest.split("train"), job.config.train.batch
    openers = [job.images.opener(item) for item in items]
    batches = [openers[start : start + batch] for start in range(0, len(openers), batch)]
    for read in job.engine.reader.stream(batches, size, "mask"):
        for part in read.chunks():
            found = torch.from_numpy(part.pixels[: part.count].copy())
            return torch.cat([found] * -(-size // len(found)))[:size].to(job.device)
    raise DataError(f"{job.config.data.path}: no training image can be read; see keyhole check")


# What was found


def _summary(full: Config, data: Data, compiled: str, found: _Clocked, alone: _Floor) -> Speed:
    job, steps = found.job, found.done - found.warm
    config, plan, counts = job.config, job.engine.plan, job.images.counts
    cuda, features = job.device.type == "cuda", len(job.images.patch_shape) == 1
    seconds = found.parts | {"other": max(0.0, found.seconds - sum(found.parts.values()))}
    shares = {name: part / found.seconds for name, part in seconds.items()}
    kept = sum(min(config.select.m, counts[item.name]) for item in job.manifest.split("train"))
    all_patches = sum(counts[item.name] for item in job.manifest.split("train"))
    encoding = found.patches / seconds["encoding"] if seconds["encoding"] else alone.rate
    facts = Facts(
        features=features,
        cuda=cuda,
        threads=job.engine.reader.threads.count,
        cores=cores(),
        resident=job.images.held_bytes > 0,
        split=plan.split is not None,
        kept=kept / all_patches,
        kept_cost=seconds["learning"] * alone.rate / (kept / all_patches * found.patches),
        blank=alone.blank if cuda and config.patch.foreground == "all" else 0.0,  # on a CPU they are encoded once
        patches=all_patches / len(counts),
        encoding_rate=encoding / alone.rate,
        colored_rate=alone.colored,
    )
    device = torch.cuda.get_device_name(job.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    in_memory = "; decoded images stay in memory" if facts.resident else ""
    learn = "at once" if plan.split is None else f"in chunks of {plan.split:,}"
    epoch, run, epochs = _epochs(full, data, found, config.model.feature_width is not None)
    return Speed(
        data=f"{data.told}; {facts.patches:,.0f} {'features' if features else 'patches'} each, {config.select.m} kept",
        chosen={
            "computing": f"{device}, in {job.engine.encoders.arithmetic}",
            "encoder": compiled,
            "reading": f"{facts.threads} threads on {facts.cores} cores{in_memory}",
            "at a time": f"{plan.chunk:,} patches encoded; {config.train.batch} images a step, learned from {learn}",
        },
        floor=alone.rate,
        patches_per_s=found.patches / found.seconds,
        images_per_s=found.images / found.seconds,
        first_step=found.first,
        step=found.seconds / steps,
        steps=steps,
        epoch=epoch,
        run=run,
        epochs=epochs,
        seconds=seconds,
        shares=shares,
        advice=advice(shares, facts),
    )


def _epochs(config: Config, data: Data, found: _Clocked, features: bool) -> tuple[float, float, str]:
    """Estimate the seconds of an epoch and of a whole run, whose epochs of blind exploring score nothing."""
    learning = found.parts["learning"] / found.images
    scoring = found.seconds / found.images - learning
    config, _ = settle_learning(config, features)
    epochs, blind = config.train.epochs, min(config.train.epochs, blind_epochs(config))
    epoch = data.train * (scoring + learning) + data.val * scoring
    run = epochs * epoch - blind * data.train * scoring + (data.train + data.val) * scoring
    images = f"{data.train:,} training images" + (f" and {data.val:,} to validate on" if data.val else "")
    text = f"{about(epoch)} with {images}, {spoken(run)} for {epochs:,} epochs: an estimate from the steps measured"
    return epoch, run, text
