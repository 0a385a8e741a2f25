"""Counts the work of an encoder for one patch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from keyhole.nn.selection import evaluating


def multiply_adds(encoder: nn.Module, patch_shape: Sequence[int]) -> int:
    """Count the multiply-adds of convolutions and linear layers for one patch, as read: (s, s, c) or (f,)."""
    count = 0

    def note(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal count
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        count += output.numel() * math.prod(layer.weight.shape[1:])

    hooks = [part.register_forward_hook(note) for part in encoder.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    shape = (1, *patch_shape) if len(patch_shape) == 1 else (1, patch_shape[2], *patch_shape[:2])
    parameter = next(encoder.parameters())
    try:
        with evaluating(encoder):
            encoder(torch.zeros(shape, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    return count


def has_depthwise(encoder: nn.Module) -> bool:
    """Whether there are convolutions with one filter per channel, as in EfficientNet and MobileNet."""
    convolutions = [part for part in encoder.modules() if isinstance(part, nn.Conv2d)]
    return any(layer.groups == layer.in_channels > 1 for layer in convolutions)
