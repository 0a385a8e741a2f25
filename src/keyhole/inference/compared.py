"""One of the runs that are compared: its predictions, read from tables, and its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyhole.config.file import leaves, load_config
from keyhole.data.hashes import stored_hashes
from keyhole.errors import KeyholeError, RunError
from keyhole.report.read_table import PredictionTable, read_table
from keyhole.runs.checkpoint import model_file, read_info
from keyhole.tasks.kinds import Task


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """A run, or an evaluation of it.

    Attributes:
        name: Name of the run folder, and of the evaluation where that was given.
        table: Its predictions.
        settings: Every setting, the versions and the machine, as texts, as far as they can be read.
        hashes: SHA-256 of its images by name, as far as its manifest has them; empty for other data than the run's own.
        notes: What readers should know of it.
    """

    name: str
    table: PredictionTable
    settings: Mapping[str, str]
    hashes: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_compared(path: Path, split: str) -> ComparedRun:
    """Return the predictions of a run folder for a split, or those in the folder of an evaluation.

    Raises:
        RunError: The folder is neither, or has no predictions, or they are damaged.
    """
    if (path / "metrics.json").is_file():
        return _of_evaluation(path)
    if not (path / "manifest.csv").is_file():
        what = "holds neither a run nor an evaluation" if path.is_dir() else "there is no such folder"
        raise RunError(f"{path}: {what}. Give run folders, or folders of evaluations.")
    remedy = f"Make its predictions again: keyhole evaluate {path} --split {split}"
    if (path / "evaluation" / split / "metrics.json").is_file():
        found = _of_evaluation(path / "evaluation" / split)
        return ComparedRun(path.absolute().name, found.table, found.settings, found.hashes, found.notes)
    file = path / "predictions" / f"{split}.csv"
    if not file.is_file():
        raise RunError(
            f"{path}: has no predictions for its {split} split. Make them: keyhole evaluate {path}{_of(split)}"
        )
    tasks = [Task.from_json(each) for each in read_info(model_file(path))["tasks"]]
    settings, notes = _settings(path)
    return ComparedRun(path.absolute().name, read_table(file, tasks, remedy), settings, _hashes(path), tuple(notes))


def _of(split: str) -> str:
    return "" if split == "test" else f" --split {split}"


def _of_evaluation(folder: Path) -> ComparedRun:
    remedy = "Evaluate again."
    path = folder / "metrics.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        tasks = [Task(name, each["kind"], tuple(each["classes"])) for name, each in found["tasks"].items()]
        run, epoch, own_data = Path(found["run"]), found["epoch"], found["data"] == found["run"]
        grouped = any(each["interval"]["over"] == "groups" for each in found["tasks"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: damaged, or of an earlier version ({error!r}). {remedy}") from error
    table = read_table(folder / "predictions.csv", tasks, remedy)
    if grouped and table.groups is None:
        raise RunError(f"{folder / 'predictions.csv'}: has no column 'group', but the images have groups. {remedy}")
    own = folder.absolute().parent.parent  # the run, where the evaluation lies in it and was moved with it
    run = own if (own / "manifest.csv").is_file() else run
    settings, notes = _settings(run)
    if (best := _best_epoch(run)) is not None and epoch not in (None, best):
        notes.append(f"{folder}: is of the model of epoch {epoch}; the best is that of epoch {best} now. {remedy}")
    notes += [f"{folder}: {note}" for note in found.get("notes", ())]
    hashes = _hashes(run) if own_data else {}
    return ComparedRun(f"{run.name}/{folder.absolute().name}", table, settings, hashes, tuple(notes))


def _best_epoch(run: Path) -> int | None:
    try:
        epoch: int | None = read_info(model_file(run)).get("epoch")
        return epoch
    except KeyholeError:
        return None


def _hashes(run: Path) -> dict[str, str]:
    manifest = run / "manifest.csv"
    stored = stored_hashes(manifest) if manifest.is_file() else {}
    return {name: each.sha256 for name, each in stored.items() if each.sha256}


def _settings(run: Path) -> tuple[dict[str, str], list[str]]:
    """Return settings, versions and machine of a run, and notes on what cannot be read."""
    found: dict[str, Any] = {}
    notes = []
    try:
        found |= dict(leaves(load_config(run / "config.yaml")))
    except KeyholeError as error:
        notes.append(f"settings are not compared: {error}")
    try:
        about = json.loads((run / "environment.json").read_text("utf-8"))
        found |= {f"version of {name}": value for name, value in about["versions"].items()}
        found |= {name: about[name] for name in ("device", "platform", "cores", "threads")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"versions are not compared: {run / 'environment.json'}: {error!r}")
    return {name: str(value) for name, value in found.items()}, notes
