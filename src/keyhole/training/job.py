"""A run at work: what is loaded from its folder or created with it, and the state that is saved and resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import keyhole
from keyhole.checkpoint import load_state, read_info, save_state
from keyhole.compiling import choose_compile
from keyhole.config import Config
from keyhole.config_file import dump_config
from keyhole.data.hashes import FileHash, hash_files
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest, read_for_tasks, read_manifest, write_left_out
from keyhole.device import arithmetic_of, choose_device
from keyhole.errors import ConfigError, OutputError, RunError
from keyhole.files import file_size, umask, writable_folder, write_atomic
from keyhole.memory.budget import parse_memory
from keyhole.memory.pace import fixed_chunk
from keyhole.memory.plan import Plan, make_plan
from keyhole.nn import IPSClassifier
from keyhole.passes import open_reader
from keyhole.reading import Batch, Reader
from keyhole.reading.unreadable import parse_share
from keyhole.tasks import Task
from keyhole.training.damage import Damage
from keyhole.training.loggers import check_loggers
from keyhole.training.run import Log, Run, check_new, environment, read_rows
from keyhole.training.score import choose_metric
from keyhole.training.setup import Images, absolute, new_model, new_optimizer, scan, targets, with_features


@dataclass
class State:
    """How far a run is; saved with every state, so that nothing else needs to be remembered.

    Attributes:
        epoch: epochs finished.
        batch: batches done in the epoch under way.
        step: optimizer steps done.
        steps_per_epoch: fixed at the start, so that the schedule does not move when an image is left out.
        loss_sum, loss_count: of the epoch under way.
        metric: what names the best model; empty without a validation split.
        best: (value, loss) of the best epoch, or None.
        best_epoch: counted from 1.
        waiting: epochs since.
        stopped: early stopping has ended the learning.
        plan: how memory is used; with another one the last bits of a resumed run could differ.
        left_out: image -> (epoch it failed in, reason); it is used no more from the next epoch on.
        tasks: as resolved at the start.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    steps_per_epoch: int = 1
    loss_sum: float = 0.0
    loss_count: int = 0
    metric: str = ""
    best: tuple[float, float] | None = None
    best_epoch: int = 0
    waiting: int = 0
    stopped: bool = False
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    tasks: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any], path: Path) -> State:
        """Of the file `path`.

        Raises:
            RunError: it describes no state of a run.
        """
        try:
            best = data["best"]
            left_out = {name: (int(epoch), reason) for name, (epoch, reason) in data["left_out"].items()}
            return cls(**{**data, "best": None if best is None else (best[0], best[1]), "left_out": left_out})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path}: not the state of a run ({error!r}). Was another file copied over it?") from error


@dataclass
class Job:
    """All that the loop works with."""

    run: Run
    config: Config
    manifest: Manifest
    images: Images
    reader: Reader
    model: IPSClassifier
    optimizer: torch.optim.AdamW
    state: State
    log: Log
    device: torch.device
    plan: Plan
    damage: Damage

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.manifest.tasks

    def save(self) -> None:
        """The state, so that `keyhole resume` goes on from here."""
        save_state(self.run.path / "last.safetensors", self.model, self.optimizer, self.state.to_json())

    def usable(self, item: Item) -> bool:
        """Whether an image has not failed in an earlier epoch."""
        failed = self.state.left_out.get(item.name)
        return failed is None or failed[0] >= self.state.epoch

    def leave_out(self, name: str, reason: str) -> None:
        """Notes an image that failed while it was read; listed at once, unused from the next epoch on."""
        if name in self.state.left_out:
            return
        self.state.left_out[name] = (self.state.epoch, reason)
        self.log(f"left out: {reason}")
        add_left_out(self.run, {name: reason})

    def note_unreadable(self, items: Sequence[Item], batch: Batch) -> None:
        """Lists what could not be read of a batch.

        Raises:
            TooMuchUnreadable: more than `--unreadable` of the patches of this epoch.
        """
        self.damage.begin(self.state.epoch)
        for row, item in enumerate(items):
            source, error = batch.sources[row], batch.failed.get(row)
            if error is not None and self.config.data.on_bad_image == "skip":
                self.leave_out(item.name, str(error))
            elif error is not None:
                self.log(f"unreadable: {error}")
                self.damage.lose(item.name, self.images.counts[item.name], str(error))
            elif source is not None and batch.unreadable.get(row):
                reasons = batch.unreadable[row]
                self.log(f"unreadable: {item.name}: {len(reasons)} patches ({next(iter(reasons.values()))})")
                self.damage.add(item.name, source, reasons)
        self.damage.check()

    def close(self) -> None:
        self.reader.close()


