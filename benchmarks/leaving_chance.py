"""How many of ten runs from random weights leave chance, and when: variants of training on small generated data.

    python benchmarks/leaving_chance.py [FOLDER] [--data demo slides canvases marks] [--variants published init ...]
        [--seeds 0 1 ...] [--epochs N] [--quick | --draw]

Variants are those of `leaving_chance.yaml`. Every run has a folder below FOLDER; runs that are done are skipped, those
that were stopped go on. After the last run the results are recorded (see `results.py`), and the table of all recorded
runs becomes the dated Markdown file beside this one. `--draw` only does the latter.

A run has left chance if the 95 % interval of the metric on the test images lies above that of guessing at the end.
The epoch of leaving is the first from which on the same holds on the split that training watches, until the end.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from machine import write_result
from real_data import image_side
from resized import resized_side, whole_image
from result import Figure, Result, of_run
from results import main as write_results
from results import recorded, shown
from small_data import QUICK, SETTINGS, Setting
from training import going_on, sections, train_and_evaluate

import keyhole
from keyhole.config.file import given_values, merged
from keyhole.config.settings import Config

VARIANTS = Path(__file__).with_suffix(".yaml")
THEME = "leaving chance: "
"""What the names of these data sets begin with among all results."""
LEFT, EPOCH = "left chance", "epoch of leaving"
UPRIGHT = {"augment.flip": False, "augment.rotate": False}
HEAD = (
    *("variant", "left chance", "seeds that did not", "epoch of leaving", "{figure}, mean ± sd", "lowest"),
    *("minutes a run", "hardware"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    variants: dict[str, dict[str, Any]] = yaml.safe_load(VARIANTS.read_text())
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/leaving_chance"))
    parser.add_argument("--data", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--epochs", type=int, help="stretch the schedules to it; named in the results")
    parser.add_argument("--quick", action="store_true", help="two epochs on few images; nothing is recorded")
    parser.add_argument("--draw", action="store_true", help="no training: the table of the recorded runs")
    options = parser.parse_args()
    if options.draw:
        draw()
        return
    epochs = 2 if options.quick else options.epochs
    failed: list[str] = []
    for seed in options.seeds:
        for setting in (SETTINGS[name] for name in options.data):
            manifest = setting.images(options.folder, QUICK if options.quick else setting.counts)
            for variant in options.variants:
                name = variant if epochs is None else f"{variant}, {epochs} epochs"
                config = base(manifest, setting.name, tuple(variants[variant].items()), epochs)
                run = manifest.parent.parent / f"{slug(name)}-{seed}"
                with going_on(failed):
                    train_and_evaluate(config.replace(train={"seed": seed}), run)
                    found = judged(run, setting, name)
                    found.write(run)
                    figures = (f"{key} {each.value:.4g}" for key, each in found.metrics.items())
                    print(setting.name, name, seed, *figures, flush=True)
    if not options.quick:
        write_results([str(options.folder)])
        draw()
    sys.exit("\n".join(failed) or 0)


def draw() -> None:
    """Write the table of the recorded runs."""
    print(
        write_result(
            "leaving_chance", "Runs from random weights that leave chance", report(recorded()), words=["--draw"]
        )
    )


def slug(name: str) -> str:
    """Return a name as a folder can have it."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def base(manifest: Path, name: str, variant: tuple[tuple[str, Any], ...], epochs: int | None) -> Config:
    """Return the configuration of a variant on a data set, for any seed; its schedule is stretched to `epochs`."""
    setting, given = SETTINGS[name], dict(variant)
    start, resized, changes = given.pop("from"), given.pop("resized", None), sections(setting.changes)
    data = {"data": {"path": str(manifest), **changes.get("data", {})}, "run": {"device": "cpu"}}
    wanted = merged(data, sections(given))
    if start == "init":
        wanted = merged(sections(UPRIGHT), wanted) if setting.upright else wanted
        config = from_init(Config().replace(**wanted)).replace(**wanted)
    else:
        config = Config().replace(**merged(given_values(setting.recipe), changes, wanted))
    if resized is not None:
        config = resized_to(resized, config, manifest)
    if epochs is None:
        return config
    train = config.train
    lengths = {name: value for name in ("warmup", "explore") if (value := getattr(train, name)) != "auto"}
    stretched = {name: value * epochs / train.epochs for name, value in lengths.items()}
    return config.replace(train={"epochs": epochs, **stretched})


