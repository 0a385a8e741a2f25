"""Makes the memory plan: how many patches at a time the two passes take, so that a run stays within its budget.

    --memory 5GB  ->  select I patches at a time; learn from the B x M kept ones at once, or in chunks

A probe measures what a patch costs in each pass; the rest is counted. The largest chunks that fit are taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from keyhole.config.settings import Config, SelectConfig
from keyhole.engine.encoders import Encoders
from keyhole.engine.memory.bill import MARGIN, MAX_HELD_BYTES, Bill, power_below, powers
from keyhole.engine.memory.meter import steady_heap, taken
from keyhole.engine.memory.probe import FIRST_PATCHES, Probe, Workload
from keyhole.errors import ConfigError
from keyhole.nn.build import patch_shape
from keyhole.nn.selection import RULES
from keyhole.util.budget import explained, memory_text, out_of_memory
from keyhole.util.platform import available_memory

CPU_CHUNK = 64
"""Fewest patches at a time on a CPU: larger chunks of large patches are not faster, and results should not depend on
the memory of the moment."""
CPU_CHUNK_PIXELS = 2**20
"""Pixels up to which a chunk on a CPU has more of them: a chunk costs a millisecond whatever it holds. With patches of
50 px and the encoder `small`, 256 at a time take half the time of 64."""
MAX_CPU_CHUNK = 512
MAX_GPU_CHUNK = 1024
"""Patches at a time on a GPU, more where they are small."""
GPU_CHUNK_PIXELS = 2**25
"""Pixels up to which a chunk on a GPU has more patches: launching the work on a chunk costs milliseconds whatever it
holds. With patches of 50 px on an H200 steps took 82 ms with chunks of 1,024 and 60 ms with 7,200."""
CHUNK_PARTS = 8
"""A chunk on a GPU that is not full is encoded in a number of rows that is a multiple of one of these parts."""
GPU_CHUNK_BYTES = 2**27
"""Bytes of them as read: 512 patches of 256 px in RGB, since a GPU's JPEG decoder needs hundreds of images per call.
The host has `ahead` + 2 pinned buffers of this size, which no budget counts. No GPU has confirmed the figure yet."""
MAX_GPU_FEATURES = 2**16
"""Stored features at a time on a GPU, where a small chunk costs more to launch than to compute. Those of more than 512
numbers reach GPU_CHUNK_BYTES before."""
AUTO_SHARE = 0.8
"""Share of the free memory that `auto` takes: other processes need some too."""
GPU_RESERVE = 2**28
"""Bytes of a GPU that `auto` leaves at least, for libraries that allocate beside torch."""
HEAP_GAPS = 1.5
"""Resident memory over memory in use where malloc keeps what is freed: 1.2 to 1.75 in whole runs
(benchmarks/host_memory.py)."""
FIRST_STEPS_BYTES = 24 * 2**20
"""What the first steps leave in a process on a CPU for good: pages of code, plans of kernels, small caches."""
SHARED_TILE_BYTES = 2**25
"""Decoded tiles that are kept for later patches where the user has named a budget: rows of 170 tiles of 256 px in RGB.
Of wider rows in a grid that is not aligned, some tiles are decoded twice."""
MAX_PREDICTED_PATCHES = 250_000
"""Largest image of a plan for predicting, in patches."""

Step = Literal["select", "learn", "both"]


@dataclass(frozen=True)
class Plan:
    """How memory is used."""

    chunk: int = 64  # I, patches of the pass without gradients at a time
    split: int | None = None  # kept patches of the gradient step at a time; None is all at once
    kept: int = 0  # B x M, the most patches that a gradient step learns from; 0 without one
    budget: int = 0  # bytes; on a CPU of the whole process, on CUDA of torch's allocator
    source: str = ""  # where the budget comes from
    named: bool = False  # the user gave the budget
    peak: int = 0  # bytes predicted
    # bytes of pixels up to which a batch stays in host memory, so that its kept patches are not read again; the next
    # batch may hold as many
    hold: int = 0
    # memory is so scarce that freed blocks are returned at once, which is slower; see `steady_heap`
    steady: bool = False
    device: str = ""  # type of the device that it was made for, "cpu" or "cuda"; "" if unknown

    def describe(self) -> str:
        """Return the plan as one line of text."""
        said = [f"memory: {memory_text(self.budget)} ({self.source})", f"selecting {self.chunk:,} patches at a time"]
        if self.kept:
            how = "at once" if self.split is None else f"in chunks of {self.split:,}"
            said[1] += f", learning from {self.kept:,} kept patches {how}"
        return "; ".join([*said, f"predicted peak {memory_text(self.peak)}"])

    def halved(self, step: Step = "both") -> Plan | None:
        """Return the plan with a smaller `step`, which ran out of memory; None if it cannot be smaller."""
        chunk, split = self.chunk, self.split
        if step != "learn":
            chunk = max(1, chunk // 2)
        if step != "select" and self.kept > 3:
            split = power_below(self.kept) if split is None else max(2, split // 2)
        smaller = dataclasses.replace(self, chunk=chunk, split=split)
        return None if smaller == self else smaller

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        return cls(**data)


class OptionNames(NamedTuple):
    """The options of a command that change how much memory it needs, for messages; "" if it does not have one."""

    encoder: str = "--model.encoder"
    patch: str = "--patch.size"
    kept: str = "--select.m and --train.batch"
    cache: str = "--data.cache"
    chunk: str = "--select.chunk"
    device: str = "--run.device"

    def lower(self) -> str:
        """Return what to lower, after `raise --memory`."""
        kept = self.kept.split()[0] if self.kept else ""
        named = [name for name in (self.patch, kept) if name]
        if self.encoder:
            named.append("the encoder's size")
        return f"raise --memory, or lower {', '.join(named[:-1])} or {named[-1]}" if named else "raise --memory"


TRAINING_OPTIONS = OptionNames()
PREDICTING_OPTIONS = OptionNames(encoder="", patch="", kept="", cache="", chunk="", device="--device")


def make_plan(
    encoders: Encoders,
    work: Workload,
    memory: int | None,
    optimizer: torch.optim.Optimizer | None = None,
    options: OptionNames = TRAINING_OPTIONS,
) -> Plan:
    """Probe the model, which stays as it was, and choose the largest chunks that fit.

    Args:
        encoders: of the model.
        work: what is planned for.
        memory: budget in bytes; None takes what is free.
        optimizer: what it holds already, in a resumed run, is not counted twice.
        options: named when nothing fits.

    Raises:
        ConfigError: nothing fits; says what would.
    """
    model, device = encoders.model, encoders.device
    budget, source = _budget(memory, device)
    cpu, named = device.type == "cpu", memory is not None
    batch = work.batch_size * work.largest_bag  # patches
    most = work.chunk or largest_chunk(device, work.patch_shape, batch if work.learn else None)
    chunks = [work.chunk] if work.chunk else [size for size in powers(most) if size < most] + [most]
    try:
        with _measuring(cpu):
            costs = Probe(encoders, work).measure(most, budget - taken(device))
            now = taken(device) + (FIRST_STEPS_BYTES if cpu else 0)
    except Exception as error:
        if not out_of_memory(error):
            raise
        patches = f"{FIRST_PATCHES} patches of {'x'.join(map(str, work.patch_shape))}"
        said = f"--memory: {memory_text(budget)} ({source}) does not hold the model and {patches}"
        smaller = [f"a smaller {name}" for name in (options.encoder, options.patch) if name]
        advice = f"choose {' or '.join(smaller)}" if smaller else "raise it"
        raise ConfigError(explained(error, said, advice, options.encoder, options.device)) from error
    trained = [parameter for parameter in model.parameters() if work.learn and parameter.requires_grad]
    weights = sum(parameter.nbytes for parameter in trained)
    gradients = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    bill = Bill(
        work,
        costs,
        cpu,
        now,
        training=max(0, 3 * weights - gradients - state_bytes(optimizer)),
        stepping=weights if cpu else 0,  # AdamW is fused on a GPU
        scores=model.pool.heads * model.pool.queries,
        tiles=SHARED_TILE_BYTES if named and work.pixels else 0,
        gaps=HEAP_GAPS if cpu else 1.0,
    )
    # under a named budget, a heap with gaps is for plans that lack nothing
    sizes = bill.best(budget, [most] if cpu and named else chunks)
    steady = cpu and named and (sizes is None or sizes[1] is not None)
    if steady:
        bill = dataclasses.replace(bill, gaps=1.0)
        sizes = bill.best(budget, chunks)
    if sizes is None:
        raise _too_little(memory_text(budget) if named else f"{memory_text(budget)} ({source})", bill, options)
    left = budget - bill.wanted(*sizes) if cpu else round(AUTO_SHARE * available_memory())
    hold = batch * work.patch_bytes
    if work.host_buffers or hold > MAX_HELD_BYTES or round(2 * hold * (1 + MARGIN)) > left:
        hold = 0  # decoded images that stay in memory are not read again anyway
    peak = bill.peak(*sizes) + (2 * hold if cpu else 0)
    return Plan(*sizes, bill.kept if work.learn else 0, budget, source, named, peak, hold, steady, device.type)


def prediction_plan(encoders: Encoders, config: Config) -> Plan:
    """Return the plan of a model that predicts; it is measured only where memory is limited."""
    memory = config.memory
    if memory is None and encoders.device.type != "cuda":
        return unlimited(config.select, patch_shape(config.model, config.patch.size))
    work = Workload(
        patch_shape=patch_shape(config.model, config.patch.size),
        m=config.select.m,
        batch_size=config.train.batch,
        largest_bag=MAX_PREDICTED_PATCHES,
        chunk=fixed_chunk(config.select),
        ahead=config.run.ahead,
        jpeg=config.run.decode == "auto",
    )
    return make_plan(encoders, work, memory, options=PREDICTING_OPTIONS)


def fixed_chunk(select: SelectConfig) -> int | None:
    """Return how many patches are encoded at once if the user has fixed it; the `chunk` of "streaming" is another."""
    return None if RULES[select.rule].own_chunk else select.chunk


def unlimited(select: SelectConfig, shape: Sequence[int] = ()) -> Plan:
    """Return a plan for callers who know what fits: chunks as configured, and no limit."""
    return Plan(chunk=fixed_chunk(select) or cpu_chunk(shape), hold=MAX_HELD_BYTES)


def cpu_chunk(shape: Sequence[int]) -> int:
    """Return how many patches of a shape as read are encoded at a time on a CPU."""
    fitting = CPU_CHUNK_PIXELS // math.prod(shape[:2]) if len(shape) > 1 else 0
    return min(MAX_CPU_CHUNK, power_below(max(CPU_CHUNK, fitting) + 1))


@contextmanager
def _measuring(cpu: bool) -> Iterator[None]:
    """Let malloc return freed blocks at once inside, on a CPU, so that the measured memory is what is in use."""
    if cpu:
        steady_heap()
    try:
        yield
    finally:
        if cpu:
            steady_heap(False)


def largest_chunk(device: torch.device, shape: Sequence[int], patches: int | None = None) -> int:
    """Return how many patches of a shape as read are worth taking at a time, whatever the budget is.

    A GPU encodes all rows of a chunk. So chunks share the patches of the largest batch evenly, if these are known.
    """
    if device.type == "cpu":
        return cpu_chunk(shape)
    pixels = len(shape) > 1
    patch_bytes = math.prod(shape) * (1 if pixels else 4)
    small = power_below(max(2, GPU_CHUNK_PIXELS // math.prod(shape[:2])) + 1)
    most = max(MAX_GPU_CHUNK, small) if pixels else MAX_GPU_FEATURES
    most = min(most, power_below(max(2, GPU_CHUNK_BYTES // patch_bytes) + 1))
    if patches is None:
        return most
    even = -(-patches // -(-patches // most))
    return min(most, -(-even // CHUNK_PARTS) * CHUNK_PARTS)  # so that each part of a chunk has as many rows


def _budget(memory: int | None, device: torch.device) -> tuple[int, str]:
    if memory is not None:
        return memory, "--memory"
    if device.type == "cuda":
        taken(device)  # what torch holds back counts as free
        free = torch.cuda.mem_get_info(device)[0]
        budget = free - max(GPU_RESERVE, free // 20) + torch.cuda.memory_reserved(device)
        return budget, f"auto, {memory_text(free)} free on {torch.cuda.get_device_name(device)}"
    free = available_memory()
    return taken(device) + round(AUTO_SHARE * free), f"auto, {AUTO_SHARE:.0%} of {memory_text(free)} free"


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    if optimizer is None:
        return 0
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(int(value.nbytes) for value in values if isinstance(value, torch.Tensor))


def _too_little(given: str, bill: Bill, options: OptionNames) -> ConfigError:
    """Say what would fit, and what to lower, the largest share first."""
    work, costs, chunk = bill.work, bill.costs, bill.work.chunk or 1
    need = bill.wanted(chunk, bill.splits()[1] if len(bill.splits()) > 1 else None)
    embeddings = costs.pool(work.kept) + 8 * bill.kept * costs.dim
    pixels = min(MAX_HELD_BYTES, work.patch_bytes * bill.kept) if bill.cpu else 0
    shares = {
        options.encoder: bill.training + bill.stepping,
        options.patch: costs.learn(3) if work.learn else costs.score(chunk),
        options.kept: embeddings + pixels + (work.open_pictures if bill.cpu else 0),
        options.cache: bill.host,
        options.chunk if work.chunk else "": costs.score(chunk) + bill.read(chunk),
    }
    names = [name for name in sorted(shares, key=lambda name: shares[name], reverse=True) if name]
    smaller = f", or a smaller {' or '.join(names[:2])}, which need most" if names else ""
    return ConfigError(
        f"--memory: {given} is too little for these settings even in the smallest steps; give --memory "
        f"{memory_text(need, up=True)} or more ({memory_text(bill.now)} are taken before the first step){smaller}"
    )
