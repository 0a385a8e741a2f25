"""Whether speed costs accuracy: the same runs trained along the fast path and in float32, three seeds each.

    python benchmarks/accuracy.py [--only demo|megapixel] [--seeds 0 1 2] [--threads 1] [--jobs 2] [--folder DIR]
    python benchmarks/accuracy.py --collect      writes the table of the runs that are complete
    python benchmarks/accuracy.py --published    Megapixel MNIST as published, 5,000 canvases: for a large GPU

Every run is a `keyhole train` and a `keyhole evaluate` in processes of their own. "Fast" is bf16 both where patches are
looked at and where the kept ones are learned from, compiled on a GPU; `train.precision auto` chooses no more than that.
"float32" asks for float32 and for no compiling. Both runs of a seed begin with the same weights, see the same images in
the same order, and differ in arithmetic alone.

What is complete in the folder is not trained again, and what was stopped is resumed, so the script may be killed and
started again. `--quick` goes through everything with a few images and one epoch; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from accuracy_runs import (
    DEMO,
    FAST,
    FLOAT32,
    MEGAPIXEL,
    PATHS,
    PUBLISHED,
    Study,
    Training,
    actual_device,
    made,
    shortened,
)
from canvases import MNIST
from machine import write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("demo", "megapixel"))
    parser.add_argument("--published", action="store_true", help="Megapixel MNIST as published; for a large GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, help="of each run; default: the cores, shared among the jobs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "accuracy", help="for images and runs")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help="a few images, one epoch, one seed; nothing is written")
    options = parser.parse_args()
    studies = [PUBLISHED] if options.published else [MEGAPIXEL, DEMO]
    if options.only is not None:
        studies = [study for study in studies if study.name == options.only]
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            options.folder, options.seeds = Path(folder), options.seeds[:1]
            print("\n".join(table(made([shortened(study) for study in studies], options))))
        return
    found = made(studies, options)
    if not any(training.metrics.exists() for training in found):
        parser.error(f"{options.folder}: no run is complete there; without --collect they are made")
    lines = table(found)
    device = actual_device(options.device)
    print("\n".join(lines))
    print(write_result("accuracy", "Accuracy of the fast path and of float32", lines, device))


@dataclass(frozen=True)
class Result:
    """What a complete run reached.

    Attributes:
        accuracy: on the test split, by task.
        labels: predicted for the test images, by task, in the order of the manifest.
        best_epoch: of the model that was evaluated.
        minutes: of training, wall clock.
        computing: device and arithmetic, in the run's words.
    """

    accuracy: dict[str, float]
    labels: dict[str, list[str]]
    best_epoch: int
    minutes: float
    computing: str


def read_result(training: Training) -> Result:
    found: dict[str, Any] = json.loads(training.metrics.read_text())["tasks"]
    with (training.run / "predictions" / "test.csv").open(newline="") as file:
        predicted = list(csv.DictReader(file))
    with (training.run / "metrics.csv").open(newline="") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    best = json.loads((training.run / "best" / "model.json").read_text())
    said = training.run.with_suffix(".log").read_text()
    computing = next(line.partition("computing on ")[2] for line in said.splitlines() if "computing on " in line)
    return Result(
        accuracy={task: about["overall"]["accuracy"]["value"] for task, about in found.items()},
        labels={task: [row[f"{task}.predicted"] for row in predicted] for task in found},
        best_epoch=best["epoch"],
        minutes=seconds / 60,
        computing=computing,
    )


def table(wanted: list[Training]) -> list[str]:
    """The Markdown: a summary of each task, then the single runs."""
    complete = {training: read_result(training) for training in wanted if training.metrics.exists()}
    missing = [f"{one.study.name} {one.run.name}" for one in wanted if one not in complete]
    studies = list(dict.fromkeys(training.study for training in wanted))
    lines = [
        "Accuracy on test images that were never seen, of the model that was best on the validation images. The spread",
        "is the largest less the smallest accuracy of a path's seeds; the difference is that of the means, and lies",
        "within the spread if it is no larger than the wider of the two. Fast is bf16 where patches are looked at and",
        "where the kept ones are learned from, compiled on a GPU only; float32 is float32 in both, not compiled. Both",
        "look with batch norm folded, and on a CPU at blank patches once. The two runs of a seed begin with the same",
        "weights and see the same images in the same order. Times are wall clock, whatever else ran.",
        "",
        *(f"- {study.name}: {described(study)}." for study in studies),
        "",
        "| data | task | path | seeds | mean | std | smallest ... largest | fast less float32 | within the spread |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for study in studies:
        lines += summary(study, {one: result for one, result in complete.items() if one.study == study})
    lines += ["", *(line for study in studies for line in agreement(study, complete)), ""]
    lines += ["| data | run | accuracy | best epoch | training, min | computing on |", "|---|---|---|---|---|---|"]
    for one, result in complete.items():
        reached = ", ".join(f"{value:.4f}" for value in result.accuracy.values())
        lines.append(
            f"| {one.study.name} | {one.path}, seed {one.seed} | {reached} | {result.best_epoch} | "
            f"{result.minutes:.1f} | {result.computing} |"
        )
    lines += ["", *(f"Of {study.name}: {study.note}." for study in studies if study.note)]
    if missing:
        lines += ["", f"Not complete: {', '.join(missing)}."]
    return lines


def described(study: Study) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in study.counts.items())
    source = "" if study.name == "demo" or MNIST.is_dir() else "; scikit-learn's digits in MNIST's place"
    return f"{study.about}; {counts} images{source}"


def summary(study: Study, complete: dict[Training, Result]) -> list[str]:
    """Two lines a task, one a path."""
    by_path = {path: {one.seed: complete[one] for one in complete if one.path == path} for path in PATHS}
    tasks = list(next(iter(complete.values())).accuracy) if complete else []
    lines = []
    for task in tasks:
        reached = {
            path: {seed: result.accuracy[task] for seed, result in found.items()} for path, found in by_path.items()
        }
        verdict = compared(reached[FAST], reached[FLOAT32])
        for path, by_seed in reached.items():
            values = list(by_seed.values())
            if values:
                deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
                row = [study.name, task, path, str(len(values)), f"{statistics.mean(values):.4f}", deviation]
                row += [f"{min(values):.4f} ... {max(values):.4f}", *(verdict if path == FAST else ("", ""))]
                lines.append("| " + " | ".join(row) + " |")
    return lines


def compared(fast: dict[int, float], float32: dict[int, float]) -> tuple[str, str]:
    """Difference of the means over the same seeds, and whether it is within the wider spread; - until it is known."""
    if set(fast) != set(float32) or len(fast) < 2:
        return "-", "-"
    difference = statistics.mean(fast.values()) - statistics.mean(float32.values())
    spread = max(max(values) - min(values) for values in (fast.values(), float32.values()))
    # figures are counts of images over their number: equal ones may differ in the last bit
    return f"{difference:+.4f}", "yes" if abs(difference) <= spread + 1e-9 else "no"


def agreement(study: Study, complete: dict[Training, Result]) -> list[str]:
    """On how many test images two runs give the same labels: of one seed on both paths, and of two seeds on one."""
    found = {(one.path, one.seed): result.labels for one, result in complete.items() if one.study == study}
    seeds = sorted({seed for _, seed in found})
    paths = [((FAST, seed), (FLOAT32, seed)) for seed in seeds]
    others = [] if study.own_images else [((FLOAT32, a), (FLOAT32, b)) for a, b in combinations(seeds, 2)]
    lines = []
    for what, pairs in (("both paths, same seed", paths), ("float32, two seeds", others)):
        shares = [same(found[a], found[b]) for a, b in pairs if a in found and b in found]
        if shares:
            lines.append(
                f"- {study.name}: the same label for {statistics.mean(shares):.1%} of the test images ({what})"
            )
    return lines


def same(one: dict[str, list[str]], other: dict[str, list[str]]) -> float:
    """Share of equal labels, over all tasks."""
    pairs = [pair for task in one for pair in zip(one[task], other[task], strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


if __name__ == "__main__":
    main()