def from_init(asked: Config) -> Config:
    """Return what `keyhole init` writes for the data of a configuration."""
    from keyhole.tools.init import measure, propose, with_counted_patches

    measured = measure(asked)
    return with_counted_patches(propose(asked, measured), measured, asked.run.stall).config


def resized_to(cost: str, config: Config, manifest: Path) -> Config:
    """Return a configuration that learns from the whole image, at the "time" or the "memory" of `config`."""
    patch = config.patch
    n = (image_side(manifest) / (patch.stride or patch.size)) ** 2 if cost == "time" else 0.0
    return whole_image(config, manifest, resized_side(patch.size, config.select.m, n), manifest.parent.parent)


def judged(run: Path, setting: Setting, recipe: str) -> Result:
    """Return the result of a run, with whether and when it left chance."""
    data = f"{THEME}{setting.name}"
    found = of_run(run, data=data, kind="generated", recipe=recipe, metrics=[setting.metric])
    low = found.metrics[setting.figure].low
    left = low is not None and low > setting.chance
    epoch = epoch_of_leaving(run, setting) if left else None
    also = {LEFT: Figure(float(left))} | ({} if epoch is None else {EPOCH: Figure(float(epoch))})
    return replace(found, metrics={**found.metrics, **also})


def epoch_of_leaving(run: Path, setting: Setting) -> int | None:
    """Return the first epoch from which on the watched figure lies above chance; None if the last one does not."""
    watch = keyhole.Run(run).config.train.watch
    with (run / "manifest.csv").open(newline="") as file:
        images = sum(row["split"] == watch for row in csv.DictReader(file))
    values = [row[f"{watch}.{setting.figure}"] for row in keyhole.Run(run).metrics]
    above = [setting.lower(value, images) > setting.chance for value in values]
    late = next((number for number, each in enumerate(reversed(above)) if not each), len(above))
    return len(above) - late + 1 if late else None


def report(results: Sequence[Result]) -> list[str]:
    """Return the lines of the dated file: a table for each data set, a row for each variant."""
    lines = [
        "Encoder `small` from random weights; the variants are those of `benchmarks/leaving_chance.yaml`.",
        "A run has left chance if the 95 % interval of its figure on the test images lies above guessing at the end. "
        "The epoch of leaving is the first from which on the same holds, until the end, on the split that training "
        "watches: `val`, under `published` `test`. Median over the runs that left.",
    ]
    for setting in SETTINGS.values():
        rows = defaultdict(list)
        for result in results:
            if result.data == f"{THEME}{setting.name}":
                rows[result.recipe, result.hardware].append(result)
        if rows:
            counts = ", ".join(f"{count} {split}" for split, count in setting.counts.items())
            lines += [
                "",
                f"## {setting.name}",
                "",
                f"Data: {setting.about}; {counts}. Guessing: {setting.chance:.2f}.",
                "",
            ]
            lines += ["| " + " | ".join(HEAD).format(figure=setting.figure) + " |", "|" + "---|" * len(HEAD)]
            lines += ["| " + " | ".join(cells(runs, setting)) + " |" for _, runs in sorted(rows.items())]
    return lines


def cells(runs: Sequence[Result], setting: Setting) -> list[str]:
    """Return the cells of a variant from its runs, which differ in their seeds."""
    left = [run for run in runs if run.metrics[LEFT].value]
    epochs = [run.metrics[EPOCH].value for run in runs if EPOCH in run.metrics]
    figures = [run.metrics[setting.figure] for run in runs]
    return [
        runs[0].recipe,
        f"{len(left)} of {len(runs)}",
        ", ".join(str(run.seed) for run in runs if run not in left) or "-",
        f"{statistics.median(epochs):g} of {runs[0].epochs}" if epochs else "-",
        shown(figures),
        f"{min(figure.value for figure in figures):.3f}",
        f"{statistics.median(run.epochs * run.epoch_seconds for run in runs) / 60:.1f}",
        runs[0].hardware,
    ]


if __name__ == "__main__":
    main()
