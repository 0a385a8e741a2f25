"""`result.json`: what one training run gave, as `benchmarks/results.py` puts it into the table of all results.

Every benchmark that trains writes it into the folder of a run, once the run is finished.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from machine import card, describe, hardware

import keyhole
from keyhole.util.files import write_atomic

NAME = "result.json"
KINDS = ("real", "composite", "generated")


class Figure(NamedTuple):
    """A value and its 95 % interval, which is None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        data: Name of the data set and task, the same for all runs that can be compared: `potholes`.
        kind: One of `KINDS`.
        recipe: The recipe or the arm of a comparison, in words that tell it from the others: `IPS, M = 16, lite0`.
        seed: Of the run.
        metrics: By name, such as `label.auroc`; on images that the run was not trained on.
        epochs: That were learned.
        epoch_seconds: Median time of an epoch, its validation included.
        peak_gb: Peak memory of the process in GB.
        hardware: In short, as in `2cpu` or `h200`.
        machine: In full, with versions of packages.
        commit: Of this repository; with `+` if the code differs from it.
        date: When the run ended.
    """

    data: str
    kind: str
    recipe: str
    seed: int
    metrics: dict[str, Figure]
    epochs: int
    epoch_seconds: float
    peak_gb: float
    hardware: str = field(default_factory=hardware)
    machine: str = field(default_factory=describe)
    keyhole: str = keyhole.__version__
    torch: str = field(default_factory=lambda: _torch())
    commit: str = field(default_factory=lambda: _commit())
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: must be one of {', '.join(KINDS)}, not {self.kind!r}")

    def write(self, folder: Path) -> Path:
        """Write `result.json` into a folder, in place of an earlier one."""
        return write_atomic(folder / NAME, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Result:
        return cls(**{**found, "metrics": {name: Figure(*each) for name, each in found["metrics"].items()}})


def read(folder: Path) -> Result:
    """Return what `Result.write` wrote into a folder."""
    return Result.from_json(json.loads((folder / NAME).read_text()))


def of_run(
    run: Path,
    *,
    data: str,
    kind: str,
    recipe: str,
    metrics: Sequence[str],
    split: str = "test",
    also: Mapping[str, Figure] | None = None,
) -> Result:
    """Return the result of a run folder that `keyhole train` and `keyhole evaluate` wrote.

    If the folder has a `result.json`, commit, date and machine stay as they are there: that is when the run was made.

    Args:
        run: The run folder, with the evaluation of `split`.
        data, kind, recipe: As in `Result`.
        metrics: Of each task, such as `auroc`.
        split: The split that was evaluated.
        also: Further figures by name.
    """
    tasks = json.loads((run / "evaluation" / split / "metrics.json").read_text())["tasks"]
    found = {f"{task}.{name}": figure(tasks[task]["overall"][name]) for task in tasks for name in metrics}
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    about = json.loads((run / "environment.json").read_text())
    _, _, gpu = about["device"].partition(": ")
    result = Result(
        data=data,
        kind=kind,
        recipe=recipe,
        seed=keyhole.Run(run).config.train.seed,
        metrics={**found, **(also or {})},
        epochs=len(rows),
        epoch_seconds=round(statistics.median(float(row["seconds"]) for row in rows), 2),
        peak_gb=max(float(row["peak_gb"]) for row in rows),
        hardware=card(gpu) if gpu else hardware(),
        machine=describe("cuda" if gpu else "cpu"),
        torch=about["versions"]["torch"],
    )
    made = asdict(read(run)) if (run / NAME).exists() else {}
    return replace(result, **{name: made[name] for name in ("commit", "date", "machine", "hardware") if name in made})


def figure(estimate: Mapping[str, Any]) -> Figure:
    """Return the figure of an estimate in the metrics.json of an evaluation; an undefined value is NaN."""
    value = estimate["value"]
    return Figure(float("nan") if value is None else value, estimate["low"], estimate["high"])


def _torch() -> str:
    import torch

    return torch.__version__


def _commit() -> str:
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
