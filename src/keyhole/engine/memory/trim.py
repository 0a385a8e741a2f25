"""Keeps the gaps in malloc's heap from adding up over a run.

On a CPU what a layer frees stays in the heap for the next one (`meter.steady_heap`). Batches differ in their numbers of
patches, so that blocks of ever other sizes leave ever more gaps. What is free in the heap is handed back to the system
when the process has grown beyond its prediction, and at the end of an epoch when it has grown since the second. Giving
it back costs a tenth of a second a gigabyte and as much again for fresh pages, so that it is not done at every step.
"""

from __future__ import annotations

import torch

from keyhole.engine.memory.meter import give_back
from keyhole.engine.memory.plan import Plan
from keyhole.util.platform import resident_memory

SETTLED = 2
"""Epochs after which a process has everything that it needs: what is decoded once, kernels, caches."""


class Trim:
    """Hands free memory back to the system when the process grows. Only on a CPU, and where Linux tells its size.

    Args:
        plan: predicts the peak.
        device: where the model is.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._active = device.type == "cpu"
        self._peak = plan.peak
        self._epochs, self._settled = 0, 0

    def after_pass(self) -> None:
        """Call it between the passes, when their large blocks are free."""
        if self._active and self._peak and resident_memory() > self._peak:
            give_back()

    def after_epoch(self) -> None:
        """Call it when an epoch has ended."""
        if not self._active:
            return
        self._epochs += 1
        now = resident_memory()
        if self._epochs <= SETTLED:
            self._settled = now
        elif now > self._settled:
            give_back()
