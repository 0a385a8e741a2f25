"""How the cost of a training step grows with N, M, I, B, the patch's side and the reading threads: tables and plots.

    python benchmarks/scaling.py [--device auto] [--rounds 5] [--precision auto] [--only N M ...]
                                [--quick] [--no-write]

One of them varies at a time around one setting that suits the machine. Every step goes through the code of `keyhole
train`: patches are read from generated slides (tiled JPEG TIFF), looked at, the best kept, learned from. The values of
one factor take turns in the same run; the ratios are to the value of the setting that all factors share.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alternate import alternate, medians
from epochs import Epochs, run_passive, write_csv
from machine import cores, hardware, write_result
from plotting import COLORS, GREY, PLOTS, panels, save

from keyhole.datasets.slides import make_slide

STEP, LEARNING, PROPORTIONAL = *COLORS[:2], GREY
PARTS = ("reading", "copying", "encoding", "scoring", "learning")


@dataclass(frozen=True)
class Setting:
    """What a step is made of.

    Attributes:
        side: patches along one side of the square image; N is its square.
        m, i, b: kept patches, patches of a chunk, images of a step.
        patch: side of a patch in pixels.
        threads: that read.
    """

    side: int
    m: int
    i: int
    b: int
    patch: int
    threads: int


@dataclass(frozen=True)
class Factor:
    """One letter, what an axis calls it, the attribute of `Setting` and the values it goes through."""

    letter: str
    label: str
    name: str
    values: tuple[int, ...]

    def shown(self, value: int) -> int:
        return value**2 if self.name == "side" else value


@dataclass(frozen=True)
class Point:
    """A measured value of a factor.

    Attributes:
        value: as shown.
        seconds: of one step.
        times: of the shared setting's step.
        rate: patches looked at a second.
        shares: of the time, by part.
    """

    value: int
    seconds: float
    times: float
    rate: float
    shares: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each value; the median counts")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto", help="as --train.precision")
    parser.add_argument("--only", nargs="+", metavar="FACTOR", help="such as N M; default all")
    parser.add_argument("--quick", action="store_true", help="fewer values, one turn each; the figures are rough")
    parser.add_argument("--no-write", action="store_true", help="print only, as --quick and --only do")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    options.device = "cpu" if not cuda else "cuda" if options.device == "auto" else options.device
    options.rounds = 1 if options.quick else options.rounds
    options.no_write = options.no_write or options.quick or bool(options.only)
    base, model, factors = settings(cuda, options.quick)
    known = [factor.letter for factor in factors]
    if unknown := set(options.only or known) - set(known):
        sys.exit(f"--only {' '.join(sorted(unknown))}: not one of {', '.join(known)}")
    found: dict[Factor, list[Point]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for factor in factors:
            if factor.letter in (options.only or known):
                found[factor] = measure(factor, base, model, options, Path(scratch))
                print("\n".join(table(factor, found[factor])), flush=True)
    if not options.no_write:
        finish(options, base, model, found)


def settings(cuda: bool, quick: bool) -> tuple[Setting, dict[str, object], list[Factor]]:
    """The shared setting, the model, and what varies."""
    threads = tuple(count for count in (1, 2, 4, 8, 16) if count <= cores())
    if cuda:
        base = Setting(side=64, m=64, i=1024, b=4, patch=256, threads=threads[-1])
        model: dict[str, object] = {"encoder": "resnet18"}
        sides, kept, chunks, batches = (32, 64, 96, 128), (16, 64, 256, 1024), (64, 256, 1024, 4096), (1, 2, 4, 8)
        patches = (64, 128, 256)
    else:
        base = Setting(side=32, m=64, i=64, b=1, patch=64, threads=threads[-1])
        model = {"encoder": "small"}
        sides, kept, chunks, batches = (32, 48, 64, 96), (16, 64, 256, 1024), (16, 64, 256, 1024), (1, 2, 4, 8)
        patches = (64, 96, 128)
    factors = [
        Factor("N", "patches of an image, N", "side", sides),
        Factor("M", "kept patches of an image, M", "m", kept),
        Factor("I", "patches looked at together, I", "i", chunks),
        Factor("B", "images of a step, B", "b", batches),
        Factor("patch", "side of a patch in pixels (N stays)", "patch", patches),
        Factor("threads", "reading threads", "threads", threads),
    ]
    if quick:
        factors = [dataclasses.replace(factor, values=factor.values[:2]) for factor in factors]
    return base, model, factors


def measure(
    factor: Factor, base: Setting, model: dict[str, object], options: argparse.Namespace, scratch: Path
) -> list[Point]:
    """Two steps of every value in turns; the look-ahead over the border of a batch is part of it."""
    steps = 2
    every = {value: dataclasses.replace(base, **{factor.name: value}) for value in factor.values}
    jobs = {value: open_job(one, model, steps, options, scratch) for value, one in every.items()}
    try:
        pieces: dict[str, Callable[[], object]] = {str(value): job.learn for value, job in jobs.items()}
        for warm_up in pieces.values():
            warm_up()
        seconds = medians(alternate(pieces, torch.device(options.device), options.rounds))
        points = []
        for value, one in every.items():
            step = seconds[str(value)] / steps
            shares = {part: jobs[value].share(part, options.rounds) for part in PARTS}
            reference = seconds[str(getattr(base, factor.name))] / steps
            rate = one.b * one.side**2 / step
            points.append(Point(factor.shown(value), step, step / reference, rate, shares))
        return points
    finally:
        for job in jobs.values():
            job.close()


def open_job(one: Setting, model: dict[str, object], steps: int, options: argparse.Namespace, scratch: Path) -> Epochs:
    """A job over links to one slide, each of which is opened and decoded for itself."""
    side = one.side * one.patch
    slide = scratch / f"{side}.tif"
    if not slide.exists():
        make_slide(slide, side, 0, tissue=1.0)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    links = [folder / f"{number}.tif" for number in range(max(2, steps * one.b))]
    for link in links:
        link.symlink_to(slide)
    return Epochs(
        {
            "out": str(folder / "run"),
            "data": {"path": str(write_csv(folder, links)), "val": 0.0, "test": 0.0, "cache": 0.0},
            "patch": {"size": one.patch},
            "model": model,
            "select": {"m": one.m, "chunk": one.i},
            "train": {"batch": one.b, "warmup": 0.0, "explore": 0.0, "precision": options.precision},
            "augment": {"flip": False, "rotate": False, "shift": False, "color": 0.0},
            "run": {
                "device": options.device,
                "threads": one.threads,
                "compile": "on" if options.device.startswith("cuda") else "off",
            },
        }
    )


def table(factor: Factor, points: list[Point]) -> list[str]:
    """Markdown."""
    lines = [f"## {factor.letter}: {factor.label}", ""]
    lines += [f"| {factor.letter} | s a step | times | patches/s | {' | '.join(PARTS)} |"]
    lines += ["|---" * (4 + len(PARTS)) + "|"]
    for point in points:
        shares = [f"{point.shares[part]:.0%}" for part in PARTS]
        cells = [f"{point.value:,}", f"{point.seconds:.3f}", f"{point.times:.2f}", f"{point.rate:,.0f}", *shares]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def finish(
    options: argparse.Namespace, base: Setting, model: dict[str, object], found: dict[Factor, list[Point]]
) -> None:
    """Writes the dated tables and the plots."""
    compiled = "compiled" if options.device.startswith("cuda") else "not compiled"
    lines = [
        f"One factor at a time around N = {base.side**2:,}, M = {base.m}, I = {base.i}, B = {base.b}, patches of "
        f"{base.patch} px, {base.threads} reading threads, encoder `{model['encoder']}`, "
        f"train.precision {options.precision}, {compiled}; through the code of `keyhole train`, "
        "from tiled JPEG TIFF files, not augmented. Medians of "
        f"{options.rounds} epochs of two steps, the values of a factor in turns; 'times' is to the shared setting's "
        "step. Shares are of the time of the step; the rest is bookkeeping. On a GPU the parts run beside each other "
        "and may sum to more.",
        "",
    ]
    for factor, points in found.items():
        lines += table(factor, points)
    result = write_result("scaling", "Cost of a step", lines, options.device)
    print(result)
    print(draw(found, hardware(options.device), result.stem[-10:]))


def draw(found: Mapping[Factor, Sequence[Point]], machine: str, date: str) -> Path:
    """Write `scaling_MACHINE.svg` into the documents' plots."""
    figure, axes = panels(len(found), 3)
    for axis, (factor, points) in zip(axes, found.items(), strict=True):
        panel(axis, factor, points)
    title = f"Time of a training step, one factor at a time ({machine}, {date})"
    return save(figure, title, PLOTS / f"scaling_{machine}.svg")


def panel(axis: Any, factor: Factor, points: Sequence[Point]) -> None:
    """One factor: whole step, the part of it that learns, and the line of what grows with the factor itself."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = [point.value for point in points]
    seconds = [point.seconds for point in points]
    axis.plot(values, seconds, "o-", color=STEP, linewidth=2, label="whole step")
    learning = [point.seconds * point.shares["learning"] for point in points]
    axis.plot(values, learning, "s--", color=LEARNING, linewidth=1.5, label="of it learning from the kept")
    start = next(place for place, point in enumerate(points) if abs(point.times - 1) < 1e-9)
    if factor.letter != "I":  # the same patches in larger or smaller helpings
        power = {"threads": -1, "patch": 2}.get(factor.letter, 1)
        line = [seconds[start] * (value / values[start]) ** power for value in values]
        axis.plot(values, line, ":", color=PROPORTIONAL, linewidth=1.5, label="in proportion")
    axis.set(xscale="log", yscale="log", xlabel=factor.label, ylabel="seconds")
    axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_title({"patch": "patch side (dotted: pixels)", "threads": "threads"}.get(factor.letter, factor.letter))


if __name__ == "__main__":
    run_passive()
    main()
