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
    """`auto` is bf16 where the device multiplies in it, else float32."""
    if name == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return torch.bfloat16 if name == "bf16" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether there are instructions for bf16: a CPU without them computes in float32 and converts, which is slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16") or _older_torch_says())


def _older_torch_says() -> bool:
    """Before `torch.cpu.get_capabilities`."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in asked if hasattr(torch.cpu, name))
