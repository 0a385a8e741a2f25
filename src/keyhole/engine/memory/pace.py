"""Runs work under a memory plan: when memory runs out, or exceeds the budget of a CPU, chunks are halved."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from keyhole.config.settings import Config, SelectConfig
from keyhole.engine.memory.bill import HELD_BYTES
from keyhole.engine.memory.meter import give_back
from keyhole.engine.memory.plan import Plan, Step, make_plan
from keyhole.errors import ConfigError
from keyhole.nn import IPSClassifier
from keyhole.nn.build import patch_shape
from keyhole.util.budget import doubt, explained, memory_text, out_of_memory, parse_memory
from keyhole.util.platform import peak_memory, restart_peak

T = TypeVar("T")

LARGE = 250_000
"""Patches of an image that a plan for predicting has room for."""


class Pace:
    """Runs pieces of work under a plan.

    Args:
        plan: the plan to begin with.
        warn: called with one sentence when the plan becomes smaller.

    Attributes:
        plan: the plan that is followed now.
    """

    def __init__(self, plan: Plan, warn: Callable[[str], None]) -> None:
        self.plan, self.warn = plan, warn
        self._watched = plan.named and plan.device == "cpu"
        self._allowed = 0  # bytes; more than the budget if the peak was higher before and cannot be restarted

    def run(self, step: Step, work: Callable[[Plan], T], again: Callable[[], None] | None = None) -> T:
        """Return the result of `work` under the plan; repeat it under smaller plans while memory runs out.

        Args:
            step: the pass that becomes smaller; the other one keeps its size.
            work: leaves nothing behind when it fails, except for what `again` undoes.
            again: called before each repetition.

        Raises:
            ConfigError: even the smallest plan does not fit.
        """
        if self._watched and not self._allowed:
            self._watch()
        while True:
            try:
                result = work(self.plan)
                break
            except Exception as error:
                if not out_of_memory(error):
                    raise
                smaller = self.plan.halved(step)
                if smaller is None:
                    said = f"out of memory even with the smallest plan ({self.plan.describe()})"
                    advice = "raise --memory, or lower --patch.size, --select.m or the encoder's size"
                    raise ConfigError(explained(error, said, advice)) from error
                why = f"out of memory, or else: {own}" if (own := doubt(error)) else "out of memory"
            self._shrink(smaller, why)
            if again is not None:
                again()
        if self._watched:
            self._keep_budget(step)
        return result

    def _keep_budget(self, step: Step) -> None:
        """Halve the plan when the peak of this process since the last time has gone over the budget."""
        peak = peak_memory(since_restart=True)
        if peak <= self._allowed:
            return
        why = f"the peak of memory, {memory_text(peak)}, is over --memory {memory_text(self.plan.budget)}"
        smaller = self.plan.halved(step)
        if smaller is None:
            self.warn(f"{why}, with the smallest chunks already; a larger --memory is needed")
            self._watched = False
            return
        self._shrink(smaller, why)
        give_back()
        self._watch()

    def _watch(self) -> None:
        restart_peak()
        self._allowed = max(self.plan.budget, peak_memory(since_restart=True))

    def _shrink(self, smaller: Plan, why: str) -> None:
        self.warn(f"{why}; going on with less at a time ({smaller.describe()})")
        self.plan = smaller
        gc.collect()  # what the failed attempt held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
