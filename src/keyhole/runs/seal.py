"""Checks that the files of a run are those that it wrote, by comparing them with its state.

Without them, a run that goes on with other settings, images or another best model would end elsewhere without an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keyhole.config.file import dump_config, leaves, load_config, parse_config
from keyhole.config.settings import Config, RunConfig
from keyhole.data.hashes import OTHER_CONTENT, FileHash, changed_files, stored_hashes
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest
from keyhole.errors import ConfigError, RunError
from keyhole.runs.checkpoint import model_file, read_info, read_tensors
from keyhole.runs.damage import LISTED_AGAIN
from keyhole.runs.run import Run, read_rows, rows_text
from keyhole.runs.state import State
from keyhole.util.budget import memory_text
from keyhole.util.files import write_atomic
from keyhole.util.progress import say
from keyhole.util.wording import listed as listed_names

RESTORE_OR_RETRAIN = "Restore it from a copy, or train again into another folder."
"""What to do about a file that a run cannot write again."""
RESTORE_OR_DELETE = "Restore it from a copy, or delete it: it then lists what fails from now on."


def file_digest(path: Path) -> str:
    """SHA-256 of a small file.

    Raises:
        RunError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}). {RESTORE_OR_RETRAIN}") from error


def read_state(run: Run) -> State:
    """Return the state that was saved last, without its tensors."""
    last = run.path / "last.safetensors"
    return State.from_json(read_info(last, RESTORE_OR_RETRAIN), last)


def check_files(run: Run, state: State) -> list[str]:
    """Compare the files of a run with its state, and write missing files again where the state has their content.

    Returns:
        what was written again, one line each.

    Raises:
        RunError: a file was changed or damaged since the run wrote it; says what to restore or to delete.
    """
    check_manifest(run.path / "manifest.csv", state.manifest)
    said = [_check_config(run.path / "config.yaml", state), _check_metrics(run.path / "metrics.csv", state)]
    if state.best_epoch:
        said.append(_check_best(run.path / "best", state))
    return [line for line in said if line]


def sealed_config(state: State) -> Config:
    """Return the settings of a run, as its state has them."""
    return parse_config(state.config, "the run's state")


def more_epochs(state: State, epochs: int) -> str:
    """Changes the number of epochs of a run in its state, which must then be saved; what it means, in a line.

    The same number again changes nothing, so that a command may be repeated. A run that early stopping ended goes on.

    Raises:
        ConfigError: fewer epochs than it has done.
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
    run: Path, manifest: Path, items: Sequence[Item], config: RunConfig, remedy: str, others: Sequence[str] = ()
) -> list[str]:
    """Compare the files of images with manifest.csv; each is read to its end.

    Where a run could not read all of its images (unreadable.csv, left_out.csv), they may have been copied again.

    Args:
        run: its folder.
        manifest: its manifest.csv.
        items: images to compare.
        config: for the threads that read.
        remedy: what the message of an error tells the user to do.
        others: splits whose files are compared by size, without being opened.

    Returns:
        what was noticed and is no error, one line each.

    Raises:
        RunError: files changed; names them.
    """
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
    listed = unreadable | {row.get("name") for row in read_rows(run / "left_out.csv", RESTORE_OR_DELETE)}
    repaired = {name for name, what in changed.items() if name in listed or (unreadable and what == OTHER_CONTENT)}
    wrong = {name: what for name, what in changed.items() if name not in repaired}
    if wrong:
        files = {item.name: item.source for item in (*items, *unopened)}
        first = "; ".join(f"{files[name]}: {what}" for name, what in list(wrong.items())[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        count = f"{len(wrong)} images" if len(wrong) > 1 else "1 image"
        raise RunError(f"{run}: {count} changed since the run began: {first}{more}. {remedy}")
    if repaired:
        what = "changed since the run began, which had met unreadable images; they count as repaired"
        said.append(f"{listed_names(sorted(repaired))} {what}")
    return said


def check_evaluated(run: Path, manifest: Manifest, config: RunConfig) -> list[str]:
    """Compare the images that a run is evaluated on with its manifest.csv; returns and raises as `check_images`."""
    remedy = "Put the old files back, or evaluate the new ones as other data: --data."
    return check_images(run, run / "manifest.csv", manifest.items, config, remedy)


def check_own_manifest(run: Path) -> None:
    """Raise RunError if the best model or the manifest.csv in a run folder is not the run's."""
    _check_owner(run)
    digest = _best_info(run).get("manifest")
    if digest is not None:
        check_manifest(run / "manifest.csv", digest)


def _best_info(run: Path) -> dict[str, Any]:
    return read_info(model_file(run), RESTORE_OR_RETRAIN)


def _check_owner(run: Path) -> None:
    """Raise RunError if the best model is another run's; without a state that cannot be known."""
    if (run / "last.safetensors").is_file():
        state, info = read_state(Run(run)), _best_info(run)
        if info.get("run") != state.run:
            raise RunError(f"{run / 'best' / 'model.safetensors'}: the best model of another run. {RESTORE_OR_RETRAIN}")


def _item(row: Mapping[str, str]) -> Item:
    features = row.get("features")
    return Item(row["name"], Path(row["image"]), {}, features=Path(features) if features else None)


def check_manifest(path: Path, digest: str) -> None:
    """Raise RunError if manifest.csv is not the one that was written at the start."""
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
    """A kill may have come between the row of an epoch and the state after it, so one row more is right."""
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
    """The cells that are not empty."""
    return {name: value for name, value in row.items() if value not in ("", "None")}


def _check_best(folder: Path, state: State) -> str:
    """A kill may have come between a new best model and the state after it, so that of the next epoch is right."""
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
