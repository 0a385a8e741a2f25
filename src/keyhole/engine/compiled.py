"""Functions compiled by `torch.compile`.

Dynamo counts compilations by code object and runs a function uncompiled after 8 of them. Copies of a function with code
objects of their own are counted apart.
"""

import math
import warnings
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


class Compiled:
    """An encoder that is compiled for the first `most` numbers of patches it gets, and runs uncompiled for all others.

    Last batches and images with few patches have numbers of their own, which are not worth compiling for. Functions of
    equal `kind` compile to the same code, such as those of two encoders of one architecture, once. Warns once where
    torch runs the function uncompiled.
    """

    _codes: ClassVar[dict[Hashable, CodeType]] = {}

    def __init__(
        self, function: Callable[[Tensor, Tensor | None], Tensor], kind: Hashable, most: float = math.inf
    ) -> None:
        self._function, self._kind, self._most = function, kind, most
        self._by_rows: dict[int, Callable[[Tensor, Tensor | None], Tensor]] = {}
        self._warned = False

    def __call__(self, patches: Tensor, color: Float[Tensor, "k c c+1"] | None = None) -> Float[Tensor, "k d"]:
        rows = len(patches)
        if rows not in self._by_rows and len(self._by_rows) < self._most:
            self._by_rows[rows] = self._compile(rows)
        return self._by_rows.get(rows, self._function)(patches, color)

    def _compile(self, rows: int) -> Callable[..., Tensor]:
        function = self._function

        def run(*inputs: Any) -> Tensor:
            if not torch.compiler.is_compiling():  # never true in compiled code
                self._warn()
            return function(*inputs)

        code = self._codes.setdefault((self._kind, rows), run.__code__.replace())
        own = FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)
        compiled: Callable[..., Tensor] = torch.compile(own, dynamic=False)
        return compiled

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "torch runs the compiled encoder uncompiled, and slower; see what it logs with TORCH_LOGS=recompiles",
                stacklevel=2,
            )
