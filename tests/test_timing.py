"""Where the time goes: every second in one part, measured on the device where the work is, without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from on_device import DRY, GPU, no_waiting
from processes import run_process

import keyhole.util.timing
from keyhole.util.timing import NO_TIMER, PARTS, Timer

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock of the host that a test sets."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(keyhole.util.timing.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_on_the_host_each_part_has_the_time_spent_inside_it(clock: Any) -> None:
    timer = Timer(CPU)
    for name, seconds in (("reading", 1.0), ("encoding", 5.0), ("reading", 0.5)):
        clock.now += 10  # of nobody
        with timer.part(name):  # type: ignore[arg-type]
            clock.now += seconds
    expected = dict.fromkeys(PARTS, 0.0) | {"reading": 1.5, "encoding": 5.0}
    assert timer.seconds() == timer.so_far() == expected
    timer.reset()
    assert timer.seconds() == dict.fromkeys(PARTS, 0.0)


def test_an_error_inside_a_part_is_counted_and_ends_it(clock: Any) -> None:
    timer = Timer(CPU)

    def fail() -> None:
        with timer.part("learning"):
            clock.now += 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with timer.part("reading"):
        clock.now += 1
    assert (timer.seconds()["learning"], timer.seconds()["reading"]) == (2.0, 1.0)


def test_parts_do_not_nest() -> None:
    timer = Timer(CPU)
    with (
        pytest.raises(AssertionError, match="`scoring` inside of `encoding`"),
        timer.part("encoding"),
        timer.part("scoring"),
    ):
        pass


def test_whoever_does_not_ask_pays_nothing_and_may_nest() -> None:
    with NO_TIMER.part("encoding"), NO_TIMER.part("scoring"):
        pass
    assert NO_TIMER.seconds() == dict.fromkeys(PARTS, 0.0)


def test_torch_is_not_loaded_for_it() -> None:
    assert run_process("imported", "torch", "timing").stdout == "[]\n"


# The bookkeeping of events, on a device that is made up: it does its work when a test says so.


class Device:
    """Milliseconds of work in order, done up to `passed` events."""

    def __init__(self) -> None:
        self.time, self.events, self.passed, self.waits = 0.0, 0, 0, 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            made.events += 1
            self.number, self.time = made.events, made.time

        def query(self) -> bool:
            return made.passed >= self.number

        def elapsed_time(self, end: Event) -> float:
            assert self.query()
            assert end.query()
            return end.time - self.time

    def wait(_: object) -> None:
        made.waits += 1
        made.passed = made.events

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    return made


def work(timer: Timer, device: Device, name: Any, milliseconds: float) -> None:
    with timer.part(name):
        device.time += milliseconds


def test_on_a_device_parts_are_measured_there_and_only_the_end_waits(device: Device) -> None:
    timer = Timer(torch.device("cuda"))
    for _ in range(10):
        work(timer, device, "encoding", 300)
        work(timer, device, "scoring", 100)
    assert sum(timer.so_far().values()) == 0  # nothing is done yet
    device.passed = 4
    assert (timer.so_far()["encoding"], timer.so_far()["scoring"]) == (0.3, 0.1)
    assert device.waits == 0
    assert timer.seconds()["encoding"] == pytest.approx(3.0)
    assert timer.seconds()["scoring"] == pytest.approx(1.0)
    assert device.waits == 2
    timer.reset()
    assert sum(timer.seconds().values()) == 0


def test_reading_is_measured_on_the_host_also_with_a_device(device: Device, clock: Any) -> None:
    timer = Timer(torch.device("cuda"))
    with timer.part("reading"):
        clock.now += 1.5
    assert timer.so_far()["reading"] == 1.5
    assert device.events == 0


def test_a_host_far_ahead_keeps_a_bounded_number_of_events_and_the_sum(device: Device) -> None:
    timer = Timer(torch.device("cuda"))
    total = 3 * keyhole.util.timing.MAX_WAITING_EVENTS
    for _ in range(total):
        work(timer, device, "encoding", 2)
    assert device.events == 2 * keyhole.util.timing.MAX_WAITING_EVENTS
    assert timer.seconds()["encoding"] == pytest.approx(total * 0.002)  # those without events at the mean


@pytest.mark.cuda
def test_on_a_gpu_a_part_has_the_time_of_its_kernels_though_the_host_is_done_at_once() -> None:
    timer = Timer(GPU)
    matrix = torch.randn(*[64 if DRY else 8192] * 2, device=GPU)
    (matrix @ matrix).sum().item()
    with no_waiting():
        for _ in range(20):
            with timer.part("encoding"):
                matrix = matrix @ matrix
            timer.so_far()
    begun = time.perf_counter()
    found = timer.seconds()
    waited = time.perf_counter() - begun
    assert found["encoding"] > 0
    assert DRY or found["encoding"] >= 0.5 * waited
    assert sum(found.values()) == found["encoding"]
