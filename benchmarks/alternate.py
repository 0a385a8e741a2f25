"""Times pieces of work against each other in one run: in turns, so that a busy machine is busy for all of them."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from keyhole.engine.memory.meter import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, steady_heap

T = TypeVar("T")

ROUNDS = 5
"""Fewest turns of each piece; a result is the median."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device has done what it was told."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def alternate(
    pieces: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each piece, one after the other in every round. Each has been called before."""
    taken: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(rounds):
        for name, work in pieces.items():
            taken[name].append(seconds_of(work, device))
    return taken


def as_keyhole(work: Callable[[], T]) -> Callable[[], T]:
    """Under the malloc that `keyhole train` sets: what a layer frees, the next one takes."""

    def run() -> T:
        steady_heap(False)
        return work()

    return run


def as_plain(work: Callable[[], T]) -> Callable[[], T]:
    """Under glibc's malloc as it is in a process that sets nothing, once its own adjustment has ended."""

    def run() -> T:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 2**25)
            mallopt(M_TRIM_THRESHOLD, 2**26)
        return work()

    return run


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(device: torch.device, side: int | None = None) -> dict[torch.dtype, float]:
    """GFLOP/s of square matrix products in float32 and bf16: the most that an encoder of either could reach.

    Args:
        device: to measure.
        side: of the matrices; default 2048 on a CPU, 8192 on a GPU.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    kinds = {"float32": torch.float32, "bf16": torch.bfloat16}
    pieces: dict[str, Callable[[], object]] = {}
    for name, precision in kinds.items():
        a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
        pieces[name] = lambda a=a, b=b: a @ b  # type: ignore[misc]
        pieces[name]()
    seconds = medians(alternate(pieces, device, 7))
    return {precision: 2e-9 * side**3 / seconds[name] for name, precision in kinds.items()}
