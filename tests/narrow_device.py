"""Stands in for a GPU's buffers, on the CPU: with room for a few patches; it refuses more as torch does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from keyhole.engine import to_device as staging

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"


class Narrow:
    """Buffers for `room` patches.

    Attributes:
        made: how many of these there have been.
        alive: those that are left.
        sizes: rows that each buffer was asked for.
        waited: the places in `sizes` of the copies that were waited for.
    """

    made = 0
    alive: weakref.WeakSet[Narrow]
    sizes: list[int]
    waited: list[int]
    room: int

    def __init__(self, device: torch.device) -> None:
        type(self).made += 1
        self.alive.add(self)
        self._failed = False

    def filling(self) -> AbstractContextManager[object]:
        return nullcontext()

    def moved(self, rows: Tensor) -> Tensor:
        return rows

    def clear(self) -> None:
        self._failed = False

    def next(self, like: Tensor) -> Tensor:
        assert not self._failed, "a buffer is used again after a failure, and was not given back"
        self.sizes.append(len(like))
        if len(like) > self.room:
            self._failed = True
            raise torch.OutOfMemoryError(FULL)
        return torch.full_like(like, 7)

    def copied(self, result: Tensor) -> Callable[[], None]:
        place = len(self.sizes) - 1
        return lambda: self.waited.append(place)


def narrow(monkeypatch: pytest.MonkeyPatch, room: int) -> type[Narrow]:
    """Give every stager from now on room for `room` patches."""
    kind = type("Narrow", (Narrow,), {"room": room, "sizes": [], "waited": [], "alive": weakref.WeakSet()})
    monkeypatch.setattr(staging, "slots_for", kind)
    return kind
