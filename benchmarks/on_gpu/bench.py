"""What a part is given, and where it puts what it finds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from alternate import seconds_of

if TYPE_CHECKING:
    from keyhole.engine import Engine


@dataclass
class Bench:
    """A part at work.

    Attributes:
        name: of the part.
        device: to measure.
        dry: tiny sizes on a CPU.
        scratch: folder that all parts of the call share.
        mnist: folder of MNIST's files, or None.
        end: time.monotonic() at which the part is stopped.
        failed: pieces that failed.
    """

    name: str
    device: torch.device
    dry: bool
    scratch: Path
    mnist: Path | None
    end: float
    failed: int = 0

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.end - time.monotonic()

    @property
    def side(self) -> int:
        """Side of the patches in pixels."""
        return 64 if self.dry else 256

    def say(self, text: str) -> None:
        print(text, flush=True)

    def figure(self, key: str, value: float, shown: str) -> None:
        """Print a quantity, and keep it for the result, where a later value takes the place of an earlier one."""
        self.say(f"{key}: {shown}")
        folder = self.scratch / "figures"
        folder.mkdir(exist_ok=True)
        with (folder / f"{self.name}.jsonl").open("a") as file:
            file.write(json.dumps([key, float(value), shown]) + "\n")

    def attempt(self, what: str, work: Callable[[], object]) -> bool:
        """Run one of several pieces that stand alone; a failure is told, and the piece after it runs."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one, the others are wanted
            self.failed += 1
            self.say(f"FAILED: {what}: {type(error).__name__}: {' '.join(str(error).split())[:600]}")
            return False
        return True


def rate(bench: Bench, work: Callable[[], object], count: int, least: float = 1.5) -> float:
    """Patches a second: the best of several calls of `work`, which does `count` of them, after two that warm up."""
    for _ in range(1 if bench.dry else 2):
        work()
    best, end = 0.0, time.perf_counter() + (0 if bench.dry else least)
    while not best or time.perf_counter() < end:
        best = max(best, count / seconds_of(work, bench.device))
    return best


def new_engine(bench: Bench, compiled: bool = False, encoder: str = "resnet18") -> Engine:
    """The engine of a classifier with fresh weights that computes in bf16.

    Args:
        bench: says where it is.
        compiled: one model then takes chunks of one size; another size is another model.
        encoder: timm's name; in a dry run a small one takes the place of ResNet-18.
    """
    from torch import nn

    from keyhole.engine import Engine
    from keyhole.engine.device import Arithmetic
    from keyhole.nn import CrossAttentionPool, IPSClassifier, TimmEncoder

    torch.manual_seed(0)
    body = TimmEncoder(encoder, 3, stages=1 if bench.dry else None)
    model = IPSClassifier(body, CrossAttentionPool(body.dim, 8), {"label": nn.Linear(body.dim, 2)})
    model.to(bench.device).train()
    engine = Engine(model, arithmetic=Arithmetic(torch.bfloat16, torch.bfloat16), warn=bench.say)
    if compiled and not bench.dry:
        engine.encoders.compile()
    return engine


def floor(bench: Bench, engine: Engine, chunk: int) -> float:
    """Patches a second of the encoder alone, over one chunk on the device again and again, into nothing."""
    pixels = torch.randint(0, 256, (chunk, bench.side, bench.side, 3), dtype=torch.uint8, device=bench.device)
    times = 1 if bench.dry else max(2, 4096 // chunk)
    with engine.encoders.inference():

        def work() -> None:
            for _ in range(times):
                engine.encoders.embed(pixels)

        return rate(bench, work, chunk * times)
