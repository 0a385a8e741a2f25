"""Training on generated slides from random weights: AUROC on unseen slides, where the kept patches lie, and time.

    python benchmarks/slides.py [--seeds 0 1] [--train 110] [--val 24] [--test 80] [--side 3072] [--folder DIR]

Everything runs as a user would run it: `keyhole data slides`, `keyhole train --recipe slides`, `keyhole evaluate`.
The label rests on nests of three nuclei that cover under 0.1 % of the tissue; the result goes into a dated Markdown
file beside this one. The slides are generated: the figures say that the whole path works, nothing about real tissue.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import cores as count_cores
from machine import processor
from numpy.typing import NDArray

import keyhole

BEST = 4
"""Patches with the most attention that are compared with where the nests are."""


@dataclass(frozen=True)
class Spent:
    """Wall clock and processor time of a command, in seconds."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall / 60:.1f} min ({self.cpu / 60:.1f})"


@dataclass(frozen=True)
class Shares:
    """Shares of patches that overlap a nest, in positive unseen slides: of all, of the kept, of the most attended."""

    every: float
    kept: float
    best: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--train", type=int, default=110)
    parser.add_argument("--val", type=int, default=24)
    parser.add_argument("--test", type=int, default=80)
    parser.add_argument("--side", type=int, default=3072)
    parser.add_argument("--folder", type=Path, help="keep slides and runs here; default is a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        rows = [row(folder / f"seed-{seed}", seed, options) for seed in options.seeds]
        about = json.loads((folder / f"seed-{options.seeds[0]}" / "run" / "environment.json").read_text())
    print(report(rows, options, about["versions"]))


def row(folder: Path, seed: int, options: argparse.Namespace) -> tuple[str, ...]:
    """One seed from nothing to its line of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    slides, run = folder / "slides", folder / "run"
    counts = [f"--count={options.train + options.val + options.test}", f"--val={options.val}", f"--test={options.test}"]
    _, written = timed("data", "slides", slides, *counts, f"--side={options.side}", f"--seed={seed}")
    learn = ("train", slides / "manifest.csv", "--recipe", "slides", f"--train.seed={seed}", "--out", run)
    _, learned = timed(*learn)
    lines, evaluated = timed("evaluate", run)
    auroc = next(line.removeprefix("auroc ") for line in lines if line.startswith("auroc "))
    shares = shares_on_nests(run, slides)
    with (run / "metrics.csv").open(newline="") as file:
        peak = max(float(epoch["peak_gb"]) for epoch in csv.DictReader(file))
    cells = (seed, auroc, f"{shares.every:.1%}", f"{shares.kept:.1%}", f"{shares.best:.1%}")
    found = (*map(str, cells), str(written), str(learned), str(evaluated), f"{peak:.1f} GB")
    print(*found, sep="; ", flush=True)
    return found


def timed(*words: str | Path) -> tuple[list[str], Spent]:
    """Runs a verb of keyhole in a process of its own; its output, and what it took."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "keyhole", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"keyhole {' '.join(map(str, words))} ended with {done.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout.splitlines(), Spent(time.monotonic() - start, cpu)


def shares_on_nests(run: Path, slides: Path) -> Shares:
    """How many of the patches of the positive slides of the test split lie on a nest, with a pixel or more."""
    nests: dict[str, list[list[int]]] = defaultdict(list)
    with (slides / "nests.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            nests[line["slide"]].append([int(line[name]) for name in ("x", "y", "width", "height")])
    with (slides / "manifest.csv").open(newline="") as file:
        tested = [line["image"] for line in csv.DictReader(file) if line["split"] == "test" and line["image"] in nests]
    every, kept, best = [], [], []
    predictions = keyhole.load(run).predict_many([slides / name for name in tested])
    for name, prediction in zip(tested, predictions, strict=True):
        own = np.array(nests[name])
        every.append(on_nests(prediction.scores.boxes(prediction.scores.index), own))
        kept.append(on_nests(prediction.kept.boxes, own))
        order = np.argsort(-prediction.kept.attention["label"])[:BEST]
        best.append(on_nests(prediction.kept.boxes[order], own))
    return Shares(*(float(np.concatenate(part).mean()) for part in (every, kept, best)))


def on_nests(boxes: NDArray[np.int64], nests: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the boxes (k, 4) overlap any of the nests (n, 4); x, y, width, height."""
    start = np.maximum(boxes[:, None, :2], nests[None, :, :2])
    end = np.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (nests[:, :2] + nests[:, 2:])[None])
    overlap: NDArray[np.bool_] = (end > start).all(axis=2).any(axis=1)
    return overlap


def report(rows: list[tuple[str, ...]], options: argparse.Namespace, versions: dict[str, str]) -> Path:
    """Writes the dated file."""
    cores = count_cores()
    date = time.strftime("%Y-%m-%d")
    head = (
        "seed",
        f"AUROC on the {options.test} unseen [95 % interval]",
        "patches on a nest: all",
        "kept",
        f"{BEST} most attended",
        "writing slides",
        "training",
        "evaluation",
        "peak memory of training",
    )
    text = [
        f"# `keyhole train --recipe slides`, {cores} CPU cores, {date}",
        "",
        f"Generated slides of {options.side:,} x {options.side:,} pixels at 0.5 microns per pixel, half of them",
        f"positive: {options.train} to learn from, {options.val} to choose by, {options.test} never seen. What makes a",
        "slide positive are nests of three hollow nuclei that cover under 0.1 % of its tissue. The encoder starts from",
        "random weights; the slides are read from their files in every epoch (`data.cache` 0).",
        "Guessing gives an AUROC of 0.50. Shares of patches are of the positive unseen slides; a patch is on a nest if",
        "a pixel of it is. Times are wall clock and, in brackets, processor time of all cores.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"{processor()}, {cores} cores, {platform.system()}; Python {versions['python']}, torch {versions['torch']}, "
        f"keyhole {keyhole.__version__}.",
        f"Made by `python benchmarks/slides.py --seeds {' '.join(map(str, options.seeds))} --train {options.train} "
        f"--val {options.val} --test {options.test} --side {options.side}`.",
        "",
    ]
    path = Path(__file__).parent / f"slides_{cores}cpu_{date}.md"
    path.write_text("\n".join(text))
    return path


if __name__ == "__main__":
    main()
