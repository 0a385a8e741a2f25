"""Whole training steps on a slide of sixteen gigapixels, read from its file, inside a memory budget.

    python benchmarks/gigapixel.py [--side 128000] [--device auto] [--batch B] [--steps 2] [--memory 3GB]
                                   [--compile auto] [--folder DIR] [--keep]

Writes a pyramidal JPEG TIFF of generated tissue (128,000 x 128,000 pixels, 250,000 patches of 256 px, no glass) and
takes training steps on it through the code of `keyhole train`: every patch is read, decoded and scored, M = 64 are
kept and learned from. On a GPU: B = 16 slides a step (links to one file, each read anew), ResNet-18, bf16. On a CPU:
B = 1, a small encoder. Reported: peak memory of the device and of the process, patches/s, and where the time went.

The pixels are generated: the figures are about memory and speed, not about learning.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from epochs import run_passive
from machine import write_result

from keyhole.config.settings import Config
from keyhole.datasets.slides import make_slide
from keyhole.engine.memory.plan import Plan
from keyhole.training import epoch
from keyhole.training.interrupt import Interrupt
from keyhole.training.job import start_job
from keyhole.training.loop import Loop
from keyhole.util.platform import peak_memory

CPU = {"encoder": "small", "channels": 3, "width": 8, "stages": 2}
GPU = {"encoder": "resnet18", "channels": 3}


@dataclass(frozen=True)
class Steps:
    """Training steps that were taken.

    Attributes:
        config: of the run.
        plan: of its memory.
        number, batch, patches: steps, slides of each, patches of a slide.
        precision: of the encoder where it learns.
        seconds: of all steps.
        shares: seconds by part.
        allocated, reserved: peaks of torch's allocator on a GPU in bytes; None on a CPU.
    """

    config: Config
    plan: Plan
    number: int
    batch: int
    patches: int
    precision: torch.dtype
    seconds: float
    shares: dict[str, float]
    allocated: int | None
    reserved: int | None

    @property
    def looked_at(self) -> int:
        """Patches of all steps."""
        return self.number * self.batch * self.patches

    @property
    def rate(self) -> float:
        """Patches a second."""
        return self.looked_at / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=128_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="slides a step; default 16 on a GPU, 1 on a CPU")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="as --run.compile")
    parser.add_argument("--folder", type=Path, help="where the slide is written, or lies already")
    parser.add_argument("--keep", action="store_true", help="keep the slide")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    device = "cpu" if not cuda else "cuda" if options.device == "auto" else options.device
    batch = options.batch or (16 if cuda else 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        slide, made = write_slide(folder, options.side)
        try:
            links = write_links(Path(scratch), slide, batch * options.steps)
            config = settings(device, links, batch, options.memory, options.compile)
            report(options.side, slide, made, take_steps(config, options.steps))
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


def settings(device: str, links: Path, batch: int, memory: str, compiled: str = "auto") -> Config:
    """The configuration of `keyhole train`; the run folder is beside the table of slides."""
    cuda = device.startswith("cuda")
    return Config().replace(
        out=links.parent / "run",
        memory=memory,
        data={"path": links, "cache": 0.0, "val": 0.0, "test": 0.0},
        patch={"size": 256},
        model=GPU if cuda else CPU,
        select={"m": 64},
        train={
            "batch": batch,
            "epochs": 1,
            "warmup": 0.0,
            "explore": 0.0,
            "precision": "bf16" if cuda else "float32",
        },
        augment={"flip": False, "rotate": False, "shift": False, "color": 0.0},  # none, as published for slides
        run={"device": device, "compile": compiled},
    )


def take_steps(config: Config, number: int) -> Steps:
    """Take so many steps, each on the next `train.batch` slides of the table."""
    job = start_job(config, lambda line: print(line, file=sys.stderr, flush=True))
    cuda, batch = job.device.type == "cuda", config.train.batch
    try:
        loop = Loop(job, Interrupt())
        items = list(job.manifest.split("train"))[: batch * number]
        epoch.epoch_items = lambda _job: items
        with job.engine.limit():
            if cuda:
                torch.cuda.reset_peak_memory_stats(job.device)
            start = time.monotonic()
            row = loop.learn()
            seconds = time.monotonic() - start
        return Steps(
            config=job.config,
            plan=job.engine.plan,
            number=int(row["step"]),
            batch=batch,
            patches=next(iter(job.images.counts.values())),
            precision=job.model.precision,
            seconds=seconds,
            shares=job.engine.timer.seconds(),
            allocated=torch.cuda.max_memory_allocated(job.device) if cuda else None,
            reserved=torch.cuda.max_memory_reserved(job.device) if cuda else None,
        )
    finally:
        job.close()


def report(side: int, slide: Path, made: float, steps: Steps) -> None:
    config, number, batch = steps.config, steps.number, steps.batch
    model = config.model.model_dump()
    device, seconds = config.run.device, steps.seconds
    lines = [
        f"{number} training step{'s' * (number > 1)} on {batch} slide{'s' * (batch > 1)} of "
        f"{side:,} x {side:,} pixels ({side**2 / 1e9:.1f} gigapixels, {steps.patches:,} patches of 256 px), "
        f"M = {config.select.m}, encoder {model['encoder']}"
        + (f" (width {model['width']}, {model['stages']} halvings)" if model["encoder"] == "small" else "")
        + f", {str(steps.precision).removeprefix('torch.')}. Generated tissue without glass, a JPEG TIFF of "
        f"{slide.stat().st_size / 1e9:.2f} GB; every slide of a step is read from the file anew.",
        "",
        f"Plan: {steps.plan.describe()}.",
        "",
        "| | |",
        "|---|---|",
        f"| budget (`--memory`) | {config.memory} |",
        *([f"| peak device memory, allocated | {steps.allocated / 2**30:.2f} GiB |"] if steps.allocated else []),
        *([f"| peak device memory, reserved | {steps.reserved / 1e9:.2f} GB |"] if steps.reserved else []),
        f"| peak resident memory of the process | {peak_memory() / 1e9:.2f} GB |",
        f"| patches looked at | {steps.looked_at:,} |",
        f"| time | {seconds:,.0f} s, {seconds / number:,.0f} s a step |",
        f"| rate | {steps.rate:,.0f} patches/s, {steps.rate * 256**2 / 1e9:.2f} gigapixels/s |",
        *(f"| share of the time: {name} | {part / seconds:.0%} |" for name, part in steps.shares.items()),
    ]
    if made:
        lines.append(f"| writing the slide | {made:,.0f} s, {side**2 / made / 1e6:,.0f} megapixels/s |")
    title = f"{side**2 / 1e9:.1f} gigapixels, {'GPU' if device.startswith('cuda') else 'CPU'}"
    path = write_result("gigapixel", title, lines, device)
    print("\n".join(lines))
    print(path)


if __name__ == "__main__":
    run_passive()
    main()
