"""Runs work under a memory plan: when memory runs out, or a CPU's peak exceeds the budget, chunks are halved."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

from keyhole.engine.memory.meter import give_back, steady_heap
from keyhole.engine.memory.plan import SHARED_TILE_BYTES, TRAINING_OPTIONS, OptionNames, Plan, Step
from keyhole.errors import ConfigError
from keyhole.images.tile_cache import TILE_CACHE
from keyhole.util.budget import doubt, explained, memory_text, out_of_memory
from keyhole.util.platform import peak_memory, resident_memory, restart_peak

T = TypeVar("T")

EPOCHS_TO_SETTLE = 2
"""Epochs after which a process has all that it needs: images decoded once, kernels, caches."""
GROWTH = 0.05
"""Memory that was returned comes back within a step. It is returned again only after growing by this share more."""


class Pace:
    """Runs pieces of work under a plan.

    Args:
        plan: the plan to begin with; the attribute is the one that is followed now.
        warn: called with one sentence when the plan becomes smaller; default a Python warning.
        options: named when even the smallest plan does not fit.
    """

    def __init__(
        self, plan: Plan, warn: Callable[[str], None] | None = None, options: OptionNames = TRAINING_OPTIONS
    ) -> None:
        self.plan, self.warn, self.options = plan, warn or _warn, options
        self._watched = plan.named and plan.device == "cpu"
        self._allowed = 0  # bytes; more than the budget if the peak was higher before and cannot be restarted
        self._epochs, self._settled = 0, 0
        self._returned_at = 0  # bytes that were resident when free memory was last returned

    def run(self, step: Step, work: Callable[[Plan], T], again: Callable[[], None] | None = None) -> T:
        """Return the result of `work` under the plan; while memory runs out, repeat it with a smaller `step`.

        When `work` fails it must have no effect, except what `again` undoes, which is called before each repetition.
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
                    encoder, device = self.options.encoder, self.options.device
                    raise ConfigError(explained(error, said, self.options.lower(), encoder, device)) from error
                why = f"out of memory, or else: {own}" if (own := doubt(error)) else "out of memory"
            self._shrink(smaller, why)
            if again is not None:
                again()
        if self._watched and (peak := peak_memory(since_restart=True)) > self._allowed:
            self._over_budget(step, peak)
        return result

    def after_pass(self) -> None:
        """Return free memory to the system if a process on a CPU is above the predicted peak.

        Batches differ in their numbers of patches, so blocks of other sizes leave more and more gaps in the heap. To
        return what is free takes a tenth of a second per gigabyte, and fresh pages as much again. So it is returned at
        every step only if the user named a budget; else when 5% more are resident than at the last return.
        """
        if self.plan.device != "cpu" or not self.plan.peak:
            return
        now = resident_memory()
        if now > max(self.plan.peak, 0 if self.plan.named else round(self._returned_at * (1 + GROWTH))):
            give_back()
            self._returned_at = now

    def after_epoch(self) -> None:
        """Return free memory to the system if a process on a CPU has grown since the second epoch."""
        if self.plan.device != "cpu":
            return
        self._epochs += 1
        now = resident_memory()
        if self._epochs <= EPOCHS_TO_SETTLE:
            self._settled = now
        elif now > self._settled:
            give_back()

    def _over_budget(self, step: Step, peak: int) -> None:
        """Halve the plan."""
        over = memory_text(peak - self.plan.budget)
        why = f"the peak of memory is {over} over --memory {memory_text(self.plan.budget)}"
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
        gc.collect()  # frees what the failed attempt held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def cap(plan: Plan, device: torch.device) -> AbstractContextManager[None]:
    """Keep to the plan's budget inside.

    On CUDA the allocator gets the budget as its limit. On a CPU nothing limits the process, see `Pace`; malloc and the
    cache of decoded tiles are set to what the plan counts with, if the user named the budget. Without one, malloc keeps
    what it frees: fresh pages for each layer made a prediction take a third longer.

    Several caps may hold at a time and end in any order, as when two predictions are iterated over in turn: the lowest
    is the limit, and after the last one everything is as before the first.
    """
    if device.type == "cuda":
        return _limited_allocator(plan.budget, device)
    if plan.named:
        return _limited_heap(plan.steady)
    if not _steady:
        steady_heap(False)
    return nullcontext()


_fractions: dict[int, tuple[float, list[float]]] = {}
"""For each GPU the fraction of its memory that torch had before the first cap, and those of the caps that hold."""


@contextmanager
def _limited_allocator(budget: int, device: torch.device) -> Iterator[None]:
    index = torch.cuda.current_device() if device.index is None else device.index
    fraction = budget / torch.cuda.get_device_properties(index).total_memory
    if index not in _fractions:
        _fractions[index] = torch.cuda.memory.get_per_process_memory_fraction(index), []
    before, held = _fractions[index]
    held.append(fraction)
    try:
        if torch.cuda.memory_reserved(index) > budget:  # else reserved memory is used again by the next call
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(before, *held), index)
        yield
    finally:
        held.remove(fraction)
        torch.cuda.set_per_process_memory_fraction(min([before, *held]), index)
        if not held:
            del _fractions[index]


_steady: list[bool] = []
"""`Plan.steady` of the caps on the CPU that hold."""
_tiles_before = 0
"""`TILE_CACHE.shared_limit` before the first of them."""


@contextmanager
def _limited_heap(steady: bool) -> Iterator[None]:
    global _tiles_before
    if not _steady:
        _tiles_before, TILE_CACHE.shared_limit = TILE_CACHE.shared_limit, SHARED_TILE_BYTES
    _steady.append(steady)
    steady_heap(steady, limited=True)
    give_back()
    try:
        yield
    finally:
        _steady.remove(steady)
        steady_heap(bool(_steady) and _steady[-1], limited=bool(_steady))
        if not _steady:
            TILE_CACHE.shared_limit = _tiles_before
        give_back()  # what follows, such as a report, loads libraries
