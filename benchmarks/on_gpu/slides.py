"""A training step on slides of 250,000 patches of 256 px, from their files, inside a budget of 3 GB."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path

import torch
from gigapixel import Steps, settings, take_steps, write_links
from repeated_slide import write_repeated

from keyhole.patches.opener import FileOpener
from on_gpu.bench import Bench, floor, new_engine
from on_gpu.streams import CHUNK, Stream, stream

SIDE, BATCH, MEMORY = 128_000, 16, "3GB"
START = 15.0
"""Seconds that a job takes before its first patch: opening, planning, loading what is compiled."""
SURE = 0.85
"""Share of the time that is left that the step is to take, by the rate of a short stream."""


def slides(bench: Bench) -> None:
    """As many images as there is time for, up to 16; each has all of its patches, however many images there are."""
    slide = write_slide(bench)
    rate = rate_of_files(bench)
    batch = 2 if bench.dry else images_in_time(rate, bench.left)
    if batch < BATCH:
        bench.say(f"there is time for {batch} of {BATCH} images; each has all of its patches")
    tell(bench, step(bench, slide, batch))


def images_in_time(rate: float, left: float) -> int:
    """How many images of all their patches a step can have, at `rate` patches a second with `left` seconds to go."""
    return max(1, min(BATCH, int((left - START) * SURE * rate / (SIDE // 256) ** 2)))


def rate_of_files(bench: Bench) -> float:
    """Patches a second of the pass without gradients, from a smaller slide."""
    side = 1024 if bench.dry else 16_384
    opener = FileOpener(write_repeated(bench.scratch / f"rate-{side}.tif", side, source=2048), "slide", 256)
    engine, chunk = new_engine(bench, compiled=True), 16 if bench.dry else CHUNK
    alone = floor(bench, engine, chunk)
    share, _ = stream(bench, Stream("as built", opener, (side // 256) ** 2, chunk), engine, alone)
    return share * alone


def step(bench: Bench, slide: Path, batch: int) -> Steps:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    folder = Path(tempfile.mkdtemp(dir=bench.scratch))
    try:
        config = settings(str(bench.device), write_links(folder, slide, batch), batch, MEMORY, _compile(bench))
        return take_steps(config, 1)
    finally:
        shutil.rmtree(folder)


def tell(bench: Bench, found: Steps) -> None:
    what = f"{found.batch} x {found.patches:,} patches in {found.seconds:.1f} s"
    shares = ", ".join(f"{name} {part / found.seconds:.0%}" for name, part in found.shares.items())
    bench.say(f"{what}: {found.plan.describe()}; {shares}")
    bench.figure("slides.rate", found.rate, f"{found.rate:,.0f}; {what}")
    bench.figure("slides.batch", found.batch, f"{found.batch}")
    if found.reserved and found.allocated:
        bench.figure("slides.reserved", found.reserved / 1e9, f"{found.reserved / 1e9:.2f}")
        bench.figure("slides.allocated", found.allocated / 1e9, f"{found.allocated / 1e9:.2f}")
        ratio = found.plan.peak / found.reserved
        bench.figure("slides.ratio", ratio, f"{ratio:.2f}: {found.plan.peak / 1e9:.2f} GB predicted")


def write_slide(bench: Bench) -> Path:
    """The slide, all of whose patches are different places of it; in a dry run a small one."""
    side = 1024 if bench.dry else SIDE
    return write_repeated(bench.scratch / f"slide-{side}.tif", side, source=2048 if bench.dry else 8192)


def compile_slides(bench: Bench) -> None:
    """Takes a step on small slides: what it compiles lies in torch's cache on disk afterwards."""
    side = 512 if bench.dry else 8192
    found = step(
        bench, write_repeated(bench.scratch / f"warm-{side}.tif", side, source=2048), 1 if bench.dry else BATCH
    )
    bench.say(f"{found.batch} x {found.patches} patches in {found.seconds:.1f} s; {found.plan.describe()}")
    rate_of_files(bench)


def _compile(bench: Bench) -> str:
    return "off" if bench.dry else "on"
