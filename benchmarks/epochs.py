"""Single epochs of learning through the code of `keyhole train`, for timing: no validation, nothing evaluated."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keyhole.config.file import resolve
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import start_job
from keyhole.training.loop import Loop


class Epochs:
    """A job of `keyhole train`; a call of `learn` is one epoch over its training images.

    Args:
        settings: sections of the configuration, as `keyhole.train` takes them.
        recipe: the recipe they change.

    Attributes:
        parts: seconds by part of each epoch so far, and under `all` of the whole.
    """

    def __init__(self, settings: Mapping[str, Any], recipe: str | None = None) -> None:
        config = resolve(recipe).replace(**settings)
        self.notes: list[str] = []
        self.job = start_job(config, self.notes.append)
        self.loop = Loop(self.job, Interrupt())
        self.parts: list[dict[str, float]] = []

    def learn(self) -> None:
        """Selects from and learns from every image once."""
        self.job.state.batch = 0
        with self.job.engine.limit():
            start = time.perf_counter()
            self.loop.learn()
            parts: dict[str, float] = {**self.job.engine.timer.seconds()}
            self.parts.append(parts | {"all": time.perf_counter() - start})
        self.job.state.epoch += 1

    def share(self, part: str, last: int) -> float:
        """Of the time of the last epochs, in 0 ... 1 (on a GPU parts overlap)."""
        return sum(one[part] for one in self.parts[-last:]) / sum(one["all"] for one in self.parts[-last:])

    def close(self) -> None:
        self.job.close()


def write_csv(folder: Path, files: list[Path]) -> Path:
    """A table of images of two classes in turn, all to learn from."""
    rows = [f"{path},{'ab'[number % 2]},train" for number, path in enumerate(files)]
    path = folder / "images.csv"
    path.write_text("\n".join(["image,label,split", *rows, ""]))
    return path


def run_passive() -> None:
    """Starts the script anew where threads of arithmetic would spin while they wait; see keyhole/cli/main.py."""
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
