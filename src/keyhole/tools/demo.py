"""A whole run on generated images, by the code of `keyhole train` and `keyhole evaluate`."""

from __future__ import annotations

import csv
import itertools
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from keyhole.config.file import resolve
from keyhole.config.settings import Config
from keyhole.inference.evaluate import Evaluation, evaluate
from keyhole.inference.predictor import Predictor, load
from keyhole.training.loop import train_config

SAMPLE = 20
"""Number of unseen images whose best patches are compared with the places of the digits."""


def demo_config(out: Path, seed: int) -> Config:
    given = {"out": str(out / "run"), "data": {"path": str(out / "images" / "manifest.csv")}, "train": {"seed": seed}}
    return resolve("demo").replace(**given)


def free_folder(name: str = "demo") -> Path:
    """Return `demo`, or `demo-2` and so on where that exists."""
    tries = (Path(name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(path for path in tries if not path.exists())


def demo(out: str | Path = "demo", seed: int = 0) -> Evaluation:
    """Write images, train, evaluate on 200 unseen images, and draw the patches that were kept, in a new folder."""
    from keyhole.datasets.digits import CLASSES, make_digits
    from keyhole.datasets.new_folder import check_new

    out = Path(out)
    check_new(out)
    start = time.monotonic()
    print(f"writing images of digits hidden among strokes to {out / 'images'}", flush=True)
    make_digits(out / "images", train=240, val=40, seed=seed)
    print(f"training (the same as: keyhole train {out / 'images' / 'manifest.csv'} --recipe demo)", flush=True)
    run = train_config(demo_config(out, seed))
    found = evaluate(run.path)
    hits, kept = hits_on_digits(load(run.path), out / "images" / "boxes.csv")
    metrics = found.metrics[0]
    print(f"{time.monotonic() - start:.0f} s in all; {metrics.n} unseen images; guessing gives {1 / len(CLASSES):.2f}")
    print(f"of the {kept} patches with the most attention in {SAMPLE} unseen images, {hits} are on a digit")
    print(f"accuracy {metrics.overall['accuracy']}")
    print(f"contact sheet: {found.path / 'contact_sheet.png'}")
    print(f"run folder: {run.path}")
    return found


def hits_on_digits(predictor: Predictor, boxes: Path) -> tuple[int, int]:
    """Return in how many images the patch with the most attention overlaps a digit, and the number of images."""
    where: dict[str, list[list[int]]] = defaultdict(list)
    with boxes.open(newline="") as file:
        for row in csv.DictReader(file):
            where[row["image"]].append([int(row[name]) for name in ("x", "y", "width", "height")])
    images = [name for name in where if name.startswith("images/test")][:SAMPLE]
    hits = 0
    for name, prediction in zip(images, predictor.predict_many([boxes.parent / name for name in images]), strict=True):
        best = int(np.argmax(prediction.kept.attention["label"]))
        x, y, width, height = prediction.kept.boxes[best]
        hits += any(
            x < dx + dw and dx < x + width and y < dy + dh and dy < y + height for dx, dy, dw, dh in where[name]
        )
    return hits, len(images)
