"""Whether `torch.compile` pays: what it costs once against what it saves over the patches that are still to be seen."""

from __future__ import annotations

import importlib.util
import math
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

SECONDS = 60.0
"""What compiling an encoder for looking and for learning costs on a GPU before the first step: an estimate."""
SAVED = 0.35
"""Share of the encoder's time that it saves on a GPU: an estimate."""
NOT_ON_A_CPU = "on a CPU it saves an eighth at most, takes a minute, and would make runs differ in their last bits"
"""Measured on two cores: -4 to 12 % for ResNet-18, EfficientNet-Lite0 and the small encoder; 7 to 44 s for the
first call that looks, 137 s with learning on a busy machine."""
NO_ENCODER = "the data are stored features, which need no encoder"


@dataclass(frozen=True)
class Choice:
    """Whether to compile, and the reason as one clause."""

    compile: bool
    why: str

    def describe(self, model: IPSClassifier, patch_shape: Sequence[int]) -> str:
        """The choice, its reason and how many batch norms are folded, in words.

        Args:
            model: with `fast`, whose copy of the encoder is made.
            patch_shape: as in `choose_compile`.
        """
        folding = "" if model.fast is None else model.fast.folding(patch_shape)
        said = f"{'compiled' if self.compile else 'not compiled'}: {self.why}"
        return f"{said}; {folding}" if folding else said


def choose_compile(
    setting: Setting, model: IPSClassifier, patch_shape: Sequence[int], chunk: int, expected: int
) -> Choice:
    """Decides for one run on this machine; on a GPU `auto` measures chunks to know how long the run's patches take.

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
    if len(patch_shape) == 1:
        return Choice(False, NO_ENCODER)
    if device.type != "cuda":
        return Choice(False, NOT_ON_A_CPU)
    if missing:
        return Choice(False, missing)
    seconds = expected / chunk * _chunk_seconds(model, patch_shape, chunk, device)
    saved, cost = SAVED * seconds, SECONDS
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
    """Return the seconds of the fastest of three runs; the first builds and warms up."""
    dtype = torch.uint8 if len(patch_shape) > 1 else torch.float32
    pixels = torch.zeros(chunk, *patch_shape, dtype=dtype, device=device)
    seconds = math.inf
    with model.looking():
        for _ in range(3):
            _wait(device)
            began = time.perf_counter()
            model.look(pixels)
            _wait(device)
            seconds = min(seconds, time.perf_counter() - began)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