def add_left_out(run: Run, reasons: Mapping[str, str]) -> None:
    """Adds to the run's left_out.csv what is not in it yet."""
    path = run.path / "left_out.csv"
    known = {row["name"]: row["reason"] for row in read_rows(path)}
    write_left_out(path, ({**reasons, **known}).items())


def start_job(config: Config, say: Callable[[str], None]) -> Job:
    """Checks everything, then creates the run folder, whole and resumable from its first moment.

    Raises:
        KeyholeError: the run folder exists, or the data, a setting or the output is not as it must be.
    """
    if config.out is None:
        raise ConfigError("--out: no run folder given")
    config = absolute(config)
    assert config.out is not None
    check_new(config.out)
    check_loggers(config.run.log)
    device = choose_device(config.run.device)
    parse_share(config.unreadable)
    manifest = read_manifest(config.data, config.train.seed)
    config, notes = with_features(config, manifest)
    reader = open_reader(config.run, device)
    try:
        images, manifest, lines = scan(config, manifest, reader, device)
        model = new_model(config, manifest.tasks, device)
        optimizer = new_optimizer(config, model)
        plan = _plan(config, images, model, optimizer, device)
        val = manifest.split("val")
        metric, undefined = choose_metric(config.train.metric, manifest.tasks, targets(manifest, val) if val else None)
        state = State(
            steps_per_epoch=-(-len(manifest.split("train")) // config.train.batch),
            metric=metric,
            tasks=[task.to_json() for task in manifest.tasks],
            plan=plan.to_json(),
        )
        hashes, hashed = _hashes(config, manifest)
        run = _create_folder(config, manifest, hashes, model, optimizer, state, device)
        job = _job(run, config, manifest, images, reader, model, optimizer, state, device)
        for line in (*manifest.notes, *notes, *lines, *hashed, *undefined, *_overview(job), _compile(job)):
            say(line)
            job.log(line)
    except BaseException:
        reader.close()
        raise
    return job


def _plan(
    config: Config, images: Images, model: IPSClassifier, optimizer: torch.optim.Optimizer, device: torch.device
) -> Plan:
    """How the memory of the budget is used."""
    return make_plan(
        model,
        patch_shape=images.patch_shape,
        m=config.select.m,
        batch=config.train.batch,
        device=device,
        memory=parse_memory(config.memory),
        chunk=fixed_chunk(config.select),
        host_buffers=images.held_bytes,
        largest_bag=max(images.counts.values()),
        learn=True,
        ahead=config.run.ahead,
        color=config.augment.color > 0,
        optimizer=optimizer,
    )


def _job(
    run: Run,
    config: Config,
    manifest: Manifest,
    images: Images,
    reader: Reader,
    model: IPSClassifier,
    optimizer: torch.optim.AdamW,
    state: State,
    device: torch.device,
) -> Job:
    plan = Plan.from_json(state.plan)
    damage = Damage(run.path / "unreadable.csv", sum(images.counts.values()), config.unreadable, state.epoch)
    log = Log(run.path / "log.txt")
    return Job(run, config, manifest, images, reader, model, optimizer, state, log, device, plan, damage)


def _hashes(config: Config, manifest: Manifest) -> tuple[dict[str, FileHash], list[str]]:
    """What the files hold, for the manifest; of very much data the sizes alone, since reading it all takes hours."""
    sizes = {item.name: file_size(item.source) for item in manifest.items}
    total = sum(sizes.values())
    if total <= config.data.hash_gb * 1e9:
        return hash_files(manifest.items, config.run.threads, config.run.stall), []
    line = f"{total / 1e9:,.0f} GB of files are listed by size, without SHA-256 (data.hash_gb {config.data.hash_gb:g})"
    return {name: FileHash("", size) for name, size in sizes.items()}, [line]


def _overview(job: Job) -> list[str]:
    splits = ", ".join(f"{len(job.manifest.split(name))} {name}" for name in ("train", "val", "test"))
    lines = [f"images: {splits}; tasks: {', '.join(f'{task.name} ({task.kind})' for task in job.tasks)}"]
    lines.append(job.plan.describe())
    if job.manifest.left_out:
        lines.append(f"left out {len(job.manifest.left_out)} files or rows; they are listed in left_out.csv")
    best = f"best model by {job.state.metric} on the validation split" if job.state.metric else "the last epoch is kept"
    lines.append(f"{best}; computing on {job.device} in {arithmetic_of(job.model)}")
    return lines


def _compile(job: Job) -> str:
    """Compiles the encoder where that pays back in what is left of the run; says what was chosen and why."""
    left = max(1, job.config.train.epochs - job.state.epoch)
    items = (item for split in ("train", "val") for item in job.manifest.split(split))
    expected = left * sum(job.images.counts[item.name] for item in items)
    choice = choose_compile(job.config.run.compile, job.model, job.images.patch_shape, job.plan.chunk, expected)
    if choice.compile:
        job.model.accelerate(compile=True)
    return f"encoder {'compiled' if choice.compile else 'not compiled'}: {choice.why}"


def _create_folder(
    config: Config,
    manifest: Manifest,
    hashes: Mapping[str, FileHash],
    model: IPSClassifier,
    optimizer: torch.optim.AdamW,
    state: State,
    device: torch.device,
) -> Run:
    """Writes the folder under another name first: a run folder that exists can always be resumed."""
    assert config.out is not None
    out = config.out
    writable_folder(out.parent)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        # without `out`: as a --config it makes another run, not this one again
        write_atomic(folder / "config.yaml", dump_config(dataclasses.replace(config, out=None)))
        manifest.write(folder / "manifest.csv", hashes)
        manifest.write_left_out(folder / "left_out.csv")
        write_atomic(folder / "environment.json", json.dumps(environment(str(device)), indent=2) + "\n")
        save_state(folder / "last.safetensors", model, optimizer, state.to_json())
        folder.chmod(0o777 & ~umask())
        try:
            folder.rename(out)
        except OSError as error:
            raise OutputError(f"{out}: cannot be created ({error.strerror}). Choose another --out.") from error
    except OutputError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OutputError(str(error).replace(str(folder), str(out))) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Run(out)


def _check_unchanged(run: Run) -> None:
    """The files must be those the run began with, or it would not end where it would have."""
    for row in read_rows(run.path / "manifest.csv"):
        image, size = Path(row.get("features") or row["image"]), row["bytes"]
        if size and image.exists() and file_size(image) != int(size):
            raise RunError(
                f"{image}: has {file_size(image)} bytes, {size} when the run began. "
                "Put the old file back, or train anew."
            )


def open_job(run: Run, say: Callable[[str], None]) -> Job:
    """Loads a run as it was when its last state was saved.

    Raises:
        RunError: the state or the manifest does not fit, or an image changed since.
    """
    config = dataclasses.replace(run.config, out=run.path)
    device = choose_device(config.run.device)
    last = run.path / "last.safetensors"
    state = State.from_json(read_info(last), last)
    written = dataclasses.replace(config.data, path=run.path / "manifest.csv", root=None)
    manifest = read_for_tasks(written, [Task.from_json(task) for task in state.tasks], ("train", "val"))
    _check_unchanged(run)
    reader = open_reader(config.run, device)
    try:
        model = new_model(config, manifest.tasks, device, fresh=False)
        optimizer = new_optimizer(config, model)
        load_state(last, model, optimizer)
        images, manifest, lines = scan(config, manifest, reader, device)
        add_left_out(run, {left.name: left.reason for left in manifest.left_out})
        job = _job(run, config, manifest, images, reader, model, optimizer, state, device)
        line = f"resumed at {time.strftime('%Y-%m-%d %H:%M:%S')} from epoch {state.epoch}, step {state.step}"
        for text in (f"{line} (keyhole {keyhole.__version__})", *lines, _compile(job)):
            say(text)
            job.log(text)
    except BaseException:
        reader.close()
        raise
    return job
