"""Does what marks a pothole on one road mark it on another? Each road is judged by what three ways of learning gave.

    keyhole embed potholes.csv --encoder lite0 --patch.size 96 --dtype float16 --out FEATURES
    python benchmarks/potholes_by_road.py potholes.csv FEATURES

`potholes.csv` is what `examples/potholes/prepare.py` wrote; its splits are ignored. Every way is a logistic regression
on the mean feature of a photograph with the same penalty, so that roads can be compared; the page of the example has
what attention and IPS reach.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from machine import write_result
from numpy.typing import NDArray
from PIL import Image
from real_data import mean_features
from real_images import regression

from keyhole.config.settings import DataConfig
from keyhole.data.manifest import Manifest, read_manifest
from keyhole.tasks.evaluation import evaluate_task, point_metrics
from keyhole.tasks.kinds import Task

PENALTY = 1e-3
"""C of the regression."""
FOLDS = 5
FEWEST = 20
"""Photographs with a pothole that a road needs to be judged."""
HEAD = ("road", "photographs", "with a pothole", "its area, median", "the other roads", "the same road", "all roads")

Fold = tuple[NDArray[np.bool_], NDArray[np.bool_]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("features", type=Path)
    options = parser.parse_args()
    manifest = read_manifest(DataConfig(path=options.manifest, features=options.features))
    print(write_result("potholes_by_road", "Potholes, road by road", report(manifest)))


def report(manifest: Manifest) -> list[str]:
    """Return the lines of the dated file, with a row for each road that has enough photographs of both classes."""
    lines = [
        f"{len(manifest.items)} real photographs ([potholes](../examples/potholes/README.md)). AUROC with its 95 % "
        "interval over the photographs of a road. EfficientNet-Lite0 with ImageNet weights, patches of 96 px, logistic "
        "regression on the mean feature. Learned from:",
        "",
        "- *the other roads*: all of them, so that the road is new;",
        "- *the same road*: four of five stretches of it, in the order of the kilometres, to judge the fifth; mean of "
        "the stretches with both classes, and their range;",
        "- *all roads*: a random four fifths of all photographs, neighbours included.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
    ]
    (task,) = manifest.tasks
    x, y = mean_features(manifest.items), manifest.targets(manifest.items)[task.name]
    positive = y[:, 0] == 1
    roads = np.array([item.group for item in manifest.items])
    order = sorted(range(len(y)), key=lambda row: place(manifest.items[row].name))
    rank = np.argsort(order)
    spread = np.random.default_rng(0).permutation(len(y)) % FOLDS
    anywhere = predicted(manifest, x, y, ((spread != fold, spread == fold) for fold in range(FOLDS)))
    for road, count in Counter(roads[positive]).most_common():
        here = roads == road
        if min(count, (here & ~positive).sum()) < FEWEST:
            continue
        stretch = np.full(len(y), -1)
        stretch[here] = np.argsort(np.argsort(rank[here])) * FOLDS // here.sum()
        inside = ((here & (stretch != fold), stretch == fold) for fold in range(FOLDS))
        other, own = predicted(manifest, x, y, [(~here, here)]), predicted(manifest, x, y, inside)
        shown = [with_interval(task, y[here], each[here]) for each in (other, anywhere)]
        # stretches differ in how many have a pothole, and so do their models: each is judged by itself
        alone = [
            stretch == fold for fold in range(FOLDS) if 0 < positive[stretch == fold].sum() < (stretch == fold).sum()
        ]
        found = [point_metrics(task, y[part], own[part])["auroc"] for part in alone]
        shown.insert(1, f"{np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        areas = [area(item.annotation) for item in manifest.items if item.group == road and item.annotation is not None]
        lines.append(f"| {road} | {here.sum()} | {count} | {np.median(areas):.2%} | {' | '.join(shown)} |")
    return lines


def with_interval(task: Task, truth: NDArray[np.float64], said: NDArray[np.float64]) -> str:
    auroc = evaluate_task(task, truth, said, None).overall["auroc"]
    return f"{auroc.value:.2f} [{auroc.low:.2f} {auroc.high:.2f}]"


def predicted(
    manifest: Manifest, x: NDArray[np.float32], y: NDArray[np.float64], folds: Iterable[Fold]
) -> NDArray[np.float64]:
    """Return the probabilities of the photographs that are judged in one of the folds (learned from, judged)."""
    (task,) = manifest.tasks
    found = np.full((len(y), len(task.classes)), np.nan)
    for learned, judged in folds:
        parts = regression(task, {"train": x[learned], "judged": x[judged]}, y[learned], PENALTY)
        found[judged] = parts["judged"]
    return found


def place(name: str) -> tuple[str, int]:
    """Return the section of a road and the place on it, from the name of a photograph.

    >>> place("1007599_RS_386_386RS289112_28920")
    ('386RS289112', 28920)
    """
    _, _, _, section, *_, metres = name.split("_")
    return section, int(metres)


def area(mask: Path) -> float:
    """Return the share of a photograph that its mask marks."""
    with Image.open(mask) as picture:
        return float((np.asarray(picture.convert("L")) > 0).mean())


if __name__ == "__main__":
    main()
