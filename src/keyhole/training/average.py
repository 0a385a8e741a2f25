"""A running mean of the weights, which is validated and stored in place of those of the last step.

At a high rate the weights of one step answer worse than they learn: the running statistics of batch norms lag behind
weights that change, and the mean over the kept patches lets through what is wrong with all of them. Measured in
`benchmarks/head_to_head_2cpu_2026-11-28.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from keyhole.engine import Engine
from keyhole.errors import RunError
from keyhole.nn.weights import misfits

WARMING = 9.0
"""The mean forgets faster in the first steps: step n counts for at least 9 / (10 + n)."""


class Average:
    """The mean of an engine's weights and statistics.

    Args:
        engine: whose model learns.
        decay: what the mean keeps of itself in a step; 0 is no mean.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.mean: dict[str, Tensor] = {}
        if decay:
            self.mean = {name: value.clone() for name, value in self._learned().items()}

    def _learned(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.engine.model.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take the weights after a step, counted from 0, into the mean."""
        if self.mean:
            share = max(1 - self.decay, WARMING / (WARMING + 1 + step))
            torch._foreach_lerp_(list(self.mean.values()), list(self._learned().values()), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the mean, for validating and storing it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if not self.mean:
            return
        for name, value in self._learned().items():
            mean = self.mean[name]
            kept = value.clone()
            value.copy_(mean)
            mean.copy_(kept)
        self.engine.weights_changed()

    def load(self, mean: Mapping[str, Tensor], path: Path) -> None:
        """Take the mean of a saved state.

        Raises:
            RunError: it does not fit the model.
        """
        problems = misfits(self.mean, mean)
        if problems:
            raise RunError(f"{path}: the mean of the weights does not fit: {'; '.join(problems[:4])}")
        for name, value in mean.items():
            self.mean[name].copy_(value)
