"""Pixels as they are read -> numbers that the encoder takes, in as few passes over them as possible.

Letters: k loose patches, c channels, h w height and width of a patch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class AsRead:
    """Patches as they were read, on the encoder's device: a quarter of the bytes of the numbers that it takes.

    Attributes:
        pixels: (k h w c) uint8.
        color: (k c c+1) affine change of each patch's colours, or None.
    """

    pixels: Tensor
    color: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def values(self) -> Float[Tensor, "k c h w"]:
        """Return values 0 ... 1 with changed colours, channels last in memory."""
        return prepare(self.pixels, self.color)


def prepare(
    pixels: UInt8[Tensor, "k h w c"],
    color: Float[Tensor, "k c c+1"] | None = None,
    dtype: torch.dtype = torch.float32,
    scale: Float[Tensor, "1 c 1 1"] | None = None,
    shift: Float[Tensor, "1 c 1 1"] | None = None,
) -> Float[Tensor, "k c h w"]:
    """Turn pixels into values 0 ... 1 with changed colours, then into `shift + scale * value`.

    Args:
        pixels: as read from files.
        color: affine change of each patch's colours, clamped to 0 ... 1; None leaves them.
        dtype: of the result. bf16 holds 0 ... 255 exactly, so nothing is lost before the result is rounded.
        scale, shift: the encoder's normalization; both or neither.

    Returns:
        Values, channels last in memory.
    """
    stored = pixels.permute(0, 3, 1, 2)
    values = stored.to(dtype) if color is None else changed(stored, color, dtype)
    maximum = 255 if color is None else 1
    if scale is None or shift is None:
        return values if maximum == 1 else values.div_(maximum)
    scale, shift = (scale / maximum).to(dtype), shift.to(dtype)
    if torch.compiler.is_compiling():
        # It is fused with the rest. Before torch 2.14, `out` in channels last breaks the graph.
        return torch.addcmul(shift, values, scale)
    # In place: on a CPU fresh memory costs as much as the arithmetic.
    return torch.addcmul(shift, values, scale, out=values)


def changed(
    values: UInt8[Tensor, "k c h w"], color: Float[Tensor, "k c c+1"], dtype: torch.dtype
) -> Float[Tensor, "k c h w"]:
    """Apply one affine map of colours to each patch; return values 0 ... 1."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        return _changed_by_image(values, color, dtype)
    matrix, bias = color[:, :, :-1] / 255, color[:, :, -1, None, None]
    mixed = bias
    for channel in range(values.shape[1]):  # one fused pass where this is compiled
        mixed = mixed + values[:, channel : channel + 1] * matrix[:, :, channel, None, None]
    return mixed.clamp(0, 1).to(dtype).contiguous(memory_format=torch.channels_last)


def _changed_by_image(values: Tensor, color: Tensor, dtype: torch.dtype) -> Tensor:
    """Convolve each run of patches with the same map by one pixel: six times as fast on a CPU as einsum."""
    runs = torch.unique_consecutive(color, dim=0, return_counts=True)
    parts = [
        F.conv2d(part.to(dtype), (map_[:, :-1, None, None] / 255).to(dtype), map_[:, -1].to(dtype)).clamp_(0, 1)
        for part, map_ in zip(values.split(runs[1].tolist()), runs[0], strict=True)
    ]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.contiguous(memory_format=torch.channels_last)
