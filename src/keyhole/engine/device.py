"""Where to compute and in which arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from keyhole.errors import ConfigError
from keyhole.nn.encoder import has_depthwise, multiply_adds


def choose_device(name: str, remedy: str = "", option: str = "--run.device") -> torch.device:
    """Return the device: `auto` is the first CUDA GPU, else Apple's (`mps`, untested), else the CPU.

    Args:
        name: value of the setting `run.device`.
        remedy: advice at the end of an error; default is to use another device.
        option: the user's option, for errors.

    Raises:
        ConfigError: torch does not know the device, or it is missing, or another process uses it exclusively.
    """
    first = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = with_index(torch.device(first if name == "auto" else name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        remedy = remedy or f"Use {'cpu' if name == 'auto' else 'auto or cpu'}."
        raise ConfigError(f"{option} {name}: not usable here ({str(error).splitlines()[0]}). {remedy}") from error
    return device


def with_index(device: torch.device) -> torch.device:
    """Return `cuda` with the index of the current GPU, as tensors have it; torch does not count the two as equal."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@dataclass(frozen=True)
class Arithmetic:
    """Types the encoder computes in.

    Attributes:
        look: without gradients, where patches are scored.
        learn: with gradients.
        tf32: on a GPU, float32 is rounded to TF32 in convolutions and matrix products; see `keyhole.util.tf32`.
    """

    look: torch.dtype
    learn: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        look, learn = (self.name(each) for each in (self.look, self.learn))
        return look if look == learn else f"{look} where it looks, {learn} where it learns"

    def name(self, kind: torch.dtype) -> str:
        """Return a type in words."""
        return "tf32" if self.tf32 and kind == torch.float32 else str(kind).removeprefix("torch.")


MIN_BF16_WORK = 10_000_000
"""Multiply-adds for a patch from which bf16 pays on a CPU; below, converting costs more than it saves."""


def choose_precision(name: str, encoder: nn.Module, shape: Sequence[int]) -> Arithmetic:
    """Return the arithmetic of `train.precision`: "auto", "float32", "tf32" or "bf16".

    `auto` is bf16 on a GPU with instructions for it. On a CPU with such instructions it is bf16 without gradients, if
    the encoder is large enough, and float32 with gradients, which are slower in bf16. Networks of depthwise
    convolutions use float32 there: their filters nearly cancel, and with bf16 other patches are kept. The choice
    depends on model and machine alone, so that a run can be repeated. On a GPU torch rounds convolutions to TF32 by
    default; `float32` does not, and `tf32` does. On a CPU both are float32. `shape` is that of a patch as it is read.
    """
    device = next(encoder.parameters()).device
    if name != "auto":
        chosen = torch.bfloat16 if name == "bf16" else torch.float32
        return Arithmetic(chosen, chosen, tf32=name == "tf32" and device.type == "cuda")
    if not has_bf16(device):
        return Arithmetic(torch.float32, torch.float32)
    if device.type != "cpu":
        return Arithmetic(torch.bfloat16, torch.bfloat16)
    fast = not has_depthwise(encoder) and multiply_adds(encoder, shape) >= MIN_BF16_WORK
    return Arithmetic(torch.bfloat16 if fast else torch.float32, torch.float32)


def has_bf16(device: torch.device) -> bool:
    """Return whether there are instructions for bf16; a CPU without them computes in float32 and converts."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # the next line asks the current GPU
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    older = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # before `get_capabilities`
    found = known.get("avx512_bf16") or known.get("amx_bf16")
    return device.type == "cpu" and bool(found or any(getattr(torch.cpu, name, bool)() for name in older))
