"""The published procedure beside keyhole's, on canvases of Megapixel MNIST that are small enough for a CPU.

    python benchmarks/head_to_head.py [FOLDER] [--arms published recipe advised] [--seeds 0 1 2] [--size 750] ...
    python benchmarks/head_to_head.py [FOLDER] --pace 3 ...     seconds of an epoch, on an idle machine
    python benchmarks/head_to_head.py [FOLDER] --draw ...       plot and table of the runs that are done

Arms: `published` is `benchmarks/published.py`, the literal rendering, with its procedure; `recipe` is keyhole with the
recipe `megapixel-mnist`; `advised` is keyhole as `ADVISED` changes that, and `advised-short` the same in two thirds of
the epochs. All see the same canvases, which are drawn
into FOLDER once, and are evaluated on the test canvases after every epoch. Each run has a folder of its own with
`epochs.csv`: epoch, seconds so far (evaluation included), loss and accuracy of each task, and `result.json` for
`results.py`. A stopped run goes on. Since long runs share their machine with other work, the time of an epoch is
measured by `--pace` alone, all arms in turns, two epochs each of which the second counts, and kept for each number of
cores: under `taskset -c 0` it is that of one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from canvases import MNIST, write_canvases
from head_to_head_report import Arm, draw, sentences, table
from machine import hardware, write_result
from published import Published, published_from
from result import NAME as RESULT
from result import Figure, Result
from torch import Tensor

import keyhole
from keyhole.config.file import resolve
from keyhole.config.settings import Config
from keyhole.data.manifest import Manifest, read_manifest
from keyhole.images import open_image
from keyhole.images.geometry import Box
from keyhole.tasks.intervals import NORMAL, wilson
from keyhole.training.setup import new_model
from keyhole.util.files import atomic_file, csv_text, write_atomic
from keyhole.util.platform import peak_memory, restart_peak

TASKS = {"majority": "multiclass", "max": "multiclass", "top": "multiclass", "multi": "multilabel"}
METRICS = {"majority": "accuracy", "max": "accuracy", "top": "accuracy", "multi": "accuracy"}
ADVISED: dict[str, dict[str, Any]] = {
    "patch": {"foreground": "non-empty"},
    "select": {"m": 16, "rule": "global", "order": "file", "chunk": None},
    "train": {"batch": 8, "decay": "matrices", "clip": 1.0, "average": "auto", "explore": 4},
    "augment": {"shift": True},
}
"""What the arm `advised` changes."""
SHORT = 2 / 3
"""Of the epochs, in the arm `advised-short`."""
COLUMNS = ("epoch", "seconds", "train.loss", *TASKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/head-to-head"))
    parser.add_argument("--arms", nargs="+", default=["published", "recipe", "advised", "advised-short"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=750)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--noise", type=int, default=12)
    parser.add_argument("--m", type=int, default=25, help="M and I")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--encoder", default="resnet18", help="`small`, or a timm encoder cut after two stages")
    parser.add_argument("--mnist", type=Path, default=MNIST)
    parser.add_argument("--pace", type=int, default=0, metavar="TURNS", help="only measure the seconds of an epoch")
    parser.add_argument("--draw", action="store_true", help="only draw and tabulate what is there")
    options = parser.parse_args()
    data = {name: getattr(options, name) for name in ("size", "train", "test", "noise")}
    name = "-".join(f"{key}{value}" for key, value in data.items())
    manifest = write_canvases(options.folder / name / "canvases", options.mnist, **data)
    prefix = f"{options.encoder}-m{options.m}-e{options.epochs}"
    paces = options.folder / name / f"{options.encoder}-m{options.m}-pace-{hardware()}.json"
    if options.pace:
        measure_pace(manifest, options, paces)
    elif options.draw:
        report(options, name, paces)
    for seed in [] if options.pace or options.draw else options.seeds:
        for arm in options.arms:
            run = options.folder / name / f"{prefix}-{arm}-{seed}"
            config = settings(manifest, run / "run", options, seed)
            restart_peak()
            train_arm(arm, config, run)
            if not (run / RESULT).exists():
                about = f"megapixel-mnist {name}, {options.encoder}, M = {options.m}, {options.epochs} epochs"
                kept = f", M = {ADVISED['select']['m']}" if arm.startswith("advised") else ""
                result_of(run, about, arm + kept, seed, options.test).write(run)
            last = rows_of(run / "epochs.csv")[-1]
            print(run.name, {key: round(float(value), 4) for key, value in last.items()}, flush=True)


def train_arm(arm: str, config: Config, run: Path) -> None:
    if arm == "published":
        train_published(config, run)
    else:
        config = config if arm == "recipe" else config.replace(**ADVISED)
        train_keyhole(config.replace(train={"epochs": epochs_of(arm, config.train.epochs)}), run)


def epochs_of(arm: str, epochs: int) -> int:
    return round(SHORT * epochs) if arm == "advised-short" else epochs


def measure_pace(manifest: Path, options: argparse.Namespace, path: Path) -> None:
    """Write the seconds of an epoch of each arm, by turn, beside those of earlier calls."""
    short = argparse.Namespace(**{**vars(options), "epochs": 2, "warmup": 1})
    found: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
    for _ in range(options.pace):
        for arm in options.arms:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                run = Path(folder)
                train_arm(arm, settings(manifest, run / "run", short, 0), run)
                first, second = (float(row["seconds"]) for row in rows_of(run / "epochs.csv"))
            found.setdefault(arm, []).append(round(second - first, 2))
            print(arm, found[arm], f"load average {os.getloadavg()[0]:.1f}", flush=True)
            write_atomic(path, json.dumps(found) + "\n")


def report(options: argparse.Namespace, name: str, paces: Path) -> None:
    """Draw and tabulate the finished runs of the arms that have a pace."""
    seconds = json.loads(paces.read_text())
    arms: dict[str, Arm] = {}
    for arm in options.arms:
        runs = {}
        for seed in options.seeds:
            path = options.folder / name / f"{options.encoder}-m{options.m}-e{options.epochs}-{arm}-{seed}/epochs.csv"
            rows = rows_of(path) if path.exists() else []
            if len(rows) == epochs_of(arm, options.epochs):
                runs[seed] = {task: [float(row[task]) for row in rows] for task in TASKS}
        pace = "advised" if arm == "advised-short" else arm  # their epochs cost the same
        if runs and pace in seconds:
            arms[arm] = Arm(arm, runs, seconds[pace])
    plot = draw(list(arms.values()), f"head_to_head_{hardware()}.svg")
    text = [
        "*Generated data.* Canvases of Megapixel MNIST by the published construction, made smaller: "
        f"{options.size} px, {options.noise} patterns of noise, {options.train} to learn from and {options.test} to "
        f"test with; patches of 50 px (N = {(options.size // 50) ** 2}), M = I = {options.m}, encoder "
        f"{options.encoder}, float32; the advised settings keep M = {ADVISED['select']['m']} and explore for "
        f"{ADVISED['train']['explore']} epochs. Accuracy on test canvases after the last epoch: mean of the seeds, and "
        "their range. Seconds of an epoch with its evaluation, alone on the machine: median of the turns, and their "
        "range.",
        "",
        *table(list(arms.values())),
        "",
        *sentences(arms),
        "",
        f"![Accuracy by epoch and by minute](../docs/plots/{plot.name})",
    ]
    print(*text, sep="\n")
    print(write_result("head_to_head", "The published procedure beside keyhole's", text))


def result_of(run: Path, data: str, arm: str, seed: int, images: int) -> Result:
    """Return what the arm reached after its last epoch, for the table of all results."""
    rows = rows_of(run / "epochs.csv")
    shares = {f"{task}.accuracy": float(rows[-1][task]) for task in TASKS}
    seconds = np.diff([0.0, *(float(row["seconds"]) for row in rows)])
    return Result(
        data=data,
        kind="generated",
        recipe=arm,
        seed=seed,
        metrics={name: Figure(share, *wilson(share, images, NORMAL)) for name, share in shares.items()},
        epochs=len(rows),
        epoch_seconds=round(float(np.median(seconds)), 2),
        peak_gb=round(peak_memory(since_restart=True) / 1e9, 3),
    )


def settings(manifest: Path, out: Path, options: argparse.Namespace, seed: int) -> Config:
    """The recipe `megapixel-mnist`, reduced."""
    small = (
        {"encoder": "small", "width": 16, "stages": 2} if options.encoder == "small" else {"encoder": options.encoder}
    )
    return resolve("megapixel-mnist").replace(
        out=out,
        data={"path": str(manifest), "tasks": [f"{task}={kind}" for task, kind in TASKS.items()]},
        model={"encoder": options.encoder, **small},
        select={"m": options.m, "chunk": options.m},
        train={"epochs": options.epochs, "warmup": options.warmup, "seed": seed, "precision": "float32"},
        run={"device": "cpu"},
    )


def train_keyhole(config: Config, run: Path) -> None:
    """Train or go on; what metrics.csv has, under the names of `COLUMNS`."""
    assert config.out is not None
    run.mkdir(parents=True, exist_ok=True)
    found = keyhole.resume(config.out) if config.out.exists() else keyhole.train(config)
    rows, seconds = [], 0.0
    for row in found.metrics:
        seconds += row["seconds"]
        accuracy = [row[f"test.{task}.{metric}"] for task, metric in METRICS.items()]
        rows.append((int(row["epoch"]), seconds, row["train.loss"], *accuracy))
    write_atomic(run / "epochs.csv", csv_text([COLUMNS, *rows]))


def train_published(config: Config, run: Path) -> None:
    """The published procedure, with the settings of `config`."""
    run.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(config.data, config.train.seed)
    train, test = (load(manifest, split, config.patch.size) for split in ("train", "test"))
    network = network_of(config, manifest)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=float(config.train.lr), weight_decay=config.train.weight_decay
    )
    torch.manual_seed(config.train.seed)
    rows: list[tuple[object, ...]] = []
    state = run / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        rows = [tuple(row) for row in saved["rows"]]
    size, count = config.train.batch, len(train[0])
    steps = math.ceil(count / size)
    for epoch in range(len(rows), config.train.epochs):
        began, losses = time.monotonic(), 0.0
        order = torch.randperm(count)
        network.train()
        for number in range(steps):
            rate = published_rate(config, epoch * steps + number + 1, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            part = order[number * size : (number + 1) * size]
            targets = {task: labels[part] for task, labels in train[1].items()}
            losses += network.step(floats(train[0][part]), targets, optimizer) * len(part)
        network.eval()
        seconds = time.monotonic() - began + (float(rows[-1][1]) if rows else 0.0)  # type: ignore[arg-type]
        began = time.monotonic()
        accuracy = evaluate(network, *test, size)
        rows.append((epoch + 1, seconds + time.monotonic() - began, losses / count, *accuracy))
        saved = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        with atomic_file(state) as file:
            torch.save(saved | {"rows": [list(row) for row in rows]}, file)
        write_atomic(run / "epochs.csv", csv_text([COLUMNS, *rows]))
        print(run.name, *(f"{value:.4g}" for value in rows[-1]), flush=True)  # type: ignore[str-bytes-safe]


def published_rate(config: Config, s: int, steps: int) -> float:
    """lr s / W while s < W, then lr (q + 0.001 (1 - q)) with q = (1 + cos(pi (s - W) / (S - W))) / 2."""
    w, total = config.train.warmup * steps, config.train.epochs * steps
    q = (1 + math.cos(math.pi * (s - w) / (total - w))) / 2
    return float(config.train.lr) * (s / w if s < w else q + 0.001 * (1 - q))


def network_of(config: Config, manifest: Manifest) -> Published:
    model = new_model(config, manifest.tasks, torch.device("cpu")).train()
    activations = {task: "sigmoid" if kind == "multilabel" else "softmax" for task, kind in TASKS.items()}
    chunk = config.select.chunk
    assert chunk is not None
    return published_from(model, config.select.m, chunk, activations, shuffle=True)


def load(manifest: Manifest, split: str, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Canvases of a split as patches, uint8 (b n 1 size size), and their labels as the published loss takes them."""
    items, pixels = manifest.split(split), []
    for item in items:
        with open_image(item.image) as image:
            canvas = torch.from_numpy(image.read(Box(0, 0, *image.size))[..., 0])
        pixels.append(canvas.unfold(0, size, size).unfold(1, size, size).flatten(0, 1)[:, None])
    labels = {name: torch.from_numpy(rows) for name, rows in manifest.targets(items).items()}
    return torch.stack(pixels), {
        task: labels[task].float() if kind == "multilabel" else labels[task][:, 0].long()
        for task, kind in TASKS.items()
    }


def floats(patches: Tensor) -> Tensor:
    return patches.float().div_(255)


@torch.no_grad()
def evaluate(network: Published, patches: Tensor, labels: dict[str, Tensor], size: int) -> list[float]:
    """Accuracy of each task; of `multi` the share of canvases for which all classes are right."""
    right: dict[str, list[Tensor]] = {task: [] for task in TASKS}
    for start in range(0, len(patches), size):
        part = slice(start, start + size)
        kept, codes, _ = network.select(floats(patches[part]))
        for task, p in network(kept, codes).items():
            said = (p > 0.5).float() if TASKS[task] == "multilabel" else p.argmax(dim=1)
            same = said == labels[task][part]
            right[task].append(same.all(dim=1) if same.ndim > 1 else same)
    return [float(np.mean(torch.cat(each).numpy())) for each in right.values()]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
