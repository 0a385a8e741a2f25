"""Peak memory of whole steps (selection, gradient step) over N, M and B, inside one budget, into a dated Markdown file.

    python benchmarks/memory.py [--device auto] [--memory 1GB] [--patches 1000 10000 ...]

One of N patches an image, M kept patches and B images a step varies, around N = 10,000, M = 64 and B = 4, each in a
process of its own. Patches come through the reader as they do from files, but are made from their index: 32 px and the
small encoder at width 8 on a CPU, 256 px and ResNet-18 in bf16 on a GPU. On a CPU the budget is that of the whole
process; on a GPU that of torch's allocator, and the process's peak is given beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from machine import write_result
from numpy.typing import ArrayLike, NDArray

PATCHES, KEPT, IMAGES = (1_000, 10_000, 100_000, 250_000, 1_000_000), (16, 64, 256, 1_024), (1, 4, 16)
PLAIN = {"n": 10_000, "m": 64, "b": 4}
MARKS = 8
"""Bytes of a patch that hold its index; the rest is one of a few patterns."""


class MadePatches:
    """A patch source without a file: `n` patches of `size` px, made from their index."""

    def __init__(self, n: int, size: int) -> None:
        self.n, self.name = n, f"{n} made patches"
        self.patch_shape, self.dtype = (size, size, 3), np.dtype(np.uint8)
        self._patterns = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), np.uint8)

    def __len__(self) -> int:
        return self.n

    def read(self, index: ArrayLike | slice, out: NDArray[Any] | None = None) -> NDArray[Any]:
        wanted = np.arange(self.n)[index] if isinstance(index, slice) else np.asarray(index, np.int64)
        out = np.empty((len(wanted), *self.patch_shape), np.uint8) if out is None else out
        np.take(self._patterns, wanted % len(self._patterns), axis=0, out=out)
        out.reshape(len(wanted), -1)[:, :MARKS] = wanted[:, None].view(np.uint8)
        return out

    fetch = read

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Open:
    """Opener of made patches."""

    n: int
    size: int
    name: str = "made"

    def __call__(self) -> MadePatches:
        return MadePatches(self.n, self.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", help="default 1GB on a CPU, 3GB on a GPU")
    parser.add_argument("--patches", type=int, nargs="+", default=PATCHES, help="numbers of patches to go through")
    parser.add_argument("--one", type=int, nargs=3, metavar=("N", "M", "B"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = options.device.startswith("cuda")
    options.memory = options.memory or ("3GB" if cuda else "1GB")
    if options.one:
        print(json.dumps(measure(*options.one, options.device, options.memory)))
        return
    settings = [PLAIN | {"n": n} for n in options.patches]
    settings += [PLAIN | {"m": m} for m in KEPT] + [PLAIN | {"b": b} for b in IMAGES]
    rows, done = [], []
    for setting in settings:
        if setting in done:
            continue
        done.append(setting)
        command = [sys.executable, __file__, "--device", options.device, "--memory", options.memory, "--one"]
        child = subprocess.run([*command, *map(str, setting.values())], capture_output=True, text=True, check=False)
        if child.returncode:
            sys.exit(f"{setting} ended with {child.returncode}: {child.stderr[-2000:]}")
        rows.append(row(setting, json.loads(child.stdout.splitlines()[-1])))
        print(rows[-1], flush=True)
    what = "ResNet-18 on 256 px in bf16" if cuda else "the small encoder (width 8) on 32 px"
    device = torch.cuda.get_device_name(options.device) if cuda else "CPU"
    peak = "of torch's allocator" if cuda else "of the whole process"
    lines = [
        f"`--memory {options.memory}`, {what}. Two steps each (one from 250,000 patches on), from the reader to the",
        f"optimizer. Peaks are {peak}. 'added' is what is above that before the plan was made, when torch's libraries",
        "and the model were there already. Logits are 32 bytes a patch, of one image at a time.",
        "",
        "| N | M | B | I | gradient step | predicted MB | measured MB | ratio | added MB | RSS MB | patches/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    print(write_result("memory", f"Peak memory over N, M and B, {device}", lines, options.device))


def row(setting: dict[str, int], found: dict[str, Any]) -> str:
    split = "at once" if found["split"] is None else f"chunks of {found['split']}"
    cells = [f"{setting['n']:,}", f"{setting['m']:,}", setting["b"], found["chunk"], split]
    cells += [round(found[key] / 1e6) for key in ("predicted", "measured")]
    cells += [f"{found['predicted'] / found['measured']:.2f}"]
    cells += [round(found[key] / 1e6) for key in ("added", "rss")]
    return "| " + " | ".join(map(str, [*cells, f"{found['rate']:,.0f}"])) + " |"


def measure(n: int, m: int, b: int, name: str, memory: str) -> dict[str, Any]:
    """One setting, in this process: a plan, then steps under it."""
    from keyhole.config import ModelConfig, RunConfig, SelectConfig
    from keyhole.memory.budget import parse_memory
    from keyhole.memory.cap import cap
    from keyhole.memory.meter import status, taken
    from keyhole.memory.pace import Pace
    from keyhole.memory.plan import Plan, make_plan
    from keyhole.nn import build_classifier, split_backward
    from keyhole.passes import fetch_kept, open_reader, select_batch
    from keyhole.tasks import Task

    device = torch.device(name)
    cuda = device.type == "cuda"
    size = 256 if cuda else 32
    torch.manual_seed(0)
    kind = ModelConfig(encoder="resnet18") if cuda else ModelConfig(width=8)
    precision = torch.bfloat16 if cuda else torch.float32
    model = build_classifier(kind, [Task("a", "binary", ("no", "yes"))], size, precision).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    before = taken(device)
    plan = make_plan(
        model,
        patch_shape=(size, size, 3),
        m=m,
        batch=b,
        device=device,
        memory=parse_memory(memory),
        largest_bag=n,
        learn=True,
        color=False,
        optimizer=optimizer,
    )
    pace = Pace(plan, lambda text: print(text, file=sys.stderr))
    select = SelectConfig(m=m)
    steps = 2 if n < 250_000 else 1
    start = time.monotonic()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with cap(plan, device), open_reader(RunConfig(), device) as reader:
        for batch in reader.stream([[Open(n, size)] * b] * steps, plan.chunk):
            kept = select_batch(model, batch, select, pace=pace)
            bags, _, pixels = fetch_kept(model, batch, kept)

            def learn(plan: Plan, part: Any = bags.part, mask: torch.Tensor = bags.mask) -> torch.Tensor:
                optimizer.zero_grad(set_to_none=True)
                return split_backward(model, part, None, mask, lambda logits: logits["a"].square().mean(), plan.split)

            model.train()
            pace.run("learn", learn)
            optimizer.step()
            del bags, pixels
    measured = torch.cuda.max_memory_reserved(device) if cuda else status("VmHWM")
    return {
        "chunk": pace.plan.chunk,
        "split": pace.plan.split,
        "predicted": plan.peak,
        "measured": measured,
        "added": measured - before,
        "rss": status("VmHWM"),
        "rate": n * b * steps / (time.monotonic() - start),
    }


if __name__ == "__main__":
    main()
