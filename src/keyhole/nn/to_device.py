"""Small tensors from the host to the device, without a wait of the host."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device.

    The copy takes its turn behind the work that was launched before; the host does not wait for it. A tensor that is
    on the device already is returned as it is.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
