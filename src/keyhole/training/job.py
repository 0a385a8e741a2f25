"""A run at work: what is created with its folder or loaded from it, and the state that is saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from keyhole.config.auto import number, settle_learning
from keyhole.config.settings import Config
from keyhole.data.hashes import FileHash, hash_files
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest, read_for_tasks, read_manifest, write_left_out
from keyhole.engine import Engine
from keyhole.engine.device import choose_device
from keyhole.engine.memory.plan import Plan, fixed_chunk, make_plan
from keyhole.engine.memory.probe import Workload
from keyhole.engine.opening import open_reader, settle_edge
from keyhole.errors import ConfigError
from keyhole.loading import Batch
from keyhole.nn.build import check_imagenet
from keyhole.runs.checkpoint import load_state, save_state
from keyhole.runs.folder import create_folder, sweep, sweep_beside
from keyhole.runs.journal import Damage
from keyhole.runs.lock import RunLock
from keyhole.runs.run import Log, Run, check_new
from keyhole.runs.seal import (
    RESTORE_OR_DELETE,
    RESTORE_OR_RETRAIN,
    State,
    check_files,
    check_images,
    more_epochs,
    read_state,
    sealed_config,
)
from keyhole.runs.start import doubt_of_start
from keyhole.tasks.kinds import Task
from keyhole.training.average import Average
from keyhole.training.loggers import check_loggers
from keyhole.training.score import choose_metric
from keyhole.training.setup import Images, absolute, new_engine, new_model, new_optimizer, scan, targets, with_features
from keyhole.util.budget import memory_text
from keyhole.util.files import file_size, write_atomic
from keyhole.util.progress import say
from keyhole.util.tables import read_rows
from keyhole.util.version import VERSION
from keyhole.util.wording import counted


class Job:
    """What the loop works with: the run folder, its images, the engine, the optimizer and the state."""

    def __init__(
        self,
        lock: RunLock,
        config: Config,
        manifest: Manifest,
        images: Images,
        engine: Engine,
        optimizer: torch.optim.AdamW,
        state: State,
    ) -> None:
        self.lock, self.config, self.manifest, self.images = lock, config, manifest, images
        self.engine, self.optimizer, self.state = engine, optimizer, state
        self.model, self.device, self.tasks = engine.model, engine.device, manifest.tasks
        self.average = Average(engine, number(config.train.average, "train.average"))
        self.run = Run(lock.folder)
        self.log = Log(self.run.path / "log.txt")
        patches = sum(images.counts.values())
        self.damage = Damage(self.run.path / "unreadable.csv", patches, config.unreadable, state.epoch)
        self.learning = True
        engine.plan, engine.stager.tell = Plan.from_json(state.plan), self.log
        engine.pace.warn = lambda text: self.tell([f"warning: {text}"])

    def tell(self, lines: Iterable[str], say: Callable[[str], None] = say) -> None:
        """Say and log lines."""
        for line in lines:
            say(line)
            self.log(line)

    def save(self) -> None:
        """Write the state, from which `keyhole resume` continues.

        Raises:
            OutputError: it cannot be written; the state before is whole.
            RunError: another process has taken over the run.
        """
        assert self.learning, "the model has other weights by now"
        self.lock.check()
        path, mean = self.run.path / "last.safetensors", self.average.mean
        save_state(path, self.model, self.optimizer, self.state.to_json(), mean)

    def end_learning(self) -> None:
        """Free what only learning needs. The state has been saved, and is not saved again."""
        self.learning = False
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()

    def usable(self, item: Item) -> bool:
        """Return True unless an image failed in an earlier epoch."""
        failed = self.state.left_out.get(item.name)
        return failed is None or failed[0] >= self.state.epoch

    def leave_out(self, name: str, reason: str) -> None:
        """List an image that cannot be read; the next epochs do not use it."""
        if name not in self.state.left_out:
            self.state.left_out[name] = (self.state.epoch, reason)
            self.log(f"left out: {reason}")
            add_left_out(self.run, {name: reason})

    def note_unreadable(self, items: Sequence[Item], batch: Batch) -> None:
        """List the images and patches of a batch that cannot be read.

        Raises:
            TooMuchUnreadable: they are more than `--unreadable` of the patches of this epoch.
        """
        self.damage.begin(self.state.epoch)
        for row, item in enumerate(items):
            source, error, reasons = batch.sources[row], batch.failed.get(row), batch.unreadable.get(row)
            if error is not None and self.config.data.on_bad_image == "skip":
                self.leave_out(item.name, str(error))
            elif error is not None:
                self.log(f"unreadable: {error}")
                self.damage.lose(item.name, self.images.counts[item.name], str(error))
                self.damage.warn(str(error))
            elif source is not None and reasons:
                reason = next(iter(reasons.values()))
                self.log(f"unreadable: {item.name}: {len(reasons)} patches ({reason})")
                self.damage.add(item.name, source, reasons)
                self.damage.warn(f"{item.name}: patches cannot be read: {reason}")
        self.damage.check()

    def close(self) -> None:
        self.engine.close()
        self.lock.release()


def add_left_out(run: Run, reasons: Mapping[str, str]) -> None:
    """Add images to the run's left_out.csv, unless they are in it."""
    path = run.path / "left_out.csv"
    known = {row["name"]: row["reason"] for row in read_rows(path, RESTORE_OR_DELETE, ("name", "reason"))}
    write_left_out(path, ({**reasons, **known}).items())


