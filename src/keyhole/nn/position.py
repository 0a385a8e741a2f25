"""Patch positions -> codes that are added to the embeddings before scoring and pooling, and never stored.

Letters: b image, n patches, d width.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn


def sinusoid(position: Shaped[Tensor, "*n"], dim: int) -> Float[Tensor, "*n d"]:
    """Return sin and cos of position / 10000^(2 i / d), interleaved (Vaswani et al. 2017)."""
    if dim % 2:
        raise ValueError(f"a sinusoidal code needs an even width, not {dim}")
    half = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device)
    angle = position.to(torch.float32).unsqueeze(-1) * torch.exp(half * (-math.log(10000.0) / dim))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class PositionCode(nn.Module):
    """Positions (b n) or (b n 2) -> codes (b n d). To add one for settings, add it to `POSITIONS`.

    `takes_centers`: positions are centres (b n 2) in pixels of the patches, instead of the patch indices (b n).
    """

    takes_centers: ClassVar[bool] = False


class IndexPosition(PositionCode):
    """The published 1-D code: sinusoidal over the patch's index in raster order."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, position: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return sinusoid(position, self.dim)


class CenterPosition(PositionCode):
    """2-D code of a patch's centre: half the width for x, half for y.

    Args:
        dim: width d, divisible by 4.
        unit: pixels that count as one step, at the resolution of the patches; usually the side of a patch.
    """

    takes_centers = True

    def __init__(self, dim: int, unit: float = 1.0) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"`dim` (={dim}) must be divisible by 4 for a 2-D position code")
        self.dim, self.unit = dim, unit

    def forward(self, position: Shaped[Tensor, "b n 2"]) -> Float[Tensor, "b n d"]:
        return sinusoid(position.to(torch.float32) / self.unit, self.dim // 2).flatten(-2)


def takes_centers(position: nn.Module | None) -> bool:
    """Return whether positions are centres (b n 2); otherwise they are patch indices (b n)."""
    return isinstance(position, PositionCode) and position.takes_centers


POSITIONS: dict[str, Callable[[int, float], PositionCode]] = {
    "1d": lambda dim, _: IndexPosition(dim),
    "2d": CenterPosition,
}
"""The position codes by the name that settings give them, from the width and the side of a patch in pixels."""
