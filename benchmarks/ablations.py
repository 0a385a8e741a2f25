"""What settings of the method do to accuracy, one at a time, and whether the paper's claims hold, on small canvases.

    python benchmarks/ablations.py [FOLDER] [--variant advised] [--factors M "I, streaming" ...] [--seeds 0 1]
        [--epochs N] [--quick | --draw]

The canvases and the variants are those of `leaving_chance.py`; with the same FOLDER the canvases are drawn once. Every
run has a folder below FOLDER; runs that are done are skipped, those that were stopped go on. After the last run the
results are recorded (see `results.py`), and plots, tables and sentences are made from all recorded runs: into
`docs/plots/ablations_HARDWARE.svg` and the dated Markdown file beside this one. `--draw` only does the latter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ablations_report import PATCHES, SETTING, Factor, draw, mean_accuracy, peaks, points, recipe_of, report
from leaving_chance import VARIANTS, base, slug
from machine import hardware, write_result
from plotting import PLOTS
from result import of_run
from results import main as write_results
from results import recorded
from small_data import QUICK
from training import going_on, sections, train_and_evaluate

DATA = "ablations: canvases"
STREAMING = {"select.rule": "streaming", "select.order": "shuffled"}
FACTORS = (
    Factor(
        "M",
        f"patches kept, M, of {PATCHES}",
        {"2": {"select.m": 2}, "5": {"select.m": 5}, "10": {}, "20": {"select.m": 20}, "64": {"select.m": 64}},
    ),
    Factor(
        "I, streaming",
        "patches scored at once, I",
        {"2": STREAMING | {"select.chunk": 2}, "10": STREAMING, "54": STREAMING | {"select.chunk": 54}},
    ),
    Factor(
        "I, global",
        "patches scored at once, I",
        {"2": {"select.chunk": 2}, "10": {}, "64": {"select.chunk": 64}},
    ),
    Factor(
        "patch",
        "side of a patch in pixels",
        {
            "25": {"patch.size": 25, "patch.stride": 25, "select.m": 40},
            "40": {"patch.size": 40, "patch.stride": 40, "select.m": 16},
            "50": {},
            "80": {"patch.size": 80, "patch.stride": 80, "select.m": 4},
            "100": {"patch.size": 100, "patch.stride": 100, "select.m": 3},
        },
    ),
    Factor(
        "overlap",
        "overlap of neighbouring patches",
        {"0": {}, "30 %": {"patch.stride": 35}, "50 %": {"patch.stride": 25}},
    ),
    Factor(
        "position",
        "position code",
        {"none": {"model.position": "none"}, "1d": {}, "2d": {"model.position": "2d"}},
    ),
    Factor(
        "rule",
        "rule of selection (streaming: I = 10)",
        {
            "global": {},
            "streaming,\nfile order": STREAMING | {"select.order": "file"},
            "streaming,\nshuffled": STREAMING,
        },
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    variants: dict[str, dict[str, Any]] = yaml.safe_load(VARIANTS.read_text())
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/leaving_chance"))
    parser.add_argument("--variant", choices=variants, default="advised", help="what is changed, one setting at a time")
    parser.add_argument("--factors", nargs="+", choices=[factor.name for factor in FACTORS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, help="stretch the schedule to it; named in the results")
    parser.add_argument("--quick", action="store_true", help="two epochs on few images; nothing is recorded")
    parser.add_argument("--draw", action="store_true", help="no training: plots and tables from the recorded runs")
    options = parser.parse_args()
    epochs = 2 if options.quick else options.epochs
    name = options.variant if epochs is None else f"{options.variant}, {epochs} epochs"
    failed: list[str] = []
    if not options.draw:
        manifest = SETTING.images(options.folder, QUICK if options.quick else SETTING.counts)
        config = base(manifest, SETTING.name, tuple(variants[options.variant].items()), epochs)
        for seed in options.seeds:
            for changes in changes_of(options.factors):
                recipe = recipe_of(name, changes)
                run = manifest.parent.parent / "ablations" / f"{slug(recipe)}-{seed}"
                with going_on(failed):
                    train_and_evaluate(config.replace(**sections({**changes, "train.seed": seed})), run)
                    found = of_run(run, data=DATA, kind="generated", recipe=recipe, metrics=["accuracy"])
                    found.write(run)
                    print(f"{recipe}, seed {seed}: {mean_accuracy(found):.3f}", flush=True)
        if options.quick:
            sys.exit("\n".join(failed) or 0)
        write_results([str(options.folder)])
    results = [result for result in recorded() if result.data == DATA and result.hardware == hardware()]
    found = {factor: values for factor in FACTORS if len(values := points(factor, name, results)) > 1}
    if not found:
        parser.error(f"of no setting two values of {name} are recorded for {hardware()}; leave --draw out to make them")
    plot = draw(found, peaks(), PLOTS / f"ablations_{hardware()}.svg")
    print(write_result("ablations", "Settings of the method and accuracy", report(found, name, plot)))
    sys.exit("\n".join(failed) or 0)


def changes_of(factors: Sequence[str] | None) -> list[Mapping[str, Any]]:
    """Return the changes of all values of some factors, each once."""
    found: list[Mapping[str, Any]] = []
    for factor in FACTORS:
        if factors is None or factor.name in factors:
            found += [changes for changes in factor.values.values() if changes not in found]
    return found


if __name__ == "__main__":
    main()
