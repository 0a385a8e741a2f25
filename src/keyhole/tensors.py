"""Patches as they are read -> what the encoder takes; both passes and the probe of the memory plan go through it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.nn.pixels import prepare


def to_tensor(pixels: NDArray[np.generic], device: torch.device, color: Tensor | None = None) -> Tensor:
    """Patches (k h w c) uint8 from the host -> (k c h w) in 0 ... 1 on the device; features (k f) as float32.

    Args:
        pixels: uint8 until here, so that a quarter of the bytes is copied.
        device: where the model is.
        color: (k c c+1) affine colour change of each patch, or None.
    """
    tensor = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device)
    return prepare(tensor, color) if tensor.dtype == torch.uint8 else tensor.float()
