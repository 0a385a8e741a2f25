"""Measures how fast a model learns on this machine, compared with its encoder alone, and where the time goes.

The encoder's rate is the limit: each patch has to go through it. The steps are those of `keyhole train`, on some of the
training images and in a run folder that is removed afterwards; no file of the user changes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keyhole.config.auto import settle_learning
from keyhole.config.settings import Config, DataConfig
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest, read_for_tasks, read_manifest
from keyhole.engine.device import choose_device
from keyhole.engine.encoders import Setting
from keyhole.runs.checkpoint import load_weights, read_info, read_tensors
from keyhole.runs.run import Run, read_rows
from keyhole.runs.state import State
from keyhole.tasks.kinds import Task
from keyhole.tools.bench.advice import Facts, advice
from keyhole.tools.bench.images import kind_of, write_images
from keyhole.tools.bench.steps import Floor, Steps, floor, run_steps
from keyhole.training.duration import about, spoken
from keyhole.training.job import Job, start_job
from keyhole.training.setup import cache_limit
from keyhole.training.trial import blind_epochs
from keyhole.util.platform import available_memory, cores
from keyhole.util.timing import PARTS


@dataclass(frozen=True)
class Speed:
    """The result of a measurement.

    Attributes:
        data: the images, in words.
        chosen: device, precision, compilation, threads and chunk, in words.
        floor: patches/s of the encoder alone.
        patches_per_s: of whole steps.
        images_per_s: of whole steps.
        first_step: seconds, including what it builds.
        step: mean seconds of the others.
        steps: number of steps measured.
        epoch, run: seconds of an epoch over all images and of the whole run, estimated from the steps.
        epochs: the same in words.
        seconds: by part, including `other`, of the steps measured.
        shares: of the time that passed; parts overlap on a GPU, so the sum may be more than 1.
        advice: one sentence.
    """

    data: str
    chosen: dict[str, str]
    floor: float
    patches_per_s: float
    images_per_s: float
    first_step: float
    step: float
    steps: int
    epoch: float
    run: float
    epochs: str
    seconds: dict[str, float]
    shares: dict[str, float]
    advice: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"of_floor": self.patches_per_s / self.floor}

    def lines(self) -> list[str]:
        """Return a table to print."""
        rows = [
            ("data", self.data),
            *self.chosen.items(),
            ("encoder alone", f"{self.floor:,.0f} patches/s"),
            (
                "reached",
                f"{self.patches_per_s:,.0f} patches/s, {self.patches_per_s / self.floor:.0%} of the encoder's; "
                f"{self.images_per_s:,.3g} images/s",
            ),
            ("first step", f"{self.first_step:.2f} s; {self.steps} after the warm-up took {self.step:.2f} s each"),
            ("an epoch", self.epochs),
            *((name, f"{self.seconds[name]:8.2f} s  {self.shares[name]:4.0%}") for name in self.seconds),
        ]
        width = max(len(name) for name, _ in rows)
        return [*(f"{name:{width}}  {value}" for name, value in rows), self.advice]


def speed(
    config: Config,
    *,
    run: Run | None = None,
    recipe: str | None = None,
    steps: int = 10,
    seconds: float = 60.0,
    say: Callable[[str], None] = lambda _: None,
) -> Speed:
    """Measure training steps and the encoder alone.

    Args:
        config: of the training. Without `data.path`, images are written to a folder that is removed afterwards.
        run: its weights are used, and its images if `data.path` is not given.
        recipe: of the configuration; decides which kind of images is written.
        steps: number of steps to measure.
        seconds: time after which no further step begins.
        say: called with what is being done.

    Raises:
        KeyholeError: a setting, the data or the run is not as it must be.
    """
    with tempfile.TemporaryDirectory(prefix="keyhole-bench-") as scratch:
        config, told, sizes = _with_data(config, run, recipe, Path(scratch), steps, say)
        job = start_job(_plain(config, Path(scratch)), lambda _: None)
        try:
            if run is not None:
                _load(job, run)
            compiled = _compile(job, config.run.compile, sizes.share)
            # where images stay in memory, all are there after the first epoch
            warm = job.state.steps_per_epoch if job.images.held_bytes else 1
            say(f"{warm} training step{'s' * (warm > 1)} to warm up, then up to {steps}")
            found = run_steps(job, warm, steps, seconds)
            say("the encoder alone")
            alone = floor(job)
        finally:
            job.close()
    epochs = _epochs(config, sizes, found, job.config.model.feature_width is not None)
    return _summary(job, told, compiled, found, alone, epochs)


def _plain(config: Config, scratch: Path) -> Config:
    """Return the configuration without what is not measured: hashes, loggers, saving, blind exploring."""
    return config.replace(
        out=scratch / "run",
        data={"hash_gb": 0.0, "val": 0.0, "test": 0.0},
        # weights are random, or those of the run: nothing is downloaded
        model={"pretrained": False, "weights": None},
        train={"explore": 0.0, "metric": "auto"},
        # `_compile` decides for the whole run, not for this short one
        run={"log": (), "save_minutes": 1e6, "compile": "off"},
    )


def _compile(job: Job, setting: Setting, share: float) -> str:
    """Compile the encoder if the run itself would, with `share` times as many images; return the reason in words."""
    expected = round(share * job.config.train.epochs * sum(job.images.counts.values()))
    choice = job.engine.choose_compile(setting, job.images.patch_shape, expected)
    if not choice.compile and len(job.images.patch_shape) == 1:
        return "none: the data are stored features, which are projected"
    return job.engine.encoders.describe(choice, job.images.patch_shape)


@dataclass(frozen=True)
class Epochs:
    """Seconds of an epoch over all images and of a whole run, estimated from the steps measured.

    Attributes:
        epoch: with validation, all patches scored.
        run: of all epochs, those of blind exploring without scoring.
    """

    epoch: float
    run: float
    text: str


def _epochs(config: Config, sizes: Sizes, found: Steps, features: bool) -> Epochs:
    learning = found.parts["learning"] / found.images
    scoring = found.seconds / found.images - learning
    config, _ = settle_learning(config, features)
    epochs, blind = config.train.epochs, min(config.train.epochs, blind_epochs(config))
    epoch = sizes.train * (scoring + learning) + sizes.val * scoring
    run = epochs * epoch - blind * sizes.train * scoring + (sizes.train + sizes.val) * scoring
    images = f"{sizes.train:,} training images" + (f" and {sizes.val:,} to validate on" if sizes.val else "")
    text = f"{about(epoch)} with {images}, {spoken(run)} for {epochs:,} epochs: an estimate from the steps measured"
    return Epochs(epoch, run, text)


# Data


@dataclass(frozen=True)
class Sizes:
    """Numbers of training and validation images, and the number of training images per image that is measured."""

    train: int
    val: int
    share: float


def _with_data(
    config: Config, run: Run | None, recipe: str | None, scratch: Path, steps: int, say: Callable[[str], None]
) -> tuple[Config, str, Sizes]:
    """Return the configuration with a CSV of as many training images as needed, their description and numbers."""
    wanted = (1 + steps) * config.train.batch
    if run is None and config.data.path is None:
        kind = kind_of(recipe, config)
        say(f"writing {kind.describe()}")
        path = write_images(kind, scratch, wanted)
        features = scratch / "features" if kind.what == "features" else None
        own = DataConfig(path=path, features=features, cache=0.0)
        config = config.replace(data=own)
        return (
            config,
            f"generated {kind.describe()}, read from disk each time",
            Sizes(kind.images, 0, kind.images / wanted),
        )
    if run is not None and config.data.path is None:
        # the manifest has absolute paths, and only the training images need to exist
        kept = {name: getattr(config.data, name) for name in ("cache", "on_bad_image")}
        data = run.config.data.replace(path=run.path / "manifest.csv", root=None, **kept)
        last = run.path / "last.safetensors"
        tasks = [Task.from_json(task) for task in State.from_json(read_info(last), last).tasks]
        manifest = read_for_tasks(data, tasks, ("train",))
        val = sum(row["split"] == "val" for row in read_rows(run.path / "manifest.csv"))
    else:
        data = config.data
        manifest = read_manifest(data, config.train.seed)
        val = len(manifest.split("val"))
    train = manifest.split("train")
    some = _some(manifest, wanted, config.train.seed)
    path = dataclasses.replace(manifest, items=some).write(scratch / "some.csv")
    cache = _cache(config, len(some) / len(train))
    names = tuple(f"{task.name}={task.kind}" for task in manifest.tasks)
    data = data.replace(path=path, root=None, tasks=names, cache=cache)
    source = run.path if run is not None and config.data.path is None else config.data.path
    config = config.replace(data=data)
    return (
        config,
        f"{len(some)} of {len(train)} training images of {source}",
        Sizes(len(train), val, len(train) / len(some)),
    )


def _some(manifest: Manifest, wanted: int, seed: int) -> tuple[Item, ...]:
    """Return `wanted` random training images, and one of each class that would be missing."""
    train = manifest.split("train")
    order = [train[place] for place in np.random.default_rng(seed).permutation(len(train))]
    some, rest = order[:wanted], order[wanted:]
    classed = [task for task in manifest.tasks if task.classes]

    def classes(item: Item) -> set[tuple[str, str]]:
        return {(task.name, label) for task in classed for label in task.classes_of(item.labels[task.name])}

    known = {label for item in some for label in classes(item)}
    for item in rest:
        if not classes(item) <= known:
            some.append(item)
            known |= classes(item)
    return tuple(some)


def _cache(config: Config, share: float) -> float:
    """Return the GB of decoded images that may stay in memory: the same share of them as of all images."""
    limit = cache_limit(config, choose_device(config.run.device))
    return share * (available_memory() / 4e9 if limit is None else limit)


def _load(job: Job, run: Run) -> None:
    """Load the run's weights; those of the heads only if the classes are the same."""
    path = run.path / "last.safetensors"
    tensors, _ = read_tensors(path)
    stored = {name.removeprefix("model."): each for name, each in tensors.items() if name.startswith("model.")}
    own = job.model.state_dict()
    heads = {name: weight for name, weight in own.items() if name.startswith("heads.")}
    same = all(name in stored and stored[name].shape == weight.shape for name, weight in heads.items())
    body = {name: weight for name, weight in stored.items() if not name.startswith("heads.")}
    load_weights(job.model, stored if same else body | heads, path)


