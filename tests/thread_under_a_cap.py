"""Starts a thread under a memory limit, in a process whose heap has more free than the budget leaves: prints "started".

Half of a gigabyte stays free within the heap, in pieces between blocks that are in use, as in a process that has run long.
"""

from __future__ import annotations

import threading

import torch

from keyhole.engine.memory.cap import cap
from keyhole.engine.memory.meter import free_in_heap, taken
from keyhole.engine.memory.plan import Plan

CPU = torch.device("cpu")


def leave_gaps() -> None:
    made = [bytes(100_000) for _ in range(6_000)]
    KEPT.extend(made[::10])


KEPT: list[bytes] = []
filling = threading.Thread(target=leave_gaps)
filling.start()
filling.join()
assert free_in_heap() > 4e8
with cap(Plan(chunk=1, budget=taken(CPU) + 50 * 2**20, named=True), CPU):
    thread = threading.Thread(target=lambda: None, daemon=True)
    thread.start()  # without memory for itself a thread does not begin, and this does not return
    thread.join()
print("started")
