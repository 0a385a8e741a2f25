"""Traffic composites: M = 2, M = 10 and all 192 patches, beside the whole image resized.

    python benchmarks/traffic.py [FOLDER] [--arms resized m2 m10 all] [--seeds 0 1 2] [--train 747] [--test 684]
        [--width 1280] [--epochs 12] [--set train.encoder_lr=0.1 ...] [--quick | --draw]

The images are composites that `shared/tools/make_traffic_scenes.py` writes in the layout of Swedish Traffic Signs, not
that data set: real signs in real road photographs. All arms follow the recipe `traffic`, with EfficientNet-Lite0 and
its ImageNet weights instead of ResNet-18, whose batch norms keep their statistics, fewer epochs and a warm-up in
proportion. A patch is a sixteenth as wide as the image. Learning from the resized image costs what M = 10 costs with
its selection. The last epoch is the model, as published; none before is evaluated.

Each run has a folder below FOLDER; runs that are done are skipped, and those that were stopped go on. After the last
run the results are recorded (see `results.py`), and the table of them becomes the dated Markdown file beside this one;
`--draw` only does the latter.
`--train`, `--test`, `--width` and `--epochs` cut the cost, `--set` changes the recipe; all are named in the results.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from machine import write_result
from resized import resized_side, whole_image
from result import Figure, Result, figure, of_run
from results import main as write_results
from results import recorded, shown
from training import sections, train_and_evaluate

from keyhole.config.file import resolve
from keyhole.config.settings import Config
from keyhole.datasets.traffic_signs import read_traffic_signs, write_traffic_signs
from keyhole.util.wording import counted

SCENES = Path(__file__).resolve().parents[2] / "shared" / "tools" / "make_traffic_scenes.py"
WIDTH = 1280
"""Of a composite, in pixels; it is three quarters as high."""
COLUMNS, N = 16, 192
"""Patches in a row, and in an image."""
M = {"m2": 2, "m10": 10, "all": N}
ARMS = {
    "resized": "whole image resized to the cost of IPS, M = 10",
    "m2": "IPS, M = 2",
    "m10": "IPS, M = 10",
    "all": f"all {N} patches",
}
FIGURE = "sign.accuracy"
KEPT, CHANCE = "kept patches on a sign", "of all patches"
LARGEST = "share of the largest class"
TARGET = 0.95
"""What M = 10 is to reach."""
HEAD = ("arm", "seeds", "accuracy, mean ± sd", "lowest", LARGEST, KEPT, "s an epoch", "peak GB", "hardware")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/traffic"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=747)
    parser.add_argument("--test", type=int, default=684)
    parser.add_argument("--width", type=int, default=WIDTH, help="a multiple of 64; composites are resized to it")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings instead of the recipe's")
    parser.add_argument("--quick", action="store_true", help="one epoch on few small images; nothing is recorded")
    parser.add_argument("--draw", action="store_true", help="no training: the table of the recorded runs")
    options = parser.parse_args(arguments)
    if options.draw:
        draw()
        return
    if options.quick:
        options.seeds, options.train, options.test, options.width, options.epochs = [0], 32, 16, 640, 1
    if options.width % (4 * COLUMNS):
        parser.error(f"--width: must be a multiple of {4 * COLUMNS}, not {options.width}")
    data = f"traffic composites, {options.width} px, {options.train} training images"
    folder = options.folder.resolve() / f"{options.train}-{options.test}"
    signs = write_images(folder, options.train, options.test, options.width)
    for seed in options.seeds:
        for arm in options.arms:
            config, recipe = configuration(arm, signs, options.width, options.epochs, options.set)
            run = signs.parent.parent / f"{re.sub('[^a-z0-9.]+', '-', recipe.lower())}-{seed}"
            train_and_evaluate(config.replace(train={"seed": seed}), run)
            found = judged(run, data, recipe)
            found.write(run)
            figures = (f"{name} {each.value:.4g}" for name, each in found.metrics.items())
            print(recipe, seed, *figures, f"{found.epoch_seconds} s an epoch, {found.peak_gb} GB", flush=True)
    if not options.quick:
        write_results([str(options.folder)])
        draw()


def draw() -> None:
    """Write the table of the recorded runs."""
    print(write_result("traffic", "Traffic composites", report(recorded()), words=["--draw"]))


def write_images(folder: Path, train: int, test: int, width: int) -> Path:
    """Compose the scenes, write them at another width if that is wanted, and return their manifest."""
    scenes, signs = folder / "scenes", folder / f"{width}" / "signs"
    if not (scenes / "Set1" / "annotations.txt").exists():  # written last
        command = [sys.executable, SCENES, scenes, "--train", train, "--test", test]
        subprocess.run([*map(str, command)], check=True)
    manifest = signs / "manifest.csv"
    if not manifest.exists():
        size = None if width == WIDTH else (width, width * 3 // 4)
        write_traffic_signs(signs, read_traffic_signs(scenes, "Set2"), size)
    return manifest


def configuration(arm: str, manifest: Path, width: int, epochs: int, changes: Sequence[str] = ()) -> tuple[Config, str]:
    """Return the settings of an arm, and its name among the results."""
    config = resolve("traffic")
    config = config.replace(
        data={"path": manifest},
        patch={"size": width // COLUMNS},
        model={"encoder": "lite0", "pretrained": False, "batch_norm": "auto"},
        train={"epochs": epochs, "warmup": config.train.warmup * epochs / config.train.epochs, "watch": "val"},
    )
    if arm == "resized":
        side = resized_side(width // COLUMNS, M["m10"], N)
        config = whole_image(config, manifest, side, manifest.parent.parent)
    else:
        config = config.replace(select={"m": M[arm]}, memory="8GB" if arm == "all" else None)
    asked = dict(change.split("=", 1) for change in changes)
    config = config.replace(**sections({name: yaml.safe_load(value) for name, value in asked.items()}))
    return config, ", ".join([ARMS[arm], counted(epochs, "epoch"), *changes])


def judged(run: Path, data: str, recipe: str) -> Result:
    """Return the result of a run, beside what a guess and patches kept at random would reach."""
    lesions: dict[str, Any] = json.loads((run / "evaluation/test/metrics.json").read_text()).get("lesions", {})
    of = {KEPT: "kept_touching_a_lesion", CHANCE: "kept_touching_a_lesion_by_chance"}
    with (run / "manifest.csv").open(newline="", encoding="utf-8") as file:
        classes = Counter(row["sign"] for row in csv.DictReader(file) if row["split"] == "test")
    also = {LARGEST: Figure(max(classes.values()) / classes.total())}
    also |= {name: figure(lesions[key]) for name, key in of.items() if lesions}
    return of_run(run, data=data, kind="composite", recipe=recipe, metrics=["accuracy"], also=also)


def report(results: Sequence[Result]) -> list[str]:
    """Return the lines of the dated file: a table for each size of the data, and whether M = 10 reached its target."""
    lines = [
        "Composites in the layout of Swedish Traffic Signs, not that data set: real signs of 24 to 90 px pasted into "
        "real road photographs of 1280 x 960 px. A third show one of 50, 70 and 80 km/h, most of the others other "
        "signs. Test images show other sequences of the road and other signs than training images.",
        "",
        "EfficientNet-Lite0 with ImageNet weights, whose batch norms keep their statistics, learned end to end by the "
        "recipe `traffic` (dropout, colour jitter, shift) in fewer epochs; patches of a sixteenth of the width, "
        f"N = {N}. Accuracy of four classes on the test images, by the last epoch. Time and memory are those of "
        "learning, medians over the seeds; the peak is of the process.",
    ]
    by_data: defaultdict[str, defaultdict[tuple[str, str], list[Result]]] = defaultdict(lambda: defaultdict(list))
    for each in results:
        if each.data.startswith("traffic composites"):
            by_data[each.data][each.hardware, each.recipe].append(each)
    for data, arms in by_data.items():
        lines += ["", f"## {data}", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += ["| " + " | ".join(cells(runs)) + " |" for runs in arms.values()]
        lines.append("")
        for (hardware, recipe), runs in arms.items():
            if recipe.startswith(ARMS["m10"]):
                lines.append(verdict(runs, arms.get((hardware, recipe.replace(ARMS["m10"], ARMS["all"])), [])))
    return lines


def cells(runs: Sequence[Result]) -> list[str]:
    """Return the cells of an arm from its runs, which differ in their seeds."""
    kept, chance = ([run.metrics[name] for run in runs if name in run.metrics] for name in (KEPT, CHANCE))
    return [
        runs[0].recipe,
        ", ".join(str(run.seed) for run in runs),
        shown([run.metrics[FIGURE] for run in runs]),
        f"{min(run.metrics[FIGURE].value for run in runs):.3f}",
        f"{runs[0].metrics[LARGEST].value:.3f}",
        f"{shown(kept)}, by chance {chance[0].value:.3f}" if kept else "-",
        f"{statistics.median(run.epoch_seconds for run in runs):.3g}",
        f"{statistics.median(run.peak_gb for run in runs):.2f}",
        runs[0].hardware,
    ]


def verdict(ten: Sequence[Result], every: Sequence[Result]) -> str:
    """Return what runs with M = 10 say about the target, and beside runs with all patches and the same settings."""
    reached, whole = ([run.metrics[FIGURE].value for run in runs] for runs in (ten, every))
    mean = statistics.mean(reached)
    said = f"- {ten[0].recipe}: {mean:.3f}, {'at' if mean >= TARGET else 'below'} the target of {TARGET}"
    if whole:
        spread = max(max(values) - min(values) for values in (reached, whole))
        said += f"; {mean - statistics.mean(whole):+.3f} beside {ARMS['all']}, with a spread of seeds of {spread:.3f}"
    return f"{said}."


if __name__ == "__main__":
    main()
