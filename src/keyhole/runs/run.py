"""The run folder and its files.

RUN/config.yaml              resolved configuration, itself a valid --config
    manifest.csv             images, splits and labels used, with size and SHA-256 of every file
    left_out.csv             images left out, with the reason
    environment.json         versions, machine, command
    metrics.csv              one row per epoch
    best/                    model.safetensors, model.json and thresholds.json, loadable alone
    last.safetensors         state to resume from
    samples.png              what the model keeps of a few validation images, epoch by epoch
    samples.json             what samples.png shows of earlier epochs
    tensorboard/             event files, with --run.log tensorboard
    predictions/SPLIT.csv    one row per image, by the best model
    learning.json            whether the best model is better than guessing
    log.txt
    lock                     there while a process writes the run
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from keyhole.config.settings import Config
from keyhole.errors import KeyholeError, OutputError, RunError
from keyhole.report.figures import Drawn, learning_curves
from keyhole.report.shown import Shown, image_element
from keyhole.runs.checkpoint import read_info
from keyhole.tasks.kinds import Task
from keyhole.util.files import check_creatable
from keyhole.util.tables import read_rows

PACKAGES = (
    *("keyhole", "torch", "timm", "numpy", "pillow", "tifffile", "imagecodecs", "zarr", "h5py"),
    *("openslide-python", "openslide-bin", "safetensors", "scikit-learn", "pydantic", "tyro"),
)
"""Packages that may change the results of a run."""


@dataclass(frozen=True, init=False)
class Run:
    """A run folder. It can be given wherever the path of a run is expected.

    Attributes:
        path: the folder.

    Raises:
        RunError: The folder does not exist when one of its files is read.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", Path(path))

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def _folder(self) -> Path:
        """The folder, which exists."""
        if not self.path.is_dir():
            raise RunError(f"{self.path}: there is no such run folder. Check the path; `keyhole.train` makes a run.")
        return self.path

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        from keyhole.config.file import load_config

        return load_config(self._folder / "config.yaml")

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One mapping per finished epoch; a value that is not defined on the data is NaN."""
        path, remedy = self._folder / "metrics.csv", "Delete it and resume the run: it is written again."
        try:
            rows = read_rows(path, remedy, ("epoch",))
            return [{name: float(value or "nan") for name, value in row.items()} for row in rows]
        except ValueError as error:
            raise RunError(f"{path}: damaged ({error}). {remedy}") from error

    @property
    def best(self) -> dict[str, Any]:
        """Description of the best model: epoch, metric, tasks, settings."""
        return read_info(self._folder / "best" / "model.safetensors")

    @property
    def learning(self) -> dict[str, Any]:
        """The content of learning.json: is the best model better than guessing? Empty before the run is finished."""
        path = self._folder / "learning.json"
        if not path.is_file():
            return {}
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found | {"lines": [str(line) for line in found["lines"]]}
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged ({error!r}). Delete it; keyhole evaluate says the same.") from error

    @property
    def samples(self) -> Path:
        """The picture of what the model keeps of a few validation images, epoch by epoch; absent without validation."""
        return self.path / "samples.png"

    def curves(self) -> list[Drawn]:
        """Draw the loss and the metrics of each epoch.

        Returns:
            Figures as SVG, each with a title and a caption.

        Raises:
            RunError: There is no model yet, or metrics.csv is damaged.
        """
        best, rows = self.best, self.metrics
        metrics = {task.name: task.default_metric for task in map(Task.from_json, best["tasks"])}
        return learning_curves(rows, metrics, int(best.get("epoch") or len(rows)), self.config.train.watch)

    def show(self) -> Shown:
        """Show the run in Jupyter: its summary, learning curves, samples, and the contact sheets of its evaluations.

        Returns:
            What Jupyter renders as pictures, and what prints elsewhere as the summary.

        Raises:
            RunError: There is no model yet, or a file of the run is damaged.

        Example:
            >>> keyhole.Run("runs/one").show()
            best model: epoch ...
        """
        curves = "".join(f'<div style="width: 26em; max-width: 100%">{each.svg}</div>' for each in self.curves())
        figures = [f'<div style="display: flex; flex-wrap: wrap; background: white">{curves}</div>']
        if self.samples.is_file():
            figures.append(image_element(self.samples, "what the model keeps of a few validation images, by epoch"))
        for sheet in sorted(self.path.glob("evaluation/*/contact_sheet.png")):
            figures.append(image_element(sheet, f"predictions of {sheet.parent.name} and the patches they rest on"))
        return Shown("\n".join(self.summary()), figures)

    def summary(self) -> list[str]:
        """Describe the run for people.

        Returns:
            A few lines of text.
        """
        best = self.best
        lines = [f"best model: epoch {best['epoch']} of {self.config.train.epochs}"]
        if best.get("metric") and best.get("value") is not None:
            lines[0] += f", {best['metric']} {best['value']:.4f} on the validation split"
        lines.append(f"run folder: {self.path}")
        if self.samples.is_file():
            lines.append(f"samples: {self.samples}")
        learning = self.learning
        if learning.get("epoch") == best["epoch"]:
            lines += learning["lines"]
        return lines


def unfinished(path: str | Path) -> str | None:
    """Return a line that says so if `path` is a run folder with a model whose training has not ended."""
    run = Run(path)
    if not (run.path / "last.safetensors").is_file():
        return None
    try:
        done, best, train = len(run.metrics), run.best.get("epoch"), run.config.train
    except (KeyholeError, OSError):
        return None  # reading the model says what is wrong
    if done >= train.epochs or (train.patience and run.learning):
        return None
    return (
        f"{path}: training has not ended, after {done} of {train.epochs} epochs; this is the best model so far, of "
        f"epoch {best}. To go on: keyhole resume {path}"
    )


def learned_nothing(path: str | Path) -> str | None:
    """Return a line that says so if `path` is a run folder whose model is no better than guessing."""
    run = Run(path)
    if not run.path.is_dir():
        return None  # reading the model says so
    try:
        found = run.learning
        if found.get("learned") is not False or found.get("epoch") != run.best.get("epoch"):
            return None  # or the run was resumed, and has a later model
    except RunError as error:  # the note beside the model is damaged, which can be used without it
        return str(error)
    return next(iter(found["lines"]), None)


def find_run(path: str | os.PathLike[str]) -> Run:
    """Return the run folder at `path`."""
    path = Path(path)
    if not path.is_dir():
        raise RunError(f"{path}: there is no such run folder")
    missing = [name for name in ("manifest.csv", "last.safetensors") if not (path / name).is_file()]
    if missing:
        raise RunError(f"{path}: not a run folder, {' and '.join(missing)} not found in it")
    return Run(path.absolute())


def check_new(out: Path) -> None:
    """Check that the run folder does not exist and can be created."""
    if out.exists() or out.is_symlink():
        hint = f"; keyhole resume {out} goes on with it" if (out / "last.safetensors").is_file() else ""
        raise RunError(f"{out}: the run folder exists. Choose another --out{hint}.")
    check_creatable(out)


def environment(device: str) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__  # also names the build
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": versions,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device if not device.startswith("cuda") else f"{device}: {torch.cuda.get_device_name(device)}",
    }


class Log:
    """Appends lines with the time to log.txt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str) -> None:
        try:
            with self.path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror}). Free space, then resume.") from error
