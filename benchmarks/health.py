"""What training says of runs that fail and of runs that do not, and what measuring the selection costs.

    python benchmarks/health.py [FOLDER] [--seeds 6] [--epochs 20] [--no-write]

Runs with random weights on small canvases, on noise whose brightness is the class, and on noise that says nothing. The
runs stay in FOLDER; those that are there are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_result
from numpy.typing import NDArray
from PIL import Image

import keyhole
from keyhole.config.file import configuration
from keyhole.runs.run import Run
from keyhole.training.job import start_job

SETTINGS: dict[str, dict[str, Any]] = {
    "patch": {"size": 16},
    "model": {"encoder": "small", "width": 4, "heads": 1},
    "select": {"m": 2},
    "train": {"batch": 8, "lr": 1e-3},
    "augment": {"flip": False, "rotate": False, "shift": False, "color": 0.0},
    "run": {"threads": 1},
}
KINDS = {"collapse": "the selection", "stagnation": "nothing is", "like random": "random patches"}
"""Warnings, and how their text begins."""


def write(folder: Path, pictures: Iterable[NDArray[np.uint8]], labels: Sequence[str], val: int) -> Path:
    """A CSV of pictures, of which the last `val` are for validation."""
    folder.mkdir(parents=True)
    rows = ["image,label,split"]
    for number, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{label},{'val' if number >= len(labels) - val else 'train'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder / "labels.csv"


def canvases(folder: Path, count: int = 100, cells: int = 5) -> Path:
    """Black canvases of `cells` x `cells` patches, of which one has a shape, of ten classes."""
    rng = np.random.default_rng(0)
    shapes = rng.random((10, 4, 4)) > 0.5
    pictures = np.zeros((count, 16 * cells, 16 * cells, 3), np.uint8)
    for number, picture in enumerate(pictures):
        y, x = rng.integers(0, cells, 2) * 16 + 2
        picture[y : y + 12, x : x + 12] = 255 * np.kron(shapes[number % 10], np.ones((3, 3), np.uint8))[..., None]
    return write(folder, pictures, [f"c{number % 10}" for number in range(count)], count // 5)


def scanners(folder: Path, count: int = 40) -> Path:
    """Noise, brighter in one of the two classes, as from two scanners."""
    rng = np.random.default_rng(0)
    pictures = [np.clip(rng.normal(100 + 30 * (i % 2), 40, (80, 80, 3)), 0, 255).astype(np.uint8) for i in range(count)]
    return write(folder, pictures, ["ab"[number % 2] for number in range(count)], count // 4)


def noise(folder: Path, count: int = 36) -> Path:
    """Noise with random labels."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (count, 48, 48, 3), np.uint8)
    return write(folder, pictures, ["abc"[number] for number in rng.integers(0, 3, count)], count // 4)


COLUMNS = (
    *("data", "train.explore", "seed", "told", "training loss, epoch 5", "last", "kept.changed, mean of second half"),
    *("kept.attended", "kept.blank", "kept.gain", "val.loss"),
)
DATA = {"canvases": canvases, "scanners": scanners, "noise": noise}


def trained(folder: Path, data: str, seed: int, epochs: int, explore: float, foreground: str = "all") -> Run:
    """A finished run, made if it is not there."""
    path = folder / data / "labels.csv"
    path = path if path.is_file() else DATA[data](folder / data)
    out = folder / f"{data}-{seed}-{epochs}-{explore:g}{'' if foreground == 'all' else f'-{foreground}'}"
    if out.is_dir():
        return keyhole.resume(out)
    train = SETTINGS["train"] | {"epochs": epochs, "explore": explore, "seed": seed}
    patch = SETTINGS["patch"] | {"foreground": foreground}
    changed = {"train": train, "patch": patch} | ({"augment": {}} if data == "noise" else {})
    return keyhole.train(path, out, **SETTINGS | changed)


def told(run: Run) -> list[str]:
    """The kinds of warnings, each with the epoch after which it came."""
    found, epoch = [], 0
    for line in (run.path / "log.txt").read_text().splitlines():
        words = line.split(" ", 2)[2]
        if words.startswith("epoch "):
            epoch = int(words.split()[1].rstrip(":"))
        found += [f"{kind}, {epoch}" for kind, begins in KINDS.items() if words.startswith(f"warning: {begins}")]
    return found


def costs(folder: Path, rounds: int = 9) -> tuple[float, float]:
    """Median processor seconds of validating 20 canvases of 225 patches, M = 25, without the figures and with them."""
    path = folder / "wide" / "labels.csv"
    path = path if path.is_file() else canvases(folder / "wide", count=100, cells=15)
    sections = SETTINGS | {"model": {"encoder": "small", "width": 16}, "select": {"m": 25}}
    config = configuration(path, sections).replace(out=folder / f"cost-{time.time_ns()}")
    taken: dict[bool, list[float]] = {False: [], True: []}
    with closing(start_job(config, lambda _: None)) as job:
        openers = [job.images.opener(item) for item in job.manifest.split("val")]
        batches = [openers[start : start + 8] for start in range(0, len(openers), 8)]
        for _ in range(rounds + 1):
            for compare, seconds in taken.items():
                began = time.process_time()
                for _ in job.engine.infer(batches, compare=compare):
                    pass
                seconds.append(time.process_time() - began)
    without, with_figures = (statistics.median(seconds[1:]) for seconds in taken.values())
    return without, with_figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/health"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    epochs, lines = options.epochs, []
    for data, explore in (("canvases", 0.0), ("canvases", epochs / 2), ("scanners", 0.0), ("noise", 0.0)):
        for seed in range(options.seeds):
            run = trained(options.folder, data, seed, epochs, explore)
            rows = run.metrics
            changed = [row["kept.changed"] for row in rows[-epochs // 2 :]]
            cells = [
                data,
                f"{explore:g}",
                seed,
                "; ".join(told(run)) or "-",
                *(f"{rows[k]['train.loss']:.3f}" for k in (4, -1)),
            ]
            cells += [f"{statistics.mean(changed):.3f}"]
            cells += [f"{rows[-1][name]:.3f}" for name in ("kept.attended", "kept.blank", "kept.gain", "val.loss")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
    without, measured = costs(options.folder)
    cost = (
        f"Validating 20 canvases of 225 patches with M = 25 takes {1000 * without:.0f} ms of the processor without the "
        f"figures and {1000 * measured:.0f} ms with them (median of 9 in turns): {measured / without - 1:+.1%}. "
        "Validation is a part of an epoch."
    )
    print(cost)
    if not options.no_write:
        head = [
            "Tiny runs from random weights, 4 channels wide. The loss of guessing is 2.303 for the ten classes of",
            "canvases, of which 24 of 25 patches are black, 0.693 for two scanners, and 1.061 for noise with random",
            "labels, which is augmented, so that it cannot be learned by heart. Told: the warnings, with the epoch",
            "after which it came; figures are of the last epoch.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
        ]
        print(write_result("health", "What training says of failing runs", [*head, *lines, "", cost]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
