"""The memory plan at work: where the device runs out all the same, the chunk is halved and the piece repeated."""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import TypeVar

import torch

from keyhole.config.settings import Config, SelectConfig
from keyhole.engine.memory.bill import HELD_BYTES
from keyhole.engine.memory.cap import room_for_code
from keyhole.engine.memory.plan import Plan, Step, make_plan
from keyhole.errors import ConfigError
from keyhole.nn import IPSClassifier
from keyhole.nn.build import patch_shape
from keyhole.util.budget import doubt, explained, out_of_memory, parse_memory

T = TypeVar("T")

LARGE = 250_000
"""Patches of an image that a plan for predicting has room for."""
KNOWN = 16
"""Shapes that are remembered: of oneDNN's thousand operations with their code, ResNet-18 needs 60 to learn from one."""


class Pace:
    """Runs pieces of work under a plan.

    Args:
        plan: to begin with.
        warn: told in one sentence when the plan had to become smaller.
        compiled: whether the work goes through `torch.compile`; see `keyhole.engine.memory.cap.room_for_code`.

    Attributes:
        plan: that is followed now.
    """

    def __init__(self, plan: Plan, warn: Callable[[str], None], compiled: bool = False) -> None:
        self.plan, self.warn, self.compiled = plan, warn, compiled
        self._known: deque[Hashable] = deque(maxlen=KNOWN)

    def run(
        self,
        step: Step,
        work: Callable[[Plan], T],
        again: Callable[[], None] | None = None,
        shape: Hashable | None = None,
    ) -> T:
        """The result of `work` under the plan, repeated under ever smaller ones while the device runs out of memory.

        Args:
            step: which pass it is; the other keeps its size.
            work: leaves nothing behind where it fails, but for what `again` undoes.
            again: called before each repetition.
            shape: tells apart, under one plan, work for which other code is written; it is given room the first time
                alone. None: every time. See `keyhole.engine.memory.cap.room_for_code`.

        Raises:
            ConfigError: even the smallest plan does not fit.
        """
        while True:
            known = (step, self.plan.chunk, self.plan.split, shape)
            try:
                with nullcontext() if self.compiled or known in self._known else room_for_code():
                    result = work(self.plan)
                if shape is not None and known not in self._known:
                    self._known.append(known)
                return result
            except Exception as error:
                if not out_of_memory(error):
                    raise
                smaller = self.plan.halved(step)
                if smaller is None:
                    said = f"out of memory even with the smallest plan ({self.plan.describe()})"
                    advice = "raise --memory, or lower --patch.size, --select.m or the encoder's size"
                    raise ConfigError(explained(error, said, advice)) from error
                why = f"out of memory, or else: {own}" if (own := doubt(error)) else "out of memory"
            self.warn(f"{why}; going on with less at a time ({smaller.describe()})")
            self.plan = smaller
            gc.collect()  # what the failed attempt held
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if again is not None:
                again()


def predicting(model: IPSClassifier, config: Config, device: torch.device, warn: Callable[[str], None]) -> Pace:
    """For a model that predicts images of up to `LARGE` patches; it is measured only where memory is limited."""
    plan, memory = unlimited(config.select).plan, parse_memory(config.memory)
    if memory is not None or device.type == "cuda":
        plan = make_plan(
            model,
            patch_shape=patch_shape(config.model, config.patch.size),
            m=config.select.m,
            batch=config.train.batch,
            device=device,
            memory=memory,
            chunk=fixed_chunk(config.select),
            largest_bag=LARGE,
            learn=False,
            ahead=config.run.ahead,
            keep_logits=True,
            jpeg=config.run.decode == "auto",
        )
    return Pace(plan, warn)


def fixed_chunk(select: SelectConfig) -> int | None:
    """Patches that are encoded at once where the user has fixed it; the `chunk` of the rule `streaming` is another.

    That rule takes I patches at a time to its memory, however many have been encoded together.
    """
    return None if select.rule == "streaming" else select.chunk


def unlimited(select: SelectConfig) -> Pace:
    """For callers who know what fits: chunks as configured, and no limit."""
    return Pace(Plan(chunk=fixed_chunk(select) or 64, hold=HELD_BYTES), lambda text: warnings.warn(text, stacklevel=2))
