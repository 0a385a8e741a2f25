"""First layers of encoders over one or three channels, arranged for a GPU's matrix units.

A convolution of 7 x 7 with stride 2 over c channels is one of 4 x 4 with stride 1 over the 4c channels of squares of
2 x 2 pixels. With i an output, x the pixels, w the weights with a zero in front, and a tap 2p + q of 8:

    y[i] = sum over p, q of w[2p + q] x[2 (i + p - 2) + q]

Letters: k loose patches, c channels, h w height and width, o output channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MAX_CHANNELS = 4
"""Channels up to which the units have too little to do in each tap."""
UNIT = 8
"""Channels that they take at once in bf16."""


class SquaresConv(nn.Module):
    """Computes what a convolution that `fits` does, up to rounding, with its weights and attributes."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        for name in conv.__constants__:  # an encoder may read them
            setattr(self, name, getattr(conv, name))

    def forward(self, patches: Float[Tensor, "k c h w"]) -> Float[Tensor, "k o _ _"]:
        height, width = patches.shape[-2:]
        o, c = self.weight.shape[:2]
        more = -4 * c % UNIT
        squares = F.pixel_unshuffle(F.pad(patches, (0, width % 2, 0, height % 2)), 2)
        squares = F.pad(squares, (2, 1, 2, 1, 0, more)).contiguous(memory_format=torch.channels_last)
        taps = F.pad(self.weight, (1, 0, 1, 0)).view(o, c, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(o, 4 * c, 4, 4)
        taps = F.pad(taps, (0, 0, 0, 0, 0, more)).contiguous(memory_format=torch.channels_last)
        return F.conv2d(squares, taps, self.bias)


def fits(module: nn.Module) -> bool:
    """Return whether a module is a convolution that `SquaresConv` can take the place of.

    Derived classes, parametrized ones too, may do more with their weights, and hooks with what they compute.
    """
    if type(module) is not nn.Conv2d or module._forward_hooks or module._forward_pre_hooks:
        return False
    if module.in_channels > MAX_CHANNELS or module.groups != 1:
        return False
    shape = module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode
    return shape == ((7, 7), (2, 2), (3, 3), (1, 1), "zeros")
