"""Stands in for a GPU's buffers, on the CPU: with room for so many patches, and refusing more as torch does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from keyhole import staging

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"


class Narrow:
    """Buffers for `room` patches.

    Attributes:
        made: how many of these there have been.
        alive: those that are left.
        sizes: rows that each buffer was asked for.
    """

    made = 0
    alive: weakref.WeakSet[Narrow]
    sizes: list[int]
    room: int

    def __init__(self, device: torch.device) -> None:
        type(self).made += 1
        self.alive.add(self)

    def filling(self) -> AbstractContextManager[object]:
        return nullcontext()

    def moved(self, rows: Tensor) -> Tensor:
        return rows

    def clear(self) -> None: ...

    def next(self, like: Tensor) -> Tensor:
        self.sizes.append(len(like))
        if len(like) > self.room:
            raise torch.OutOfMemoryError(FULL)
        return torch.full_like(like, 7)

    def copied(self, result: Tensor) -> Callable[[], None]:
        return lambda: None


def narrow(monkeypatch: pytest.MonkeyPatch, room: int) -> type[Narrow]:
    """Every stager from now on has room for so many patches."""
    kind = type("Narrow", (Narrow,), {"room": room, "sizes": [], "alive": weakref.WeakSet()})
    monkeypatch.setattr(staging, "slots_for", kind)
    return kind
