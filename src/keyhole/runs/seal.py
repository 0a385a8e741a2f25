"""The state of a run, and checks that its files have not changed since the run wrote them.

Without the checks, a run that is resumed with other settings, images or another best model would give other results
without a warning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keyhole.config.file import dump_config, leaves, load_config, parse_config
from keyhole.config.settings import Config, RunConfig
from keyhole.data.hashes import OTHER_CONTENT, FileHash, changed_files, stored_hashes
from keyhole.data.item import Item
from keyhole.errors import ConfigError, RunError
from keyhole.runs.checkpoint import model_file, read_info, read_tensors
from keyhole.runs.journal import LISTED_AGAIN
from keyhole.runs.run import Run
from keyhole.util.budget import memory_text
from keyhole.util.files import write_atomic
from keyhole.util.progress import say
from keyhole.util.tables import read_rows, rows_text
from keyhole.util.wording import listed

RESTORE_OR_RETRAIN = "Restore it from a copy, or train again into another folder."
RESTORE_OR_DELETE = "Restore it from a copy, or delete it: it then lists what fails from now on."


@dataclass
class State:
    """The progress of a run and all else that resuming needs besides the tensors."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches done in the current epoch
    step: int = 0  # optimizer steps done
    steps_per_epoch: int = 1  # fixed at the start, so that leaving out an image does not change the schedule
    loss_sum: float = 0.0  # this, the next and `patches` count the current epoch
    loss_count: int = 0
    patches: int = 0
    metric: str = ""  # chooses the best model; empty without a validation split
    best: tuple[float, float] | None = None  # value and loss of the best epoch
    best_epoch: int = 0  # counted from 1
    waiting: int = 0  # epochs since the best one
    stopped: bool = False  # early stopping has ended the training
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)  # by image: epoch it failed in, and reason
    plan: dict[str, Any] = field(default_factory=dict)  # memory plan; another one may change the last bits
    tasks: list[dict[str, Any]] = field(default_factory=list)  # as resolved at the start
    history: list[dict[str, float | None]] = field(default_factory=list)  # the rows of metrics.csv
    kept: dict[str, list[int]] = field(default_factory=dict)  # by image: patches kept in the last epoch, see `health`
    told: list[str] = field(default_factory=list)  # kinds of `doubts` of which the user has been warned
    run: str = ""  # identifies the run; its best model carries the same
    config: str = ""  # text of config.yaml
    config_before: str = ""  # its text before the number of epochs was changed
    manifest: str = ""  # SHA-256 of manifest.csv

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def mean_loss(self) -> float | None:
        """The mean loss of the current epoch; None before its first step."""
        return self.loss_sum / self.loss_count if self.loss_count else None

    def add_loss(self, loss: float, images: int) -> None:
        self.loss_sum += loss * images
        self.loss_count += images

    def advance(self, patches: int) -> None:
        """Count a step and the patches that it read."""
        self.step, self.batch, self.patches = self.step + 1, self.batch + 1, self.patches + patches

    def end_epoch(self, row: Mapping[str, float | None]) -> None:
        """Count a finished epoch, and keep its row of metrics.csv."""
        plain = {name: value if isinstance(value, int | None) else float(value) for name, value in row.items()}
        self.history.append(plain)
        self.epoch, self.batch, self.loss_sum, self.loss_count, self.patches = self.epoch + 1, 0, 0.0, 0, 0

    @classmethod
    def from_json(cls, data: dict[str, Any], path: Path) -> State:
        """Return the state from the description of the file `path`."""
        try:
            best = data["best"]
            left_out = {name: (int(epoch), reason) for name, (epoch, reason) in data["left_out"].items()}
            return cls(**{**data, "best": None if best is None else (best[0], best[1]), "left_out": left_out})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path}: not the state of a run ({error!r}). Was another file copied over it?") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a small file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}). {RESTORE_OR_RETRAIN}") from error


