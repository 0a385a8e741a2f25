"""Caps of memory that overlap: the lowest holds, and in the end nothing is left of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import keyhole
from keyhole.engine.memory.pace import cap
from keyhole.engine.memory.plan import SHARED_TILE_BYTES, Plan
from keyhole.images.tile_cache import TILE_CACHE

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_caps_of_a_process_may_end_in_any_order(first_ends_first: bool) -> None:
    tiles, first, second = TILE_CACHE.shared_limit, ExitStack(), ExitStack()
    with first, second:
        first.enter_context(cap(Plan(named=True), CPU))
        second.enter_context(cap(Plan(named=True), CPU))
        (first if first_ends_first else second).close()
        assert TILE_CACHE.shared_limit == SHARED_TILE_BYTES < tiles, "what the plan counts"
        (second if first_ends_first else first).close()
    assert TILE_CACHE.shared_limit == tiles


def test_a_budget_that_the_user_has_not_named_changes_nothing() -> None:
    tiles = TILE_CACHE.shared_limit
    with cap(Plan(budget=8 * 10**9), CPU):
        assert TILE_CACHE.shared_limit == tiles


def test_predictions_taken_in_turn_leave_no_cap(toy_run: Path, toy: Path) -> None:
    tiles, files = TILE_CACHE.shared_limit, sorted(toy.rglob("*.png"))
    predictor = keyhole.load(toy_run, device="cpu", memory="8GB")
    assert len(list(zip(predictor.predict_many(files[:5]), predictor.predict_many(files[:6]), strict=False))) == 5
    assert TILE_CACHE.shared_limit == tiles


class Allocator:
    """Stands in for torch's allocator on two GPUs of 80 GB: what share each may have, and what it holds back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reserved: int = 0) -> None:
        self.share, self.reserved, self.emptied = {0: 1.0, 1: 1.0}, reserved, 0
        monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", self.share.__getitem__)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.set_share)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.reserved)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)

    def set_share(self, share: float, index: int) -> None:
        self.share[index] = share

    def empty(self) -> None:
        self.emptied += 1


def test_caps_of_a_gpu_may_end_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, first, second = Allocator(monkeypatch), ExitStack(), ExitStack()
    with first, second:
        first.enter_context(cap(Plan(budget=40 * 10**9), SECOND))
        second.enter_context(cap(Plan(budget=60 * 10**9), SECOND))
        assert allocator.share == {0: 1.0, 1: 0.5}, "the lowest, on the GPU that it is for"
        first.close()
        assert allocator.share[1] == 0.75
        second.close()
    assert allocator.share[1] == 1.0


def test_a_limit_of_the_users_own_on_a_gpu_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    allocator.share[1] = 0.25
    with cap(Plan(budget=40 * 10**9), SECOND):
        assert allocator.share[1] == 0.25
    assert allocator.share[1] == 0.25


@pytest.mark.parametrize(("reserved", "emptied"), [(30 * 10**9, 0), (50 * 10**9, 1)])
def test_call_after_call_memory_of_a_gpu_is_used_again(
    monkeypatch: pytest.MonkeyPatch, reserved: int, emptied: int
) -> None:
    allocator = Allocator(monkeypatch, reserved)
    with cap(Plan(budget=40 * 10**9), SECOND):
        assert allocator.emptied == emptied, "only what exceeds the budget has to go back"
