"""Counts the operations that a piece of work gives to its device, and how often the host waits for a result.

    with Operations(model.parameters()) as counted:
        step()
    counted.total.launched, counted.total.waits

It runs on a CPU, where every tensor is on the host. So it follows what would be on the device: the tensors it is
given, and whatever is computed from them. Operations on other tensors cost a GPU nothing and are not counted. A wait is
an operation whose result has a size or a value that the host must know: `item`, `bool`, `tolist`, `cpu`, `nonzero`,
an index that is a mask, and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keyhole.util.timing import Part, Timer

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
WAITS |= {"unique_consecutive", "unique_dim_consecutive", "bincount", "masked_scatter_backward"}
TO_HOST = {Tensor.tolist, Tensor.cpu}
"""Calls that move a tensor of a GPU to the host; on a CPU torch does not dispatch them."""


@dataclass
class Count:
    """What was counted.

    Attributes:
        launched: operations that compute or copy.
        views: operations that only describe a tensor anew; they cost host time, the device nothing.
        waits: how often the host needs a result.
        by_name: how often each operation was launched or waited for.
    """

    launched: int = 0
    views: int = 0
    waits: int = 0
    by_name: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Count) -> Count:
        return Count(
            self.launched + other.launched,
            self.views + other.views,
            self.waits + other.waits,
            self.by_name + other.by_name,
        )


class Operations:
    """Counts within a `with` block.

    Args:
        on_device: tensors that would be on the device at the beginning.

    Attributes:
        part: name under which to count from now on; see `CountingTimer`.
        parts: what was counted, by that name.
    """

    def __init__(self, on_device: Iterable[Tensor] = ()) -> None:
        self.part = "other"
        self.parts: dict[str, Count] = {}
        for tensor in on_device:
            _put(tensor)

    def __enter__(self) -> Self:
        self._modes = ExitStack()
        self._modes.enter_context(_Dispatched(self))
        self._modes.enter_context(_Called(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()

    @staticmethod
    def put(tensor: Tensor) -> Tensor:
        """A tensor that is on the device from now on."""
        _put(tensor)
        return tensor

    @property
    def total(self) -> Count:
        return sum(self.parts.values(), Count())

    def count(self) -> Count:
        """The count of the current part."""
        return self.parts.setdefault(self.part, Count())


class CountingTimer(Timer):
    """Parts of the time under whose names operations are counted; put it in the place of a loop's own.

    Args:
        operations: told which part is current.
    """

    def __init__(self, operations: Operations) -> None:
        super().__init__(torch.device("cpu"))
        self.operations = operations

    def part(self, name: Part) -> Any:
        stack = ExitStack()
        stack.enter_context(super().part(name))
        before, self.operations.part = self.operations.part, name
        stack.callback(setattr, self.operations, "part", before)
        return stack


def _put(tensor: Tensor) -> None:
    tensor._on_device = True  # type: ignore[attr-defined]


def _there(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and hasattr(leaf, "_on_device"))


class _Dispatched(TorchDispatchMode):
    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = list(_there((args, kwargs)))
        if not given:
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                _put(leaf)
        count, name = self.operations.count(), func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]
        )
        if name in WAITS or by_mask or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            count.waits += 1
            count.by_name[f"wait: {name}"] += 1
        if func.is_view or name in ("detach", "_unsafe_view", "alias", "lift_fresh"):
            count.views += 1
        elif not name.startswith(("empty", "new_empty", "_local_scalar")):
            count.launched += 1
            count.by_name[name] += 1
        return result


class _Called(TorchFunctionMode):
    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in TO_HOST and list(_there(args)):
            count = self.operations.count()
            count.waits += 1
            count.by_name[f"wait: {func.__name__}"] += 1
            if func is Tensor.cpu:
                copy = args[0].clone()
                del copy._on_device
                return copy
        return func(*args, **(kwargs or {}))