def read_state(run: Run) -> State:
    """Return the saved state, without its tensors."""
    last = run.path / "last.safetensors"
    return State.from_json(read_info(last, RESTORE_OR_RETRAIN), last)


def check_files(run: Run, state: State) -> list[str]:
    """Compare the files of a run with its state, and write missing files again if the state has their content.

    Returns a line for each file written again. For a changed file, RunError says what to restore or to delete.
    """
    check_manifest(run.path / "manifest.csv", state.manifest)
    said = [_check_config(run.path / "config.yaml", state), _check_metrics(run.path / "metrics.csv", state)]
    if state.best_epoch:
        said.append(_check_best(run.path / "best", state))
    return [line for line in said if line]


def sealed_config(state: State) -> Config:
    """Return the settings of a run from its state."""
    return parse_config(state.config, "the run's state")


def more_epochs(state: State, epochs: int) -> str:
    """Change the number of epochs in a state, which the caller saves; return a line, empty for the same number.

    A run that stopped early continues.
    """
    config = sealed_config(state)
    if epochs == config.train.epochs:
        return ""
    begun = state.epoch + (state.batch > 0)
    if epochs < begun:
        raise ConfigError(f"--train.epochs {epochs}: the run has begun {begun} epochs already. Give {begun} or more.")
    state.config_before, state.config = state.config, dump_config(config.replace(train={"epochs": epochs}))
    state.stopped, state.waiting = False, 0 if state.stopped else state.waiting
    return (
        f"train.epochs is {epochs} now, {config.train.epochs} before: the rate follows the schedule of {epochs} epochs "
        f"from epoch {state.epoch + 1} on"
    )


