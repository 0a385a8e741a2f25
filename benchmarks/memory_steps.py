"""Peak memory of whole training steps over the number of patches N, each N in a process of its own.

Law: it does not grow with N, but for the logits of the selection (4 H T bytes a patch). While the best of an image are
found these are there a second time, with 32 bytes a patch for their order. What grows beyond that, and beyond what two
runs of the same process differ by, is not flat.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from made_patches import OpenMade

from keyhole.config.settings import Config, ModelConfig, PatchConfig, SelectConfig, TrainConfig
from keyhole.engine import Engine
from keyhole.engine.device import choose_device, choose_precision
from keyhole.engine.memory.meter import taken
from keyhole.engine.memory.plan import fixed_chunk, make_plan
from keyhole.engine.memory.probe import Workload
from keyhole.errors import ConfigError, KeyholeError
from keyhole.nn import build_classifier
from keyhole.nn.build import patch_shape
from keyhole.tasks.kinds import Task
from keyhole.util.budget import memory_text
from keyhole.util.platform import peak_memory

SORTING = 32
"""Bytes a patch, while the best of an image are found."""
SLACK_BYTES, SLACK_SHARE = 20 * 10**6, 0.03
"""By which two runs of the same process may differ: at least so many bytes, else this share of the peak."""


def plain_config(cuda: bool) -> Config:
    """What is measured where nothing else is said: seconds for 100,000 patches on the machine at hand."""
    model = ModelConfig(encoder="resnet18") if cuda else ModelConfig(encoder="small", width=8)
    return Config(
        memory="3GB" if cuda else "1GB",
        patch=PatchConfig(size=256 if cuda else 32),
        model=model,
        select=SelectConfig(m=64),
        train=TrainConfig(batch=4),
    )


@dataclass(frozen=True)
class Peak:
    """What steps over a batch took, in bytes.

    Attributes:
        n: patches of the largest image.
        chunk: I, patches looked at at a time.
        split: kept patches learned from at a time; None is all at once.
        read_ahead: patches that buffers hold.
        logits: of the largest image.
        predicted: peak by the memory plan.
        measured: what counts against the budget: resident on a CPU, reserved by torch on a GPU.
        added: what of it came after the plan was made, when torch's libraries and the model were there already.
        process: peak resident memory.
        device: peak memory allocated on the GPU; 0 without one.
        rate: patches/s.
    """

    n: int
    chunk: int
    split: int | None
    read_ahead: int
    logits: int
    predicted: int
    measured: int
    added: int
    process: int
    device: int
    rate: float


def measure(config: Config, counts: Sequence[int], steps: int = 1) -> Peak:
    """Selection and gradient step over a batch of images of so many patches, in this process, under its memory plan.

    Args:
        config: model, patch, select, train and run are used; patches are features where `model.feature_width` is given.
        counts: patches of each image of a batch; they come through the reader as from files.
        steps: how often.

    Raises:
        ConfigError: the budget is too small.
    """
    device = choose_device(config.run.device)
    cuda = device.type == "cuda"
    shape = patch_shape(config.model, config.patch.size)
    torch.manual_seed(0)
    task = Task("label", "binary", ("no", "yes"))
    model = build_classifier(config.model, [task], config.patch.size, pretrained=False).to(device)
    engine = Engine(
        model,
        config.select,
        config.run,
        arithmetic=choose_precision(config.train.precision, model.encoder, shape),
        warn=lambda text: print(text, file=sys.stderr),
    )
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
    before = taken(device)
    work = Workload(
        patch_shape=shape,
        m=config.select.m,
        batch_size=len(counts),
        largest_bag=max(counts),
        learn=True,
        chunk=fixed_chunk(config.select),
        ahead=config.run.ahead,
        color=False,
        jpeg=False,
    )
    plan = engine.plan = make_plan(engine.encoders, work, config.memory, optimizer)
    engine.choose_compile("on" if config.run.compile == "on" else "off", shape, 0)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.monotonic()
    batches = [[OpenMade(n, shape) for n in counts]] * steps
    with engine.limit(), closing(engine):
        for batch in engine.stream(batches, hold=0):
            bags = engine.fetch(batch, engine.select(batch), together=True)
            engine.backward(bags, lambda logits: logits["label"].square().mean())
            optimizer.step()
            del bags
    process = peak_memory()
    measured = torch.cuda.max_memory_reserved(device) if cuda else process
    return Peak(
        n=max(counts),
        chunk=engine.plan.chunk,
        split=engine.plan.split,
        read_ahead=(config.run.ahead + 2) * plan.chunk,
        logits=4 * model.pool.heads * model.pool.queries * max(counts),
        predicted=plan.peak,
        measured=measured,
        added=measured - before,
        process=process,
        device=torch.cuda.max_memory_allocated(device) if cuda else 0,
        rate=sum(counts) * steps / (time.monotonic() - start),
    )


def measure_apart(config: Config, counts: Sequence[int], steps: int = 1) -> Peak:
    """As `measure`, in a process of its own.

    Raises:
        KeyholeError: what that process said.
    """
    asked = json.dumps({"config": config.model_dump(), "counts": list(counts), "steps": steps}, default=str)
    done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KeyholeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


@dataclass(frozen=True)
class Growth:
    """How much more a number of patches took than the fewest did.

    Attributes:
        peak: of this number.
        base: of the fewest; None for the fewest themselves, and for those fewer than are read ahead.
    """

    peak: Peak
    base: Peak | None

    @property
    def logits(self) -> int:
        """Bytes that the logits grew by."""
        return 0 if self.base is None else self.peak.logits - self.base.logits

    @property
    def grown(self) -> int:
        """Bytes, of the process or of the device, whichever grew more beyond what it may."""
        return 0 if self.base is None else max(self._grown("process"), self._grown("device"))

    @property
    def allowed(self) -> int:
        """Bytes that it may grow by: the logits, once more and with their order while the best are found, and slack."""
        if self.base is None:
            return 0
        slack = max(SLACK_BYTES, round(SLACK_SHARE * max(self.base.process, self.base.device)))
        return 2 * self.logits + SORTING * (self.peak.n - self.base.n) + slack

    @property
    def flat(self) -> bool:
        return self.base is None or self.grown <= self.allowed

    def _grown(self, which: str) -> int:
        return int(getattr(self.peak, which) - getattr(self.base, which))


def growths(peaks: Sequence[Peak], kept: int) -> list[Growth]:
    """Each beside the fewest patches that fill the buffers and from which all `kept` patches of an image come.

    Raises:
        ConfigError: fewer than two such numbers.
    """
    full = [peak for peak in peaks if peak.n >= max(kept, peak.read_ahead)]
    if len(full) < 2:
        least = max(kept, max((peak.read_ahead for peak in peaks), default=0))
        raise ConfigError(f"--patches: give two numbers of {least:,} or more; so many are read ahead or kept")
    return [Growth(peak, full[0] if peak in full[1:] else None) for peak in peaks]


def verdict(found: Sequence[Growth]) -> str:
    """Say whether memory is flat."""
    bad = [each for each in found if not each.flat]
    if not bad:
        return "flat: memory does not grow with the number of patches, but for the logits"
    worst = bad[-1]
    assert worst.base is not None
    return (
        f"not flat: from {worst.base.n:,} to {worst.peak.n:,} patches memory grew by {memory_text(worst.grown)}, and "
        f"may by {memory_text(worst.allowed)}"
    )


def main() -> None:
    asked = json.loads(sys.stdin.read())
    try:
        peak = measure(Config().replace(**asked["config"]), asked["counts"], asked["steps"])
    except KeyholeError as error:
        sys.exit(str(error))
    print(json.dumps(dataclasses.asdict(peak)))


if __name__ == "__main__":
    main()
