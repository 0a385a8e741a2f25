"""Runs a process within its memory plan.

On CUDA the allocator gets the budget as its limit. On a CPU there is no limit: `Pace` compares the measured peak with
the budget. Here only malloc and the cache of decoded tiles are set to what the plan counts with.

Several caps may hold at a time and end in any order, as those of two predictions do that are iterated over in turn: the
lowest one that holds is the limit, and after the last one everything is as before the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from keyhole.engine.memory.bill import SHARED_TILES
from keyhole.engine.memory.meter import give_back, steady_heap
from keyhole.engine.memory.plan import Plan
from keyhole.images.tile_cache import TILE_CACHE


@contextmanager
def cap(plan: Plan, device: torch.device) -> Iterator[None]:
    """Keep to the plan's budget inside.

    On a CPU only a budget that the user named counts: `auto` is what seemed free, not a promise.
    """
    if device.type == "cuda":
        with _cap_cuda(plan.budget, device):
            yield
    elif plan.named:
        with _cap_host(plan.steady):
            yield
    else:
        yield


_fractions: dict[int, tuple[float, list[float]]] = {}
"""For each GPU the fraction of its memory that torch had before the first cap, and those of the caps that hold."""


@contextmanager
def _cap_cuda(budget: int, device: torch.device) -> Iterator[None]:
    index = torch.cuda.current_device() if device.index is None else device.index
    fraction = budget / torch.cuda.get_device_properties(index).total_memory
    if index not in _fractions:
        _fractions[index] = torch.cuda.memory.get_per_process_memory_fraction(index), []
    before, held = _fractions[index]
    held.append(fraction)
    try:
        if torch.cuda.memory_reserved(index) > budget:  # else reserved memory is used again by the next call
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(before, *held), index)
        yield
    finally:
        held.remove(fraction)
        torch.cuda.set_per_process_memory_fraction(min([before, *held]), index)
        if not held:
            del _fractions[index]


_steady: list[bool] = []
"""`Plan.steady` of the caps on the CPU that hold."""
_tiles_before = 0
"""`TILE_CACHE.shared_limit` before the first of them."""


@contextmanager
def _cap_host(steady: bool) -> Iterator[None]:
    global _tiles_before
    if not _steady:
        _tiles_before, TILE_CACHE.shared_limit = TILE_CACHE.shared_limit, SHARED_TILES
    _steady.append(steady)
    steady_heap(steady, capped=True)
    give_back()
    try:
        yield
    finally:
        _steady.remove(steady)
        steady_heap(bool(_steady) and _steady[-1], capped=bool(_steady))
        if not _steady:
            TILE_CACHE.shared_limit = _tiles_before