def check_images(
    run: Path, items: Sequence[Item], config: RunConfig, remedy: str, others: Sequence[str] = ()
) -> list[str]:
    """Compare image files with manifest.csv of a run folder by SHA-256, those of the splits `others` by size.

    Images that the run could not read (unreadable.csv, left_out.csv) may have changed. Returns warnings. RunError names
    changed files and ends with `remedy`.
    """
    manifest = run / "manifest.csv"
    rows = read_rows(manifest, RESTORE_OR_RETRAIN, ("image", "name", "sha256", "bytes", "split"))
    recorded = stored_hashes(manifest)
    known = [recorded[item.name] for item in items if item.name in recorded]
    said = []
    if unhashed := sum(not each.sha256 for each in known):
        said.append(f"{unhashed} images are compared by size alone: manifest.csv has no SHA-256 of them (data.hash_gb)")
    if (size := sum(each.bytes for each in known if each.sha256)) > 10e9:
        say(f"comparing {memory_text(size)} of images with manifest.csv")
    changed = changed_files(items, recorded, config.threads, config.stall)
    unopened = [_item(row) for row in rows if row["split"] in others]
    sizes = {item.name: FileHash("", recorded[item.name].bytes) for item in unopened if item.name in recorded}
    changed |= changed_files(unopened, sizes)
    unreadable = {row.get("image") for row in read_rows(run / "unreadable.csv", LISTED_AGAIN)}
    listed_names = unreadable | {row.get("name") for row in read_rows(run / "left_out.csv", RESTORE_OR_DELETE)}
    repaired = {
        name for name, what in changed.items() if name in listed_names or (unreadable and what == OTHER_CONTENT)
    }
    wrong = {name: what for name, what in changed.items() if name not in repaired}
    if wrong:
        files = {item.name: item.source for item in (*items, *unopened)}
        first = "; ".join(f"{files[name]}: {what}" for name, what in list(wrong.items())[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        count = f"{len(wrong)} images" if len(wrong) > 1 else "1 image"
        raise RunError(f"{run}: {count} changed since the run began: {first}{more}. {remedy}")
    if repaired:
        what = "changed since the run began, which had met unreadable images; they count as repaired"
        said.append(f"{listed(sorted(repaired))} {what}")
    return said


def check_own_manifest(run: Path) -> None:
    """Raise RunError if the best model or manifest.csv in a run folder belongs to another run."""
    state = read_state(Run(run)) if (run / "last.safetensors").is_file() else None
    path = model_file(run)
    info = read_info(path, RESTORE_OR_RETRAIN)
    if state is not None and info.get("run") != state.run:
        raise RunError(f"{path}: the best model of another run. {RESTORE_OR_RETRAIN}")
    if (digest := info.get("manifest")) is not None:
        check_manifest(run / "manifest.csv", digest)


def _item(row: Mapping[str, str]) -> Item:
    features = row.get("features")
    return Item(row["name"], Path(row["image"]), {}, features=Path(features) if features else None)


def check_manifest(path: Path, digest: str) -> None:
    if file_digest(path) != digest:
        raise RunError(f"{path}: changed since the run began: it is cut, damaged or edited. {RESTORE_OR_RETRAIN}")


def _check_config(path: Path, state: State) -> str:
    before = path.is_file() and bool(state.config_before) and path.read_bytes() == state.config_before.encode()
    if before or not path.is_file():
        write_atomic(path, state.config)
        return f"{path.name} {'had the former number of epochs' if before else 'was not there'}; written again"
    if path.read_bytes() == state.config.encode():
        return ""
    try:
        found, wanted = load_config(path), sealed_config(state)
    except ConfigError as error:
        raise RunError(f"{error}. Delete the file: resume writes it again.") from error
    changed = [name for (name, a), (_, b) in zip(leaves(found), leaves(wanted), strict=True) if a != b]
    if not changed:
        return ""  # a comment
    raise RunError(
        f"{path}: {', '.join(changed)} changed since the run began, but a run keeps its settings. Delete the file: "
        "resume writes it again. Only the number of epochs can change: keyhole resume RUN --train.epochs N."
    )


def _check_metrics(path: Path, state: State) -> str:
    """Check metrics.csv; it may have one more row, if the process was killed before it saved the state of the epoch."""
    if not path.is_file():
        if not state.history:
            return ""
        write_atomic(path, rows_text(state.history))
        return f"{path.name} was not there; written again"
    remedy = "Delete it: resume writes it again."
    rows = [_filled(row) for row in read_rows(path, remedy, ("epoch",))]
    wanted = [_filled({name: str(value) for name, value in row.items()}) for row in state.history]
    more = [row["epoch"] for row in rows[len(wanted) :]]
    if rows[: len(wanted)] != wanted or more not in ([], [str(state.epoch + 1)]):
        raise RunError(f"{path}: changed since the run wrote it: it is cut, damaged or edited. {remedy}")
    return ""


def _filled(row: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if value not in ("", "None")}


def _check_best(folder: Path, state: State) -> str:
    """Check the best model; it may be of the next epoch, if the process was killed before it saved the state."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise RunError(f"{path}: missing. {RESTORE_OR_RETRAIN}")
    _, info = read_tensors(path, RESTORE_OR_RETRAIN)
    if info.get("run") != state.run:
        raise RunError(f"{path}: the best model of another run. {RESTORE_OR_RETRAIN}")
    if info.get("epoch") not in (state.best_epoch, state.epoch + 1):
        raise RunError(
            f"{path}: the model of epoch {info.get('epoch')}, expected that of {state.best_epoch}. {RESTORE_OR_RETRAIN}"
        )
    about = folder / "model.json"
    text = json.dumps(info, indent=2) + "\n"
    try:
        if about.is_file() and not isinstance(json.loads(about.read_bytes().decode()), dict):
            raise ValueError("not a description")
    except (ValueError, RecursionError) as error:
        raise RunError(f"{about}: damaged ({error}). Delete it: resume writes it again.") from error
    if about.is_file() and about.read_bytes() == text.encode():
        return ""
    write_atomic(about, text)
    return f"best/{about.name} was not that of the model; written again"