# What was found


def _summary(job: Job, told: str, compiled: str, found: Steps, alone: Floor, epochs: Epochs) -> Speed:
    rate, colored, blank = alone
    config, plan = job.config, job.engine.plan
    cuda, features = job.device.type == "cuda", len(job.images.patch_shape) == 1
    seconds = dict.fromkeys(PARTS, 0.0) | found.parts
    seconds["other"] = max(0.0, found.seconds - sum(seconds.values()))
    shares = {name: part / found.seconds for name, part in seconds.items()}
    kept = sum(min(config.select.m, job.images.counts[item.name]) for item in job.manifest.split("train"))
    all_patches = sum(job.images.counts[item.name] for item in job.manifest.split("train"))
    encoding = found.patches / seconds["encoding"] if seconds["encoding"] else rate
    facts = Facts(
        features=features,
        cuda=cuda,
        threads=job.engine.reader.threads.count,
        cores=cores(),
        resident=job.images.held_bytes > 0,
        split=plan.split is not None,
        kept=kept / all_patches,
        kept_cost=seconds["learning"] * rate / (kept / all_patches * found.patches),
        blank=blank if cuda and config.patch.foreground == "all" else 0.0,  # on a CPU they are encoded once
        patches=all_patches / len(job.images.counts),
        encoding_rate=encoding / rate,
        colored_rate=colored,
    )
    return Speed(
        data=f"{told}; {facts.patches:,.0f} {'features' if features else 'patches'} each, {config.select.m} kept",
        chosen=_chosen(job, facts, compiled),
        floor=rate,
        patches_per_s=found.patches / found.seconds,
        images_per_s=found.images / found.seconds,
        first_step=found.first,
        step=found.seconds / found.steps,
        steps=found.steps,
        epoch=epochs.epoch,
        run=epochs.run,
        epochs=epochs.text,
        seconds=seconds,
        shares=shares,
        advice=advice(shares, facts),
    )


def _chosen(job: Job, facts: Facts, compiled: str) -> dict[str, str]:
    plan = job.engine.plan
    device = torch.cuda.get_device_name(job.device) if facts.cuda else f"CPU, {torch.get_num_threads()} threads"
    learn = "at once" if plan.split is None else f"in chunks of {plan.split:,}"
    return {
        "computing": f"{device}, in {job.engine.encoders.arithmetic}",
        "encoder": compiled,
        "reading": f"{facts.threads} threads on {facts.cores} cores"
        + ("; decoded images stay in memory" if facts.resident else ""),
        "at a time": f"{plan.chunk:,} patches looked at; {job.config.train.batch} images a step, learned from {learn}",
    }
