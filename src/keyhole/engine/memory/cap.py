"""Keeps a process within its memory plan: what goes beyond the budget fails as an allocation error, not later.

On CUDA it is the allocator's own limit. On the CPU it is RLIMIT_DATA, which Linux applies to all writable private
memory. Libraries that end the process when an allocation fails (OpenSlide does) do so under it too; the plan leaves
room, so that this is the last line only.

oneDNN writes code for each shape that it meets, a quarter of a megabyte mapped for each piece, of which a tenth is
touched. Such code is taken for what it is, not for data (`_DataLimit.follow`). Where it cannot be mapped, oneDNN fails
in most places with an error and in some by calling what it has not got, which ends the process; so the operations that
write code find room for it (`room_for_code`): what is beyond the budget is refused before them.

Caps may overlap and end in any order, as those of two predictions do that are iterated over in turn: the lowest of
those that have not ended holds, and after the last one the limit is as it was before the first.
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

from keyhole.engine.memory.bill import SHARED_TILES
from keyhole.engine.memory.meter import free_in_heap, give_back, mapped_code, steady_heap
from keyhole.images.recent import RECENT
from keyhole.util.process import STATUS, status

if TYPE_CHECKING:
    from keyhole.engine.memory.plan import Plan

UNTOUCHED = 2**26
"""Bytes that may be mapped and never touched: stacks of threads, 8 MB each, of which some kB are used."""
CODE_ROOM = 2**26
"""Bytes of code that one operation may map: some 30 pieces of 256 kB were seen for one strided convolution."""
CODE_TOUCHED = 1 / 8
"""Share of it that becomes resident; a tenth was seen."""


@contextmanager
def cap(plan: Plan, device: torch.device) -> Iterator[None]:
    """Inside, no more than the plan's budget can be had; after the last cap the limits are as before the first.

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


_SHARES: dict[int, tuple[float, list[float]]] = {}
"""By GPU: the share of its memory that torch could have before the first cap, and those of the caps that hold."""


@contextmanager
def _cap_cuda(budget: int, device: torch.device) -> Iterator[None]:
    index = torch.cuda.current_device() if device.index is None else device.index
    share = budget / torch.cuda.get_device_properties(index).total_memory
    if index not in _SHARES:
        _SHARES[index] = torch.cuda.memory.get_per_process_memory_fraction(index), []
    before, held = _SHARES[index]
    held.append(share)
    try:
        if torch.cuda.memory_reserved(index) > budget:  # else what torch holds back serves, as for call after call
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(before, *held), index)
        yield
    finally:
        held.remove(share)
        torch.cuda.set_per_process_memory_fraction(min([before, *held]), index)
        if not held:
            del _SHARES[index]


@contextmanager
def _cap_data(budget: int, steady: bool) -> Iterator[None]:
    steady_heap(steady, capped=True)
    give_back()
    limit = _DataLimit(budget, steady)
    try:
        yield
    finally:
        limit.lift()
        rest = _DataLimit.now()
        steady_heap(rest is not None and rest.steady, capped=rest is not None)


def room_for_code() -> AbstractContextManager[object]:
    """Inside, and in this thread, operations under a cap of the CPU that write code fail before them or not at all.

    Code that is compiled (`torch.compile`) would run uncompiled in here.
    """
    limit = _DataLimit.now()
    return nullcontext() if limit is None else _RoomForCode(limit)


class _DataLimit:
    """RLIMIT_DATA, from now until `lift`.

    It is on what is mapped, the budget on what is resident: their difference now is added to it, but for what is free
    within the heap, which may become resident without anything being mapped.

    Attributes:
        steady: see `Plan.steady`.
        seen: operations with the shapes of their arguments, whose code is counted.
    """

    _held: ClassVar[list[_DataLimit]] = []  # those that hold for the process
    _lock: ClassVar[threading.Lock] = threading.Lock()
    _more: ClassVar[int] = 0
    _code: ClassVar[int] = 0  # bytes of code mapped so far
    _tiles: ClassVar[int] = 0  # `RECENT.shared_limit` before the first
    _before: ClassVar[tuple[int, int]]

    def __init__(self, budget: int, steady: bool) -> None:
        self.steady = steady
        self.seen: set[tuple[Any, ...]] = set()
        kind = type(self)
        with self._lock:
            if not self._held:
                kind._before = resource.getrlimit(resource.RLIMIT_DATA)
                kind._tiles, RECENT.shared_limit = RECENT.shared_limit, SHARED_TILES
            kind._code = self._code_then = mapped_code()
            # Never below what is mapped: what the heap holds free is of no use to a new thread. It would not begin, and
            # whoever started it would wait for it for ever.
            mapped = status("VmData")
            self._limit = max(mapped, mapped - free_in_heap() + max(0, budget - status("VmRSS"))) + UNTOUCHED
            self._held.append(self)
            self._set()

    @classmethod
    def now(cls) -> _DataLimit | None:
        """The last one that holds."""
        with cls._lock:
            return cls._held[-1] if cls._held else None

    def lift(self) -> None:
        """What others allow is the limit then, or what it was before the first."""
        with self._lock:
            self._held.remove(self)
            if not self._held:
                RECENT.shared_limit = self._tiles
            self._set()

    def follow(self) -> None:
        """Adds what oneDNN has mapped meanwhile and not touched."""
        code = mapped_code()
        with self._lock:
            type(self)._code = code
            self._set()

    @contextmanager
    def more(self, size: int) -> Iterator[None]:
        """Inside, so many bytes more can be had."""
        kind = type(self)
        with self._lock:
            kind._more += size
            self._set()
        try:
            yield
        finally:
            with self._lock:
                kind._more -= size
                self._set()

    @classmethod
    def _set(cls) -> None:
        soft, hard = cls._before
        allowed = [each._limit + int((cls._code - each._code_then) * (1 - CODE_TOUCHED)) for each in cls._held]
        known = [
            each for each in (*(each + cls._more for each in allowed), soft, hard) if each != resource.RLIM_INFINITY
        ]
        resource.setrlimit(resource.RLIMIT_DATA, (min(known, default=resource.RLIM_INFINITY), hard))


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
