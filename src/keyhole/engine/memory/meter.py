"""Measures how much memory a computation needs, and sets what malloc does with freed blocks.

On CUDA the measure is what the allocator reserves. On a CPU it is the resident memory of the process, whose peak Linux
records. Elsewhere the tensors that a computation makes are added up; see `tensor_bytes`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keyhole.util.platform import libc, peak_memory, resident_memory, restart_peak

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
NEVER = 2**31 - 1
BESIDES_TENSORS = 2
"""Factor where only tensors are counted: work space of convolutions and gaps in the heap take up to as much again."""


def taken(device: torch.device) -> int:
    """Return the bytes that count against a budget now: reserved on CUDA, resident on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    give_back()
    return resident_memory()


def comes_in_steps(device: torch.device) -> bool:
    """Return whether `growth` comes in steps: torch's allocator for CUDA reserves 2 or 20 MB at a time."""
    return device.type == "cuda"


def growth(device: torch.device, function: Callable[[], object], repeats: int = 1) -> int:
    """Return the bytes by which the peak of a computation, repeated, exceeds what was taken before it."""
    if device.type == "cuda":
        before = taken(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(repeats):
            function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before
    if not has_peak():
        return BESIDES_TENSORS * tensor_bytes(function)
    before = taken(device)
    restart_peak()
    for _ in range(repeats):
        function()
    return max(0, peak_memory(since_restart=True) - before)


@cache
def has_peak() -> bool:
    """Return whether this system records a peak of resident memory that a process can reset."""
    return restart_peak()


def give_back() -> None:
    """Return freed memory that malloc keeps to the system, with glibc."""
    if (trim := libc("malloc_trim")) is not None:
        trim(0)


def steady_heap(steady: bool = True, limited: bool = False) -> None:
    """Make malloc (glibc) map each block of a tensor's size by itself and return it at once, or keep it in a heap.

    Freed blocks in a heap leave gaps that fit the next ones badly: resident memory is a third above what is in use. But
    the system clears returned pages again for each layer, which took 1.3 to 2.5 times as long with three encoders. So
    `steady`, which returns blocks at once, is for measuring and for small budgets. With `limited`, under a budget that
    the user named, blocks of 32 MB and more are always mapped by themselves.
    """
    if (mallopt := libc("mallopt")) is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20 if steady else 2**25 if limited else 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**24 if steady else 2**26 if limited else NEVER)


def tensor_bytes(function: Callable[[], object]) -> int:
    """Return the peak bytes of the tensors alive at once that a computation makes, without libraries' own memory."""
    with _Alive() as alive:
        function()
    peak: int = alive.peak
    return peak


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, and subtracts them when nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = 0
        self._counted: weakref.WeakSet[object] = weakref.WeakSet()

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._counted:
            return
        self._counted.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes()).atexit = False

    def _remove(self, size: int) -> None:
        self.now -= size
