"""A function compiled by `torch.compile`; functions of one kind share what is compiled, others do not.

Dynamo, which traces what is compiled, counts the compilations of a function by its code: those of all objects of a
class together, in the whole process. After 8 it goes on uncompiled, and only its log says so. A copy of the function
with code of its own has a count of its own; objects that share the copy share what is compiled.
"""

import warnings
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor


class Compiled:
    """Calls a function through `torch.compile`, for static shapes; warns once where torch runs it uncompiled.

    Args:
        function: of tensors.
        kind: equal for functions that compile to the same, such as those of two encoders of one architecture, which
            are then compiled once.
    """

    _codes: ClassVar[dict[Hashable, CodeType]] = {}

    def __init__(self, function: Callable[..., Tensor], kind: Hashable) -> None:
        self._warned = False

        def run(*inputs: Any) -> Tensor:
            if not torch.compiler.is_compiling():  # never true in what has been compiled
                self._warn()
            return function(*inputs)

        code = self._codes.setdefault(kind, run.__code__.replace())
        own = FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)
        self._run: Callable[..., Tensor] = torch.compile(own, dynamic=False)

    def __call__(self, *inputs: Any) -> Tensor:
        return self._run(*inputs)

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "torch runs the compiled encoder uncompiled, and slower; see what it logs with TORCH_LOGS=recompiles",
                stacklevel=2,
            )
