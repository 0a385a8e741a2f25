"""Peak memory of whole steps (selection, gradient step) over N, M and B, inside one budget, into a dated Markdown file.

    python benchmarks/memory.py [--device auto] [--memory 1GB] [--patches 1000 10000 ...]
                                [--quick] [--no-write]

One of N patches an image, M kept patches and B images a step varies, around N = 10,000, M = 64 and B = 4, each in a
process of its own. `memory_steps.py` has the steps: patches come through the reader as they do from files,
but are made from their index: 32 px and the small encoder at width 8 on a CPU, 256 px and ResNet-18 on a GPU. On a
CPU the budget is that of the whole process; on a GPU that of torch's allocator, and the process's peak is given beside
it.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from machine import write_result
from memory_steps import Peak, growths, measure_apart, plain_config, verdict

from keyhole.config.settings import Config, RunConfig

PATCHES, KEPT, IMAGES = (1_000, 10_000, 100_000, 250_000, 1_000_000), (16, 64, 256, 1_024), (1, 4, 16)
QUICK = (1_000, 10_000)
PLAIN = {"n": 10_000, "m": 64, "b": 4}
MANY = 250_000
"""Patches from which one step is enough."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", help="default 1GB on a CPU, 3GB on a GPU")
    parser.add_argument("--patches", type=int, nargs="+", help="numbers of patches to go through")
    parser.add_argument("--quick", action="store_true", help="two numbers of patches, no other M or B")
    parser.add_argument("--no-write", action="store_true", help="print the result and write no file")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the processes that measure; see keyhole/cli/main.py
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = options.device.startswith("cuda")
    base = plain_config(cuda)
    base = base.replace(memory=options.memory or base.memory, run=RunConfig(device=options.device))
    over_n = [PLAIN | {"n": n} for n in options.patches or (QUICK if options.quick else PATCHES)]
    others = [] if options.quick else [PLAIN | {"m": m} for m in KEPT] + [PLAIN | {"b": b} for b in IMAGES]
    found: list[tuple[dict[str, int], Peak]] = []
    for setting in over_n + [other for other in others if other not in over_n]:
        if all(setting != done for done, _ in found):
            found.append((setting, steps(base, **setting)))
            print(row(*found[-1]), flush=True)
    what = f"{base.model.encoder} on {base.patch.size} px"
    device = torch.cuda.get_device_name(options.device) if cuda else "CPU"
    peak = "of torch's allocator" if cuda else "of the whole process"
    flat = verdict(growths([peak for setting, peak in found if setting in over_n], PLAIN["m"]))
    text = [
        f"`--memory {base.memory}`, {what}. Two steps each (one from {MANY:,} patches on), from the reader to the",
        f"optimizer. Peaks are {peak}. 'added' is what is above that before the plan was made, when torch's libraries",
        "and the model were there already. Logits are 32 bytes a patch, of one image at a time.",
        "",
        "| N | M | B | I | gradient step | predicted MB | measured MB | ratio | added MB | RSS MB | patches/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(setting, peak) for setting, peak in found),
        "",
        f"Over N: {flat}.",
    ]
    print("\n".join(text))
    if not options.no_write:
        print(write_result("memory", f"Peak memory over N, M and B, {device}", text, options.device))


def steps(base: Config, n: int, m: int, b: int) -> Peak:
    """One setting, in a process of its own."""
    config = base.replace(select={"m": m}, train={"batch": b})
    return measure_apart(config, [n] * b, steps=2 if n < MANY else 1)


def row(setting: dict[str, int], found: Peak) -> str:
    split = "at once" if found.split is None else f"chunks of {found.split}"
    cells: list[Any] = [f"{setting['n']:,}", f"{setting['m']:,}", setting["b"], found.chunk, split]
    cells += [round(size / 1e6) for size in (found.predicted, found.measured)]
    cells += [f"{found.predicted / found.measured:.2f}"]
    cells += [round(size / 1e6) for size in (found.added, found.process)]
    return "| " + " | ".join(map(str, [*cells, f"{found.rate:,.0f}"])) + " |"


if __name__ == "__main__":
    main()
