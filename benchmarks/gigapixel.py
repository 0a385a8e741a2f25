"""Whole training steps on a slide of sixteen gigapixels, read from its file, inside a memory budget.

    python benchmarks/gigapixel.py [--side 128000] [--device auto] [--batch B] [--steps 2] [--memory 3GB]
                                   [--folder DIR] [--keep]

Writes a pyramidal JPEG TIFF of generated tissue (128,000 x 128,000 pixels, 250,000 patches of 256 px, no glass) and
takes training steps on it through the code of `keyhole train`: every patch is read, decoded and scored, M = 64 are
kept and learned from. On a GPU: B = 16 slides a step (links to one file, each read anew), ResNet-18, bf16. On a CPU:
B = 1, a small encoder. Reported: peak memory of the device and of the process, patches/s, and where the time went.

The pixels are generated: the figures are about memory and speed, not about learning.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import write_result

from keyhole.bench.memory import peak_process
from keyhole.config import Config
from keyhole.config_file import build
from keyhole.data.slides import make_slide
from keyhole.memory.cap import cap
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import Job, start_job
from keyhole.training.loop import Loop

CPU = {"encoder": "small", "channels": 3, "width": 8, "stages": 2}
GPU = {"encoder": "resnet18", "channels": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=128_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="slides a step; default 16 on a GPU, 1 on a CPU")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--folder", type=Path, help="where the slide is written, or lies already")
    parser.add_argument("--keep", action="store_true", help="keep the slide")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    batch = options.batch or (16 if cuda else 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        slide, made = write_slide(folder, options.side)
        try:
            data = write_links(Path(scratch), slide, batch * options.steps)
            run_steps(options, cuda, batch, slide, made, data, Path(scratch))
        finally:
            if made and not options.keep:
                slide.unlink()


def write_slide(folder: Path, side: int) -> tuple[Path, float]:
    """The slide, and the seconds it took; 0 where it lies there already."""
    path = folder / f"gigapixel-{side}.tif"
    if path.exists():
        return path, 0.0
    start = time.monotonic()
    done = 0

    def tell(pixels: int) -> None:
        nonlocal done
        before, done = done, done + pixels
        if done * 10 // side**2 > before * 10 // side**2:
            print(f"writing {path.name}: {done / side**2:.0%}", file=sys.stderr, flush=True)

    make_slide(path, side, 0, tissue=1.0, positive=True, progress=tell)
    return path, time.monotonic() - start


def write_links(scratch: Path, slide: Path, count: int) -> Path:
    """A CSV of `count` slides that are one file under many names; two at least, since there are two classes."""
    rows = ["image,label,split"]
    for number in range(max(2, count)):
        link = scratch / f"{number}.tif"
        link.symlink_to(slide.resolve())
        rows.append(f"{link},{'ab'[number % 2]},train")
    path = scratch / "slides.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def run_steps(
    options: argparse.Namespace, cuda: bool, batch: int, slide: Path, made: float, data: Path, scratch: Path
) -> None:
    config = build(
        Config(),
        {
            "out": str(scratch / "run"),
            "memory": options.memory,
            "data": {"path": str(data), "cache": 0.0, "val": 0.0, "test": 0.0},
            "patch": {"size": 256},
            "model": GPU if cuda else CPU,
            "select": {"m": 64},
            "train": {
                "batch": batch,
                "epochs": 1,
                "warmup": 0.0,
                "explore": 0.0,
                "precision": "bf16" if cuda else "float32",
            },
            "augment": {"color": 0.0},  # none, as published for slides
            "run": {"device": "cuda" if cuda else "cpu"},
        },
    )
    job = start_job(config, lambda line: print(line, file=sys.stderr, flush=True))
    loop = Loop(job, Interrupt())
    items = list(job.manifest.split("train"))[: batch * options.steps]
    loop.epoch_items = lambda: items  # type: ignore[method-assign]
    with cap(job.plan, job.device):
        if cuda:
            torch.cuda.reset_peak_memory_stats(job.device)
        start = time.monotonic()
        row = loop.learn()
        seconds = time.monotonic() - start
    allocated = torch.cuda.max_memory_allocated(job.device) if cuda else None
    reserved = torch.cuda.max_memory_reserved(job.device) if cuda else None
    report(options, job, batch, slide, made, row, seconds, loop.shares.seconds(), allocated, reserved)
    job.close()


def report(
    options: argparse.Namespace,
    job: Job,
    batch: int,
    slide: Path,
    made: float,
    row: dict[str, float],
    seconds: float,
    shares: dict[str, float],
    allocated: int | None,
    reserved: int | None,
) -> None:
    patches = job.images.counts
    steps = int(row["step"])
    looked_at = batch * steps * next(iter(patches.values()))
    device = str(job.device)
    peak = peak_process()
    model = dataclasses.asdict(job.config.model)
    lines = [
        f"{steps} training step{'s' * (steps > 1)} on {batch} slide{'s' * (batch > 1)} of "
        f"{options.side:,} x {options.side:,} pixels ({options.side**2 / 1e9:.1f} gigapixels, "
        f"{next(iter(patches.values())):,} patches of 256 px), "
        f"M = {job.config.select.m}, encoder {model['encoder']}"
        + (f" (width {model['width']}, {model['stages']} halvings)" if model["encoder"] == "small" else "")
        + f", {str(job.model.precision).removeprefix('torch.')}. Generated tissue without glass, a JPEG TIFF of "
        f"{slide.stat().st_size / 1e9:.2f} GB; every slide of a step is read from the file anew.",
        "",
        f"Plan: {job.plan.describe()}.",
        "",
        "| | |",
        "|---|---|",
        f"| budget (`--memory`) | {options.memory} |",
        *([f"| peak device memory, allocated | {allocated / 2**30:.2f} GiB |"] if allocated is not None else []),
        *([f"| peak device memory, reserved | {reserved / 1e9:.2f} GB |"] if reserved is not None else []),
        f"| peak resident memory of the process | {peak / 1e9:.2f} GB |",
        f"| patches looked at | {looked_at:,} |",
        f"| time | {seconds:,.0f} s, {seconds / steps:,.0f} s a step |",
        f"| rate | {looked_at / seconds:,.0f} patches/s, {looked_at * 256**2 / seconds / 1e9:.2f} gigapixels/s |",
        *(f"| share of the time: {name} | {part / seconds:.0%} |" for name, part in shares.items()),
    ]
    if made:
        lines.append(f"| writing the slide | {made:,.0f} s, {options.side**2 / made / 1e6:,.0f} megapixels/s |")
    title = f"{options.side**2 / 1e9:.1f} gigapixels, {'GPU' if job.device.type == 'cuda' else 'CPU'}"
    path = write_result("gigapixel", title, lines, device)
    print("\n".join(lines))
    print(path)


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is loaded; see keyhole/cli/main.py
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    main()
