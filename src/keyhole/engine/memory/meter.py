"""How much memory a computation needs beyond what is taken already: measured, not reasoned.

On CUDA it is what the allocator reserves. On the CPU it is the process's resident memory, whose peak Linux keeps and
lets a process reset; freed memory that malloc holds back is given up before each measurement, so that it is not reused
unseen. Where there is no such peak (macOS, or a container that forbids it) the tensors that a computation makes are
added up instead; see `tensor_bytes`.
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
BESIDES_TENSORS = 2
"""Where only tensors are counted: work space of convolutions and gaps in the heap took up to as much again on Linux."""


def taken(device: torch.device) -> int:
    """Bytes that count against a budget now: reserved on CUDA, resident on the CPU (its peak without /proc)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)
    give_back()
    return resident_memory()


def comes_in_steps(device: torch.device) -> bool:
    """Whether `growth` is a multiple of some size: torch's allocator for CUDA reserves 2 or 20 MB at a time."""
    return device.type == "cuda"


def growth(device: torch.device, function: Callable[[], object], repeats: int = 1) -> int:
    """Bytes by which the peak of a computation, made so many times, exceeds what was taken before it."""
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
    """Whether this system keeps a peak of resident memory that a process may restart."""
    return restart_peak()


def give_back() -> None:
    """Hands memory that is free within malloc back to the system, where malloc can (glibc)."""
    trim = libc("malloc_trim")
    if trim is not None:
        trim(0)


def steady_heap(steady: bool = True, capped: bool = False) -> None:
    """Lets malloc (glibc) map every block of a tensor's size by itself and give it back at once, or keep it in a heap.

    In a heap, freed blocks leave gaps that fit the next ones badly: resident memory is a third above what is in use.
    Giving them back means that the system clears every page anew for each layer: in trials of three encoders that took
    1.3 to 2.5 times as long. So it is for measuring, and for who has little memory.

    Under a budget that the user named (`capped`), blocks of 32 MB and more are mapped by themselves too.
    """
    mallopt = libc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20 if steady else 2**25 if capped else 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**24 if steady else 2**26 if capped else 2**31 - 1)  # 2**31 - 1: never


def tensor_bytes(function: Callable[[], object]) -> int:
    """Peak bytes of the tensors alive at once that a computation makes; not what libraries allocate for themselves."""
    with _Alive() as alive:
        function()
    peak: int = alive.peak
    return peak


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, and takes them off again once nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = 0
        self._known: weakref.WeakSet[object] = weakref.WeakSet()

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes()).atexit = False

    def _remove(self, size: int) -> None:
        self.now -= size
