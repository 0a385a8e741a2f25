"""The command line on the device, from slides to predictions: every verb that computes, once."""

from __future__ import annotations

import csv
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from keyhole.cli.main import main
from keyhole.datasets.slides import SlideSet, make_slides
from on_gpu.bench import Bench

EPOCHS, EPOCHS_ON_A_GPU = 3, 8
"""Enough to be stopped between them: on a GPU one takes a moment."""


def commands(bench: Bench) -> None:
    """Trains on JPEG slides with augmentation; each verb needs those before it.

    Nothing stays decoded and the grid stays on the tiles, so that the device decodes some of them.
    """
    folder = bench.scratch / "commands"
    count = 6 if bench.dry else 12
    data = make_slides(folder / "slides", SlideSet(count=count, side=2048, val=count // 3, test=count // 3))
    run, device = folder / "run", str(bench.device)
    train = ["train", str(data), "--out", str(run), "--run.device", device, *flags(bench.dry), "--train.batch", "4"]
    number = EPOCHS if bench.dry else EPOCHS_ON_A_GPU
    train += ["--train.epochs", str(number), "--train.explore", "0", "--data.cache", "0", "--augment.no-shift"]
    checks: dict[str, Callable[[], str]] = {
        "train": lambda: stopped(train, run, number),
        "resume": lambda: resumed(run, number),
        "evaluate": lambda: written(["evaluate", str(run), "--device", device], run / "evaluation"),
        "predict": lambda: predicted(run, folder, device, count),
        "embed": lambda: embedded(run, data, folder, device),
    }
    for name, check in checks.items():
        start, found = time.monotonic(), [""]
        well = bench.attempt(name, lambda check=check, found=found: found.insert(0, check()))  # type: ignore[misc]
        bench.figure(name, well, f"{found[0]}, {time.monotonic() - start:.0f} s" if well else "failed")
    log = run / "log.txt"
    if log.exists():
        bench.say(log.read_text())


def flags(dry: bool) -> list[str]:
    """Of training: the encoder of the published settings, not compiled for so little, or a tiny one."""
    if dry:
        small = (
            "small",
            "--model.encoder",
            "small",
            "--model.width",
            "4",
            "--model.stages",
            "2",
            "--run.compile",
            "off",
        )
        return ["--patch.size", "256", "--model.encoder", *small, "--select.m", "4"]
    full = ("resnet18", "--model.no-pretrained", "--memory", "3GB")
    return ["--patch.size", "256", "--model.encoder", *full, "--select.m", "16"]


def keyhole(words: list[str], code: int = 0) -> None:
    """Runs a command line in this process.

    Raises:
        RuntimeError: it ends with another exit code.
    """
    print(f"keyhole {' '.join(words)}", flush=True)
    found = main(words)
    if found != code:
        raise RuntimeError(f"keyhole {words[0]} ended with exit code {found} instead of {code}")


def stopped(words: list[str], run: Path, number: int) -> str:
    """Trains, and is told to stop as soon as an epoch is done."""
    done = threading.Event()

    def stop() -> None:
        while not (run / "metrics.csv").exists():
            if done.wait(0.02):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop, daemon=True)
    watcher.start()
    try:
        keyhole(words, code=128 + signal.SIGTERM)
    finally:
        done.set()
        watcher.join()
    return f"stopped after {len(epochs(run))} of {number} epochs"


def resumed(run: Path, number: int) -> str:
    keyhole(["resume", str(run)])
    losses = [float(row["train.loss"]) for row in epochs(run)]
    if len(losses) != number or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"expected {number} epochs with a loss, found {losses}")
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} epochs"


def epochs(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def written(words: list[str], folder: Path) -> str:
    keyhole(words)
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise RuntimeError(f"{folder.name}: nothing was written")
    return f"{len(files)} files"


def predicted(run: Path, folder: Path, device: str, count: int) -> str:
    images = [str(path) for path in sorted((folder / "slides" / "slides").glob("*.tif"))]
    keyhole(["predict", str(run), *images, "--out", str(folder / "answers"), "--device", device])
    with (folder / "answers" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != count:
        raise RuntimeError(f"expected {count} predictions, found {len(rows)}")
    return f"{len(rows)} images"


def embedded(run: Path, data: Path, folder: Path, device: str) -> str:
    """Embeds with the encoder that was trained, and trains on the features."""
    features = folder / "features"
    keyhole(["embed", str(data), "--run", str(run), "--out", str(features), "--device", device])
    words = ["train", str(data), "--data.features", str(features), "--out", str(folder / "on-features")]
    keyhole([*words, "--run.device", device, "--select.m", "4", "--train.epochs", "1", "--train.batch", "4"])
    return f"{len(list(features.glob('*.h5')))} files of features, one epoch on them"
