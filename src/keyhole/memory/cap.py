"""Keeps a process within its memory plan: what goes beyond the budget fails as an allocation error, not later.

On CUDA it is the allocator's own limit. On the CPU it is RLIMIT_DATA, which Linux applies to all writable private
memory. Libraries that end the process when an allocation fails (OpenSlide does) do so under it too; the plan leaves
room, so that this is the last line only.

oneDNN writes code for each shape that it meets, a quarter of a megabyte mapped for each piece, of which a tenth is
touched. Such code is taken for what it is, not for data (`_DataLimit.follow`). Where it cannot be mapped, oneDNN fails
in most places with an error and in some by calling what it has not got, which ends the process; so the operations that
write code find room for it (`room_for_code`): what is beyond the budget is refused before them.
"""

from __future__ import annotations

import math
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from keyhole.images.recent import RECENT
from keyhole.memory.bill import SHARED_TILES
from keyhole.memory.meter import free_in_heap, give_back, mapped_code, steady_heap
from keyhole.memory.process import STATUS, status

if TYPE_CHECKING:
    from keyhole.memory.plan import Plan

UNTOUCHED = 2**26
"""Bytes that may be mapped and never touched: stacks of threads, 8 MB each, of which some kB are used."""
CODE_ROOM = 2**26
"""Bytes of code that one operation may map: some 30 pieces of 256 kB were seen for one strided convolution."""
CODE_TOUCHED = 1 / 8
"""Share of it that becomes resident; a tenth was seen."""


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
    steady_heap(steady, capped=True)
    give_back()
    shared, RECENT.shared_limit = RECENT.shared_limit, SHARED_TILES
    outer = _DataLimit.now
    limit = _DataLimit.now = _DataLimit(budget)
    try:
        yield
    finally:
        limit.lift()
        _DataLimit.now = outer
        RECENT.shared_limit = shared
        steady_heap(False)


def room_for_code() -> AbstractContextManager[object]:
    """Inside, and in this thread, operations under a cap of the CPU that write code fail before them or not at all.

    Code that is compiled (`torch.compile`) would run uncompiled in here.
    """
    return nullcontext() if _DataLimit.now is None else _RoomForCode(_DataLimit.now)


class _DataLimit:
    """RLIMIT_DATA, from now until `lift`.

    It is on what is mapped, the budget on what is resident: their difference now is added to it, but for what is free
    within the heap, which may become resident without anything being mapped.

    Attributes:
        now: the one that holds for the process, if any.
        seen: operations with the shapes of their arguments, whose code is counted.
    """

    now: ClassVar[_DataLimit | None] = None

    def __init__(self, budget: int) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_DATA)
        self.seen: set[tuple[Any, ...]] = set()
        self._lock, self._more = threading.Lock(), 0
        self._code = self._code_then = mapped_code()
        self._limit = status("VmData") - free_in_heap() + max(0, budget - status("VmRSS")) + UNTOUCHED
        self._set()

    def lift(self) -> None:
        """Sets the limit as it was before."""
        resource.setrlimit(resource.RLIMIT_DATA, self._before)

    def follow(self) -> None:
        """Adds what oneDNN has mapped meanwhile and not touched."""
        code = mapped_code()
        with self._lock:
            self._code = code
            self._set()

    @contextmanager
    def more(self, size: int) -> Iterator[None]:
        """Inside, so many bytes more can be had."""
        with self._lock:
            self._more += size
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._more -= size
                self._set()

    def _set(self) -> None:
        code = int((self._code - self._code_then) * (1 - CODE_TOUCHED))
        soft, hard = self._before
        known = [each for each in (self._limit + code + self._more, soft, hard) if each != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))


class _BeforeEach:
    """What `_RoomForCode` does at each operation.

    In a class of its own, since torch imports its compiler (160 MB resident) to wrap this method where it is defined in
    the mode's.
    """

    limit: _DataLimit

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ):
        sizes = result_sizes(func.overloadpacket, *args)
        if sizes is None:
            return func(*args, **(kwargs or {}))
        given = [each for each in args if isinstance(each, Tensor)]
        shapes = (func, *[(tuple(each.shape), each.dtype) for each in given])
        _must_fit(sizes)
        # besides its result and code it may need each tensor in another layout
        with self.limit.more(CODE_ROOM + sum(sizes) + sum(each.nbytes for each in given)):
            result = func(*args, **(kwargs or {}))
            if shapes not in self.limit.seen:
                self.limit.seen.add(shapes)
                self.limit.follow()
        return result


class _RoomForCode(_BeforeEach, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees operations between autograd and their kernels."""

    def __init__(self, limit: _DataLimit) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit


def result_sizes(operation: Any, *args: Any) -> list[int] | None:
    """Bytes of each tensor that an operation of `torch.ops.aten` will return; None of those that write no code."""
    sizes = _WRITES_CODE.get(operation)
    return None if sizes is None else sizes(*args)


def _must_fit(sizes: list[int]) -> None:
    """Fails as an operation would that returns tensors of so many bytes."""
    tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    del tensors


def _convolution(
    given: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[int]:
    n, _, *space = given.shape
    kernel = weight.shape[2:]
    if transposed:
        channels = weight.shape[1] * groups
        sides = [
            (side - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + output_padding[i] + 1
            for i, side in enumerate(space)
        ]
    else:
        channels = weight.shape[0]
        sides = [(s + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i, s in enumerate(space)]
    return [n * channels * math.prod(sides) * given.element_size()]


def _convolution_backward(gradient: Tensor, given: Tensor, weight: Tensor, *rest: Any) -> list[int]:
    needed = rest[-1]
    return [each.nbytes for each, needs in zip((given, weight), needed, strict=False) if needs]


def _product(left: Tensor, right: Tensor) -> list[int]:
    return [math.prod(left.shape[:-1]) * right.shape[-1] * left.element_size()]


_WRITES_CODE: dict[Any, Callable[..., list[int]]] = {
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten.mm: _product,
    torch.ops.aten.bmm: _product,
    torch.ops.aten.addmm: lambda _, left, right: _product(left, right),
    torch.ops.aten.baddbmm: lambda _, left, right: _product(left, right),
}
"""The operations that write code, and what they return."""
