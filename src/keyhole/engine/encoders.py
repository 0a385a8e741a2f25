"""Runs a model's encoder: without gradients as a fast copy, with gradients as it is.

    encoders = Encoders(model, arithmetic)
    with encoders.inference():                       # evaluation mode, current weights
        embedding = encoders.embed(pixels)
        logits = encoders.logits(embedding, position)
    embedding = encoders.learn(patches)              # with gradients
    encoders.fast.weights_changed()

Letters: k loose patches, c channels, h w height and width (after logits: head, query t), d width.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from keyhole.engine.compiled import Compiled
from keyhole.engine.device import Arithmetic
from keyhole.engine.fast import FastEncoder
from keyhole.errors import ConfigError
from keyhole.nn.classifier import IPSClassifier, encoded, encoder_input
from keyhole.nn.selection import evaluating
from keyhole.nn.tensors import AsRead
from keyhole.util.tf32 import tf32

Setting = Literal["auto", "on", "off"]

COMPILE_SECONDS = 60.0
"""Estimated cost of compiling an encoder for both passes on a GPU."""
COMPILE_SAVES = 0.35
"""Estimated share of the encoder's time that compiling saves on a GPU."""
NOT_ON_A_CPU = "on a CPU it saves an eighth at most, takes a minute, and would make runs differ in their last bits"
NO_ENCODER = "the data are stored features, which need no encoder"


class CompileChoice(NamedTuple):
    """Whether to compile, and the reason as one clause."""

    compile: bool
    why: str


class Encoders:
    """Runs a model's encoder in both passes.

    Args:
        model: on its device. Its `precision` becomes `arithmetic.learn`.
        arithmetic: what the encoder computes in; default is the model's precision in both passes.

    Attributes:
        fast: the copy that encodes without gradients.
    """

    def __init__(self, model: IPSClassifier, arithmetic: Arithmetic | None = None) -> None:
        self.model = model
        self.arithmetic = arithmetic or Arithmetic(model.precision, model.precision)
        model.precision = self.arithmetic.learn
        self.device = next(model.parameters()).device
        self.fast = FastEncoder(model.encoder, self.arithmetic.look, tf32=self.arithmetic.tf32)
        self._learning: Compiled | None = None
        self._query: Callable[[], Tensor] = model.pool.folded_query

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluate without gradients, with the current weights; then restore the modes.

        Weights must not change inside, since the query of the pool is computed once.
        """
        outer = self._query
        with evaluating(self.model), tf32(False):
            self.fast.refresh()
            self._query = cache(self.model.pool.folded_query)
            try:
                yield
            finally:
                self._query = outer

    def embed(
        self,
        pixels: Shaped[Tensor, "k ..."] | AsRead,
        color: Float[Tensor, "k c c+1"] | None = None,
        rows: int | None = None,
    ) -> Float[Tensor, "k d"]:
        """Return the embeddings of loose patches, inside `inference`; see `FastEncoder.__call__`."""
        if isinstance(pixels, AsRead):
            pixels, color = encoder_input(pixels)
        return self.fast(pixels, color, rows)

    def logits(
        self, embedding: Float[Tensor, "k d"], position: Shaped[Tensor, "k ..."] | None = None
    ) -> Float[Tensor, "k h t"]:
        """Return the attention logits of loose patches from their embeddings, inside `inference`."""
        return self.model.logits(embedding, position, self._query())

    def learn(self, patches: Shaped[Tensor, "k ..."] | AsRead) -> Float[Tensor, "k d"]:
        """Return the embeddings of loose patches with gradients, as `IPSClassifier.encode` does."""
        if self._learning is None or not self.model.training or len(patches) == 1:
            return self.model.encode(patches)
        pixels, color = encoder_input(patches)
        with self.model.autocast(pixels.device):
            return self._learning(pixels, color).float()

    @property
    def compiled(self) -> bool:
        """Whether the encoder goes through `torch.compile`."""
        return self.fast.compiled

    def compile(self) -> None:
        """Run the encoder through `torch.compile` from now on; with gradients for the next two numbers of patches."""
        self.fast.compiled = True
        encoder = self.model.encoder
        self._learning = Compiled(
            lambda patches, color: encoded(encoder, patches, color, torch.float32), ("learn", repr(encoder)), most=2
        )

    def out_of_memory(self) -> None:
        """Compile for other numbers of patches from now on: those before do not come again."""
        if self._learning is not None:
            self.compile()

    def choose_compile(self, setting: Setting, patch_shape: Sequence[int], chunk: int, expected: int) -> CompileChoice:
        """Decide whether compiling pays in one run on this machine, and compile if so.

        On a GPU, "auto" measures one chunk to estimate how long the patches of the run take.

        Args:
            setting: `--run.compile`.
            patch_shape: of one patch as it is read: (s, s, c) uint8, or (f,) float32.
            chunk: patches that are encoded at once.
            expected: patches that the run will encode.

        Raises:
            ConfigError: "on", and a compiler is missing.
        """
        missing = _missing_compiler(self.device)
        if setting == "on" and missing:
            raise ConfigError(f"--run.compile on: {missing}. Install it, or use --run.compile auto.")
        if setting != "auto":
            choice = CompileChoice(setting == "on", "as asked for")
        elif len(patch_shape) == 1:
            choice = CompileChoice(False, NO_ENCODER)
        elif self.device.type != "cuda" or missing:
            choice = CompileChoice(False, missing if self.device.type == "cuda" else NOT_ON_A_CPU)
        else:
            seconds = expected / chunk * self._chunk_seconds(patch_shape, chunk)
            whole, saved, cost = (_rounded(each) for each in (seconds, COMPILE_SAVES * seconds, COMPILE_SECONDS))
            why = f"encoding takes some {whole} in this run, compiling would save {saved} of them and costs {cost}"
            choice = CompileChoice(COMPILE_SAVES * seconds > COMPILE_SECONDS, why)
        if choice.compile:
            self.compile()
        return choice

    def describe(self, choice: CompileChoice, patch_shape: Sequence[int]) -> str:
        """Return the choice, its reason and how many batch norms are folded, in words."""
        folding = self.fast.folding(patch_shape)
        said = f"{'compiled' if choice.compile else 'not compiled'}: {choice.why}"
        return f"{said}; {folding}" if folding else said

    def _chunk_seconds(self, patch_shape: Sequence[int], chunk: int) -> float:
        """Return the seconds of the fastest of three runs; the first one builds and warms up."""
        dtype = torch.uint8 if len(patch_shape) > 1 else torch.float32
        pixels = torch.zeros(chunk, *patch_shape, dtype=dtype, device=self.device)
        seconds = math.inf
        with self.inference():
            for _ in range(3):
                wait(self.device)
                began = time.perf_counter()
                self.embed(pixels)
                wait(self.device)
                seconds = min(seconds, time.perf_counter() - began)
        return seconds


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rounded(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _missing_compiler(device: torch.device) -> str:
    """Return what compiling needs and this machine lacks, or ""."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "there is no Triton to compile with"
    compiler = os.environ.get("CXX") or "g++"
    found = shutil.which(compiler) or shutil.which("clang++")
    return "" if found else f"there is no C++ compiler ({compiler}) to compile with"
