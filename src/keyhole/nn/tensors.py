"""Patches as they are read -> what the encoder takes; both passes and the probe of the memory plan go through it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.nn.pixels import AsRead


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor of the host on the device; a tensor that is on the device already is returned as it is.

    The copy takes its turn behind the work that was launched before; the host does not wait for it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Return a copy of a small array on the device, as `to_device` does."""
    return to_device(torch.from_numpy(np.array(array)), device)


def host_memory(shape: tuple[int, ...], dtype: np.dtype[Any], device: torch.device) -> Tensor:
    """Memory of the host, pinned where a GPU copies from it: the host then does not wait for such a copy."""
    empty = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(shape, dtype=empty, pin_memory=device.type == "cuda")


def as_read(patches: Tensor, device: torch.device, color: Tensor | None = None) -> Tensor | AsRead:
    """Patches of the host on the device: pixels (k h w c) uint8 as they are, features (k f) as float32 of their own.

    Args:
        patches: in pinned memory where the host is not to wait for a GPU.
        device: where the model is.
        color: (k c c+1) affine colour change of each patch on the device, or None.
    """
    there = patches.to(device, non_blocking=True)
    if there.dtype == torch.uint8:
        return AsRead(there, color)
    values = there.float()  # on the device: half as much is copied of float16
    return values.clone() if values is patches else values


def values_of(patches: Tensor | AsRead) -> Tensor:
    """Pixels as values 0 ... 1, (k c h w); features as they are."""
    return patches.values() if isinstance(patches, AsRead) else patches
