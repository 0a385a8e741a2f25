"""Whole epochs from photographs, decoding included, beside the published pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path

from machine import cores
from photographs import compare
from photographs_published import most_workers

from on_gpu.bench import Bench
from on_gpu.draw import write_photographs

OURS = "keyhole, enlarged, 100 px"


def photographs(bench: Bench) -> None:
    folder, kind, count = write_photographs(bench)
    batch = 2 if bench.dry else 16
    options = argparse.Namespace(
        device=str(bench.device),
        images=count,
        batch=batch,
        rounds=1 if bench.dry else 2,
        workers=0 if bench.dry else min(16, cores(), most_workers(batch)),
        compile="off" if bench.dry else "auto",
        stages=1 if bench.dry else None,
        no_write=True,
    )
    seconds = compare(options, folder, kind, Path(bench.scratch) / "photographs-runs")["learn"]
    ratio = seconds["published"] / seconds[OURS]
    rates = f"{count / seconds[OURS]:,.0f} images/s, published {count / seconds['published']:,.0f}"
    bench.figure("photographs", ratio, f"{ratio:.2f}: {rates}, {options.workers} workers")
    bench.say(
        f"an epoch is {count // batch} batches, and a worker of the published pipeline makes whole batches: in epochs "
        f"so short some of {options.workers} workers have none, and the first batch is waited for; see photographs.py"
    )