def start_job(config: Config, say: Callable[[str], None]) -> Job:
    """Check everything, then create the run folder, which can be resumed from its first moment.

    Raises:
        KeyholeError: the run folder exists, or the data, a setting or the output is invalid.
    """
    if config.out is None:
        raise ConfigError("--out: no run folder given")
    config = absolute(config)
    assert config.out is not None
    check_new(config.out)
    sweep_beside(config.out, say)
    check_loggers(config.run.log)
    device = choose_device(config.run.device)
    manifest = read_manifest(config.data, config.train.seed)
    config, notes = with_features(config, manifest)
    config, settled = settle_learning(config, features=config.model.feature_width is not None)
    check_imagenet(config.model)  # before every image is opened
    with ExitStack() as undo:
        reader = undo.enter_context(open_reader(config.run, device))
        config, border = settle_edge(config, manifest.items, reader)
        images, manifest, lines = scan(config, manifest, reader, device)
        engine = new_engine(config, new_model(config, manifest.tasks, device), reader)
        optimizer = new_optimizer(config, engine.model)
        engine.plan = _plan(config, images, engine, optimizer)
        val = manifest.split("val") if config.train.watch == "val" else []
        if config.train.watch == "test" and not manifest.split("test"):
            raise ConfigError(f"train.watch test: {config.data.path} has no test images. Give some, or leave it out.")
        metric, undefined = choose_metric(config.train.metric, manifest.tasks, targets(manifest, val) if val else None)
        state = State(
            steps_per_epoch=-(-len(manifest.split("train")) // config.train.batch),
            metric=metric,
            tasks=[task.to_json() for task in manifest.tasks],
            plan=engine.plan.to_json(),
        )
        hashes, hashed = _hashes(config, manifest)
        lock = create_folder(config, manifest, hashes, engine.model, optimizer, state, device)
        undo.callback(lock.release)
        job = Job(lock, config, manifest, images, engine, optimizer, state)
        told = *manifest.notes, *notes, *settled, *border, *doubt_of_start(config), *lines, *hashed, *undefined
        job.tell((*told, *_overview(job), *_compile(job)), say)
        undo.pop_all()
    return job


def _plan(config: Config, images: Images, engine: Engine, optimizer: torch.optim.Optimizer) -> Plan:
    work = Workload(
        patch_shape=images.patch_shape,
        m=config.select.m,
        batch_size=config.train.batch,
        largest_bag=images.largest,
        learn=True,
        chunk=fixed_chunk(config.select),
        ahead=config.run.ahead,
        color=config.augment.color > 0,
        predicts=True,
        jpeg=images.jpeg,
        turned=config.augment.flip or config.augment.rotate,
        host_buffers=images.held_bytes,
        open_pictures=images.open_bytes,
    )
    return make_plan(engine.encoders, work, config.memory, optimizer)


def _hashes(config: Config, manifest: Manifest) -> tuple[dict[str, FileHash], list[str]]:
    """Return hashes for the manifest; above `data.hash_gb` only sizes, since reading all files takes hours."""
    sizes = {item.name: file_size(item.source) for item in manifest.items}
    total = sum(sizes.values())
    if total <= config.data.hash_gb * 1e9:
        return hash_files(manifest.items, config.run.threads, config.run.stall), []
    line = f"{memory_text(total)} of files are listed by size, without SHA-256 (data.hash_gb {config.data.hash_gb:g})"
    return {name: FileHash("", size) for name, size in sizes.items()}, [line]


def _overview(job: Job) -> list[str]:
    splits = ", ".join(f"{len(job.manifest.split(name))} {name}" for name in ("train", "val", "test"))
    lines = [f"images: {splits}; tasks: {', '.join(task.describe() for task in job.tasks)}"]
    lines.append(job.engine.plan.describe())
    if left := job.manifest.left_out:
        lines.append(f"left out {counted(len(left), 'file or row', 'files or rows')}; see left_out.csv")
    best = f"best model by {job.state.metric} on the validation split" if job.state.metric else "the last epoch is kept"
    lines.append(f"{best}; computing on {job.device} in {job.engine.encoders.arithmetic}")
    return lines


def _compile(job: Job) -> list[str]:
    """Compile the encoder if that saves time in the rest of the run; return what was chosen and why.

    Stored features have no encoder and get no line, unless the user asked for compiling.
    """
    left = max(1, job.config.train.epochs - job.state.epoch)
    items = (item for split in job.config.train.splits for item in job.manifest.split(split))
    expected = left * sum(job.images.counts[item.name] for item in items)
    shape = job.images.patch_shape
    choice = job.engine.choose_compile(job.config.run.compile, shape, expected)
    if not choice.compile and len(shape) == 1:
        return []
    return [f"encoder {job.engine.encoders.describe(choice, shape)}"]


def open_job(run: Run, root: Path | None = None, epochs: int | None = None) -> Job:
    """Load a run as it was when its last state was saved; see `resume`.

    Raises:
        ConfigError: it has done more epochs than `epochs`.
        RunError: another process is working on it, the state or a file of the run is damaged, or an image changed.
    """
    with ExitStack() as undo:
        lock = RunLock(run.path)
        undo.callback(lock.release)
        sweep(run.path, say)
        sweep_beside(run.path, say)
        state = read_state(run)
        checked = check_files(run, state)
        longer = "" if epochs is None else more_epochs(state, epochs)
        config = sealed_config(state).replace(out=run.path)
        device = choose_device(config.run.device, "A run keeps its device: resume it where there is one.")
        written = config.data.replace(path=run.path / "manifest.csv", root=root)
        if root is not None:  # the manifest names every file; these folders may have moved too
            written = written.replace(features=None, masks=None)
        manifest = read_for_tasks(
            written, [Task.from_json(task) for task in state.tasks], config.train.splits, run=True
        )
        remedy = "Put the old files back, or train again into another folder."
        checked += check_images(
            run.path, manifest.items, config.run, remedy, others=() if "test" in config.train.splits else ("test",)
        )
        reader = undo.enter_context(open_reader(config.run, device))
        engine = new_engine(config, new_model(config, manifest.tasks, device, fresh=False), reader)
        optimizer = new_optimizer(config, engine.model)
        last = run.path / "last.safetensors"
        mean = load_state(last, engine.model, optimizer, RESTORE_OR_RETRAIN)
        images, manifest, lines = scan(config, manifest, reader, device)
        failed = {name: reason for name, (_, reason) in state.left_out.items()}
        add_left_out(run, {left.name: left.reason for left in manifest.left_out} | failed)
        if (before := Plan.from_json(state.plan).device) not in ("", device.type):
            plan = _plan(config, images, engine, optimizer)
            state.plan = plan.to_json()
            checked.append(f"the run was on {before} and is now on {device.type}, with a new plan: {plan.describe()}")
        job = Job(lock, config, manifest, images, engine, optimizer, state)
        if mean:  # the first state has none: its mean is its weights
            job.average.load(mean, last)
        if longer:
            checked += [longer, *_go_on_longer(job)]
        line = f"resumed at {time.strftime('%Y-%m-%d %H:%M:%S')} from epoch {state.epoch}, step {state.step}"
        job.tell((f"{line} (keyhole {VERSION})", *checked, *lines, *_compile(job)))
        undo.pop_all()
    return job


def _go_on_longer(job: Job) -> list[str]:
    """Delete the predictions of the best model so far, then save the new number of epochs.

    A process that is killed at any point of this order leaves a run that resumes with the old or the new number.
    """
    said = []
    if answers := sorted((job.run.path / "predictions").glob("*.csv")):
        names = ", ".join(path.name for path in answers)
        said.append(f"removed predictions/{names}: the best model may become another")
    for path in answers:
        path.unlink()
    if (job.run.path / "evaluation").is_dir():
        said.append("evaluation holds the figures of the best model until now: evaluate again at the end")
    job.save()
    write_atomic(job.run.path / "config.yaml", job.state.config)
    return said
