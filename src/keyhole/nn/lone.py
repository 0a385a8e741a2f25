"""Batch norm where a training step has a single patch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def lone_patch(encoder: nn.Module) -> Iterator[None]:
    """Let batch norms that are given one value per channel normalize by their running statistics, which stay.

    The variance of one value is zero, so torch refuses to learn from it.
    """

    def before(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0]
        if isinstance(values, Tensor) and values.numel() == values.shape[1]:
            norm.training = False

    def after(norm: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> None:
        norm.training = True

    norms = [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    hooks = [norm.register_forward_pre_hook(before) for norm in norms]
    hooks += [norm.register_forward_hook(after) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            norm.training = True
