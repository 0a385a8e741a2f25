"""Functions compiled by `torch.compile`.

Dynamo counts compilations by code object and runs a function uncompiled after 8 of them. Copies of a function with code
objects of their own are counted apart.
"""

import warnings
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keyhole.nn.classifier import encoded


class Compiled:
    """Calls a function through `torch.compile`, for static shapes; warns once where torch runs it uncompiled.

    Functions of equal `kind` compile to the same code, such as those of two encoders of one architecture, once.
    """

    _codes: ClassVar[dict[Hashable, CodeType]] = {}

    def __init__(self, function: Callable[..., Tensor], kind: Hashable) -> None:
        self._warned = False

        def run(*inputs: Any) -> Tensor:
            if not torch.compiler.is_compiling():  # never true in compiled code
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


class CompiledEncoder:
    """An encoder with gradients, compiled for the first `most` sizes it is given and uncompiled for all others.

    Last batches and images with few patches have sizes of their own, which are not worth compiling for.
    """

    def __init__(self, encoder: nn.Module, most: int = 2) -> None:
        self.encoder, self.most = encoder, most
        self._compiled: dict[tuple[int, ...], Compiled] = {}

    def __call__(self, patches: Tensor, color: Float[Tensor, "k c c+1"] | None = None) -> Float[Tensor, "k d"]:
        size = tuple(patches.shape)
        if size not in self._compiled and len(self._compiled) < self.most:
            self._compiled[size] = Compiled(self._encode, ("encode", size, repr(self.encoder)))
        found: Tensor = self._compiled.get(size, self._encode)(patches, color)
        return found

    def forget(self) -> None:
        """Compile for the sizes that come next, as after memory ran out."""
        self._compiled.clear()

    def _encode(self, patches: Tensor, color: Tensor | None) -> Tensor:
        return encoded(self.encoder, patches, color, torch.float32)
