"""The memory plan: how many patches at a time the two passes take, so that a run stays within its budget.

    --memory 5GB  ->  select I patches at a time; learn from the B x M kept ones at once, or in chunks

A probe measures what a patch costs in each pass; the rest is counted. The largest chunks that fit are taken.

Letters: b image, m kept, h head, t query, n patches of an image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from keyhole.engine.memory.bill import (
    HELD_BYTES,
    MARGIN,
    SHARED_TILES,
    Bill,
    power_below,
    powers,
)
from keyhole.engine.memory.meter import steady_heap, taken
from keyhole.engine.memory.probe import SMALLEST, probe
from keyhole.errors import ConfigError
from keyhole.nn import IPSClassifier
from keyhole.patches.image_cache import available_bytes
from keyhole.util.budget import explained, memory_text, out_of_memory

CPU_CHUNK = 64
"""More patches at a time are not faster on a CPU, and results should not depend on the memory of the moment."""
GPU_CHUNK = 1024
"""Most patches at a time on a GPU."""
GPU_CHUNK_BYTES = 2**27
"""Most bytes of them as read: 512 patches of 256 px in RGB. A GPU's JPEG decoder wants hundreds of pictures a call, and
gets those of a chunk that the host has not decoded. The host has `ahead` + 2 pinned buffers of this size, 0.8 GB, which
no budget counts; with twice as much they would be a tenth of the memory of a machine with 16 GB. The copies on the GPU
are in the plan, which takes fewer patches where they do not fit. No GPU has confirmed the choice yet: set this to 2**26
or 2**28 to compare. `select.chunk` sets the number of patches itself."""
GPU_FEATURES = 2**16
"""Most stored features at a time on a GPU: the work on one is small, so that launching it would cost more. Those of
more than 512 numbers reach GPU_CHUNK_BYTES before: 16,384 of 2,048 numbers, whose copy to the GPU takes some 2.5 ms."""
BUFFERS, DECODED, TURNED = 2, 3, 1
"""Copies of a chunk as read that a GPU holds: two buffers; where its patches are decoded there, what the decoder gives,
the same in one tensor, and that of the chunk before; and one more where decoded patches are turned."""
STAGED_FEATURES = 3
"""The same for stored features: two buffers, which are half as large for float16, and then two copies in float32."""
SHARE = 0.8
"""Share of the free memory that `auto` takes: other processes need some too."""
RESERVE = 2**28
"""Bytes of a GPU that `auto` leaves at least, for libraries that allocate beside torch."""
GAPS = 1.5
"""Resident memory over memory in use, where malloc keeps what is freed in a heap: 1.2 to 1.75 in whole runs, most of it
from the second epoch on, when blocks of other sizes have left their gaps (benchmarks/host_memory.py)."""
LATER = 24 * 2**20
"""What the first steps leave in a process on the CPU for good: pages of code, plans of kernels, small caches."""

Step = Literal["select", "learn", "both"]


@dataclass(frozen=True)
class Plan:
    """How memory is used.

    Attributes:
        chunk: I, patches of the pass without gradients at a time.
        split: kept patches of the gradient step at a time; None is all at once.
        kept: B x M, the most a gradient step learns from; 0 where nothing is learned.
        budget: bytes; on the CPU of the whole process, on CUDA of torch's allocator.
        source: where the budget comes from.
        named: the user gave the budget.
        peak: bytes predicted.
        hold: bytes of pixels up to which a batch stays in host memory, so that what is kept of it is not read again;
            the batch after it may hold as many.
        steady: memory is so scarce that freed blocks are given back at once, at some cost in speed; see `steady_heap`.
        device: kind of device that it was made for, "cpu" or "cuda"; "" where that is not known.
    """

    chunk: int = 64
    split: int | None = None
    kept: int = 0
    budget: int = 0
    source: str = ""
    named: bool = False
    peak: int = 0
    hold: int = 0
    steady: bool = False
    device: str = ""

    def describe(self) -> str:
        """One line for people."""
        said = [f"memory: {memory_text(self.budget)} ({self.source})", f"selecting {self.chunk:,} patches at a time"]
        if self.kept:
            how = "at once" if self.split is None else f"in chunks of {self.split:,}"
            said[1] += f", learning from {self.kept:,} kept patches {how}"
        return "; ".join([*said, f"predicted peak {memory_text(self.peak)}"])

    def halved(self, step: Step = "both") -> Plan | None:
        """The plan for when a step ran out of memory all the same; None where it cannot be smaller.

        Args:
            step: which pass it was; the other keeps its size.
        """
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


def make_plan(
    model: IPSClassifier,
    *,
    patch_shape: Sequence[int],
    m: int,
    batch: int,
    device: torch.device,
    memory: int | None,
    chunk: int | None = None,
    host_buffers: int = 0,
    open_pictures: int = 0,
    largest_bag: int,
    learn: bool,
    ahead: int = 4,
    color: bool = True,
    keep_logits: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    predicts: bool = False,
    jpeg: bool = True,
    turned: bool = False,
) -> Plan:
    """Probes the model and chooses. The model is left as it was.

    Args:
        model: on `device`.
        patch_shape: of one patch as it is read: (s, s, c) uint8, or (f,) float32.
        m: patches to keep of an image.
        batch: images of a step (B).
        device: where the model is.
        memory: budget in bytes, see `parse_memory`; None takes what is free.
        chunk: patches at a time in the pass without gradients, where the user has fixed them.
        host_buffers: bytes that the host will hold besides what follows from the other arguments, such as decoded
            images that stay in memory; they count on the CPU.
        open_pictures: bytes of pictures that are decoded whole, as many as are open at a time; they count on the CPU.
        largest_bag: patches of the largest image.
        learn: whether there is a gradient step; else only selection and a forward of the kept.
        ahead: chunks read ahead.
        color: whether training changes colours.
        keep_logits: whether the logits of all images of a batch are kept, as a prediction does.
        optimizer: if it has a state already (a resumed run), that is not counted twice.
        predicts: whether a prediction of batches of such images follows the last gradient step.
        jpeg: whether patches may come as JPEG, for a GPU to decode.
        turned: whether patches are flipped or rotated.

    Raises:
        ConfigError: not even the smallest plan fits; the message says what would.
    """
    budget, source = _budget(memory, device)
    cpu, named = device.type == "cpu", memory is not None
    patch_bytes = math.prod(patch_shape) * (1 if len(patch_shape) > 1 else 4)
    most = chunk or largest_chunk(device, patch_shape, batch * largest_bag if learn else None)
    chunks = [chunk] if chunk else powers(most)
    if cpu:
        steady_heap()
    try:
        kept, changed = min(m, largest_bag), learn and color
        costs = probe(
            model,
            patch_shape,
            images=batch,
            m=kept,
            chunk=most,
            learn=learn,
            color=changed,
            room=budget - taken(device),
        )
        now = taken(device) + (LATER if cpu else 0)
    except Exception as error:
        if not out_of_memory(error):
            raise
        patches = f"{SMALLEST} patches of {'x'.join(map(str, patch_shape))}"
        said = f"--memory: {memory_text(budget)} ({source}) does not hold the model and {patches}"
        raise ConfigError(
            explained(error, said, "choose a smaller --model.encoder or a smaller --patch.size")
        ) from error
    finally:
        if cpu:
            steady_heap(False)
    trained = [parameter for parameter in model.parameters() if learn and parameter.requires_grad]
    weights = sum(parameter.nbytes for parameter in trained)
    gradients = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    logits = 4 * model.pool.heads * model.pool.queries * largest_bag
    bill = Bill(
        costs=costs,
        now=now,
        training=max(0, 3 * weights - gradients - _state_bytes(optimizer)),
        stepping=weights,
        patch=patch_bytes if cpu else 0,
        buffers=ahead + 2,
        host=host_buffers + (SHARED_TILES if named and len(patch_shape) > 1 else 0) if cpu else 0,
        logits=logits,
        finishing=logits + 32 * largest_bag,
        images=batch if keep_logits else 1,
        predicted=batch if predicts else 0,
        m=kept,
        kept=batch * kept,
        learn=learn,
        gaps=GAPS if cpu else 1.0,
        staged=0 if cpu else _staged(len(patch_shape) > 1, jpeg, turned) * patch_bytes,
        pictures=open_pictures if cpu else 0,
    )
    # with a budget of the user's, a heap with gaps is for plans that lack nothing
    sizes = bill.best(budget, [most] if cpu and named else chunks)
    steady = cpu and named and (sizes is None or sizes[1] is not None)
    if steady:
        bill = dataclasses.replace(bill, gaps=1.0)
        sizes = bill.best(budget, chunks)
    if sizes is None:
        given = memory_text(budget) if named else f"{memory_text(budget)} ({source})"
        raise _too_little(given, bill, chunk)
    left = budget - bill.wanted(*sizes) if cpu else round(SHARE * available_bytes())
    # images that stay in memory decoded are not read again anyway
    hold = 0 if host_buffers else _hold(batch * largest_bag * patch_bytes, left)
    peak = bill.peak(*sizes) + (2 * hold if cpu else 0)
    return Plan(*sizes, bill.kept if learn else 0, budget, source, named, peak, hold, steady, device.type)


def largest_chunk(device: torch.device, patch_shape: Sequence[int], patches: int | None = None) -> int:
    """Patches that are worth taking at a time, whatever the budget is.

    Args:
        device: where the model is.
        patch_shape: of one patch as it is read: (s, s, c) pixels, or (f,) features.
        patches: of the largest batch, where that is known: a GPU encodes all of a chunk, so that none should be larger.
    """
    if device.type == "cpu":
        return CPU_CHUNK
    pixels = len(patch_shape) > 1
    patch_bytes = math.prod(patch_shape) * (1 if pixels else 4)
    most = min(GPU_CHUNK if pixels else GPU_FEATURES, power_below(max(2, GPU_CHUNK_BYTES // patch_bytes) + 1))
    return most if patches is None else min(most, 2 * power_below(max(2, patches)))


def _staged(pixels: bool, jpeg: bool, turned: bool) -> int:
    """Copies of a chunk as read that a GPU holds."""
    if not pixels:
        return STAGED_FEATURES
    return BUFFERS + (DECODED + (TURNED if turned else 0) if jpeg else 0)


def _hold(batch: int, left: int) -> int:
    """`batch`, the bytes of one, where two of them fit into what is left; else nothing."""
    return batch if batch <= HELD_BYTES and round(2 * batch * (1 + MARGIN)) <= left else 0


def _budget(memory: int | None, device: torch.device) -> tuple[int, str]:
    if memory is not None:
        return memory, "--memory"
    if device.type == "cuda":
        taken(device)  # what torch holds back counts as free
        free = torch.cuda.mem_get_info(device)[0]
        budget = free - max(RESERVE, free // 20) + torch.cuda.memory_reserved(device)
        return budget, f"auto, {memory_text(free)} free on {torch.cuda.get_device_name(device)}"
    free = available_bytes()
    return taken(device) + round(SHARE * free), f"auto, {SHARE:.0%} of {memory_text(free)} free"


def _state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    if optimizer is None:
        return 0
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(int(value.nbytes) for value in values if isinstance(value, torch.Tensor))


def _too_little(given: str, bill: Bill, chunk: int | None) -> ConfigError:
    """What would fit, and what to lower, the largest share first."""
    need = bill.wanted(chunk or 1, bill.splits()[1] if len(bill.splits()) > 1 else None)
    embeddings = bill.costs.pool(bill.m) + 8 * bill.kept * bill.costs.dim
    shares = {
        "--model.encoder": bill.training + bill.stepping,
        "--patch.size": bill.costs.learn(3) if bill.learn else bill.costs.score(chunk or 1),
        "--select.m and --train.batch": embeddings + min(HELD_BYTES, bill.patch * bill.kept) + bill.pictures,
        "--data.cache": bill.host,
    }
    if chunk is not None:
        shares["--select.chunk"] = bill.costs.score(chunk) + bill.buffers * chunk * bill.patch
    first, second = sorted(shares, key=lambda name: shares[name], reverse=True)[:2]
    return ConfigError(
        f"--memory: {given} is too little for these settings even in the smallest steps; give --memory "
        f"{memory_text(need, up=True)} or more ({memory_text(bill.now)} are taken before the first step), or a smaller "
        f"{first}, then {second}"
    )
