"""Keeps a process within its memory plan: what goes beyond the budget fails as an allocation error, not later.

On CUDA it is the allocator's own limit. On the CPU it is RLIMIT_DATA, which Linux applies to all writable private
memory. Libraries that end the process when an allocation fails (OpenSlide does) do so under it too; the plan leaves
room, so that this is the last line only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from keyhole.images.recent import RECENT
from keyhole.memory.bill import SHARED_TILES
from keyhole.memory.meter import STATUS, free_in_heap, give_back, status, steady_heap

if TYPE_CHECKING:
    from keyhole.memory.plan import Plan

UNTOUCHED = 2**26
"""Bytes that may be mapped and never touched: stacks of threads, 8 MB each, of which some kB are used."""


@contextmanager
def cap(plan: Plan, device: torch.device) -> Iterator[None]:
    """Inside, no more than the plan's budget can be had; afterwards the limits are as before.

    On the CPU only where the user named the budget: `auto` is what seemed free, not a promise.
    """
    if device.type == "cuda":
        with _cap_cuda(plan.budget, device):
            yield
    elif plan.named and STATUS.exists():
        with _cap_data(plan.budget, plan.steady):
            yield
    else:
        yield


@contextmanager
def _cap_cuda(budget: int, device: torch.device) -> Iterator[None]:
    index = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.memory.get_per_process_memory_fraction(index)
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(before, budget / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


@contextmanager
def _cap_data(budget: int, steady: bool) -> Iterator[None]:
    """The limit is on what is mapped, the budget on what is resident: their difference now is added to it, but for what
    is free within the heap, which may become resident without anything being mapped."""
    import resource

    steady_heap(steady, capped=True)
    give_back()
    shared, RECENT.shared_limit = RECENT.shared_limit, SHARED_TILES
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = status("VmData") - free_in_heap() + max(0, budget - status("VmRSS")) + UNTOUCHED
    known = [each for each in (limit, soft, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        RECENT.shared_limit = shared
        steady_heap(False)
