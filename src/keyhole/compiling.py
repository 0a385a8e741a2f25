"""Whether `torch.compile` pays: what it costs once against what it saves over the patches that are still to be seen."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from keyhole.errors import ConfigError
from keyhole.nn import IPSClassifier

Setting = Literal["auto", "on", "off"]

SECONDS = {"cuda": 40.0, "cpu": 20.0}
"""What compiling an encoder costs before the first patch: measured 2 to 18 s on two CPU cores, several on a GPU."""
SAVED = {"cuda": 0.35, "cpu": 0.07}
"""Share of the encoder's time that is saved. On two CPU cores -4 to 10 % in bf16 (ResNet-18, EfficientNet-Lite0, the
small encoder); the figure of the GPU is an estimate."""


@dataclass(frozen=True)
class Choice:
    """Whether to compile, and the reason as one clause."""

    compile: bool
    why: str


def choose_compile(
    setting: Setting, model: IPSClassifier, patch_shape: Sequence[int], chunk: int, expected: int
) -> Choice:
    """Decides for one run on this machine; `auto` measures a chunk to know how long the run's patches take.

    Args:
        setting: `--run.compile`.
        model: on its device, with `fast`, which is used and left as it is.
        patch_shape: of one patch as it is read: (s, s, c) uint8, or (f,) float32.
        chunk: patches that are looked at together.
        expected: patches that the run will look at.

    Raises:
        ConfigError: `on`, and there is nothing to compile with.
    """
    device = next(model.parameters()).device
    missing = _missing(device)
    if setting == "on":
        if missing:
            raise ConfigError(f"--run.compile on: {missing}. Install it, or use --run.compile auto.")
        return Choice(True, "as asked for")
    if setting == "off":
        return Choice(False, "as asked for")
    if missing:
        return Choice(False, missing)
    kind = "cuda" if device.type == "cuda" else "cpu"
    seconds = expected / chunk * _chunk_seconds(model, patch_shape, chunk, device)
    saved, cost = SAVED[kind] * seconds, SECONDS[kind]
    told = f"encoding takes some {_rounded(seconds)} in this run, compiling would save {_rounded(saved)} of them"
    return Choice(saved > cost, f"{told} and costs {_rounded(cost)}")


def _rounded(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _missing(device: torch.device) -> str:
    """What compiling needs and this machine lacks, or nothing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "there is no Triton to compile with"
    compiler = os.environ.get("CXX") or "g++"
    found = shutil.which(compiler) or shutil.which("clang++")
    return "" if found else f"there is no C++ compiler ({compiler}) to compile with"


def _chunk_seconds(model: IPSClassifier, patch_shape: Sequence[int], chunk: int, device: torch.device) -> float:
    """Of the second of two runs; the first builds and warms up."""
    dtype = torch.uint8 if len(patch_shape) > 1 else torch.float32
    pixels = torch.zeros(chunk, *patch_shape, dtype=dtype, device=device)
    seconds = 0.0
    with model.looking():
        for _ in range(2):
            _wait(device)
            began = time.perf_counter()
            model.look(pixels)
            _wait(device)
            seconds = time.perf_counter() - began
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
