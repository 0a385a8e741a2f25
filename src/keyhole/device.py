"""Where to compute and in which arithmetic."""

from __future__ import annotations

import torch

from keyhole.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU without one.

    Raises:
        ConfigError: torch does not know the device, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"--run.device {name}: not usable here ({first}). Use auto or cpu.") from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32
