"""Patches as they are read -> values that the encoder takes; copies to the device without waiting.

Letters: k loose patches, c channels, h w height and width of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the host to the device; the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy a small array to the device as `to_device` does."""
    return to_device(torch.from_numpy(np.array(array)), device)


def host_memory(shape: tuple[int, ...], dtype: np.dtype[Any], device: torch.device) -> Tensor:
    """Return uninitialized host memory; for a GPU it is pinned, so that the host does not wait for copies from it."""
    empty = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=empty, pin_memory=device.type == "cuda")


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the type of the tensors inside, also where the caller has switched autocast on."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def copy_all(there: Sequence[Tensor], here: Sequence[Tensor]) -> None:
    """Copy each of `here` into that of `there`; those of the same types in one operation.

    With several types in one call, torch 2.8 to 2.10 writes wrong values on a GPU, also past the end of a tensor.
    """
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for to, of in zip(there, here, strict=True):
        groups.setdefault((to.dtype, of.dtype), []).append((to, of))
    for group in groups.values():
        torch._foreach_copy_([to for to, _ in group], [of for _, of in group])


@dataclass(frozen=True)
class AsRead:
    """Patches as they were read, on the encoder's device: a quarter of the bytes of the encoder's input."""

    pixels: Tensor  # (k h w c) uint8
    color: Tensor | None = None  # (k c c+1) affine change of each patch's colours

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def device(self) -> torch.device:
        return self.pixels.device


def as_read(patches: Tensor, device: torch.device, color: Tensor | None = None) -> Tensor | AsRead:
    """Copy patches to the device: pixels (k h w c) uint8 as `AsRead`, features (k f) as new float32.

    The host does not wait if the patches are in pinned memory. `color` (k c c+1) is on the device already.
    """
    there = patches.to(device, non_blocking=True)
    if there.dtype == torch.uint8:
        return AsRead(there, color)
    values = there.float()  # on the device, so that float16 is copied as it is
    return values.clone() if values is patches else values


def values_of(patches: Tensor | AsRead) -> Tensor:
    """Return pixels as values 0 ... 1 (k c h w) with changed colours, in channels-last memory; features unchanged."""
    return prepare(patches.pixels, patches.color) if isinstance(patches, AsRead) else patches


def prepare(
    pixels: UInt8[Tensor, "k h w c"],
    color: Float[Tensor, "k c c+1"] | None = None,
    dtype: torch.dtype = torch.float32,
    scale: Float[Tensor, "1 c 1 1"] | None = None,
    shift: Float[Tensor, "1 c 1 1"] | None = None,
) -> Float[Tensor, "k c h w"]:
    """Turn pixels into values 0 ... 1 with changed colours, then into `shift + scale * value`, in channels-last memory.

    Changed colours are clamped to 0 ... 1. bf16 holds 0 ... 255 exactly, so only the result is rounded.
    """
    stored = pixels.permute(0, 3, 1, 2)
    values = stored.to(dtype) if color is None else _changed(stored, color, dtype)
    maximum = 255 if color is None else 1
    if scale is None or shift is None:
        return values if maximum == 1 else values.div_(maximum)
    scale, shift = (scale / maximum).to(dtype), shift.to(dtype)
    if torch.compiler.is_compiling():
        # The compiler fuses it with the rest. Before torch 2.14, `out` in channels last breaks the graph.
        return torch.addcmul(shift, values, scale)
    # In place: on a CPU new memory costs as much time as the arithmetic.
    return torch.addcmul(shift, values, scale, out=values)


def _changed(
    values: UInt8[Tensor, "k c h w"], color: Float[Tensor, "k c c+1"], dtype: torch.dtype
) -> Float[Tensor, "k c h w"]:
    """Apply one affine map of colours to each patch; return values 0 ... 1."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        # One convolution for each run of patches with the same map: six times as fast on a CPU as einsum.
        maps, counts = torch.unique_consecutive(color, dim=0, return_counts=True)
        parts = [
            F.conv2d(part.to(dtype), (map_[:, :-1, None, None] / 255).to(dtype), map_[:, -1].to(dtype)).clamp_(0, 1)
            for part, map_ in zip(values.split(counts.tolist()), maps, strict=True)
        ]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.contiguous(memory_format=torch.channels_last)
    matrix, bias = color[:, :, :-1] / 255, color[:, :, -1, None, None]
    mixed = bias
    for channel in range(values.shape[1]):  # one fused pass where this is compiled
        mixed = mixed + values[:, channel : channel + 1] * matrix[:, :, channel, None, None]
    return mixed.clamp(0, 1).to(dtype).contiguous(memory_format=torch.channels_last)
