"""Times a pass: seconds of reading, copying, encoding, scoring and learning.

    timer = Timer(device)
    with timer.part("encoding"):
        embedding = encoder(pixels)
    timer.seconds()                      # {"reading": 0.1, "copying": 0.0, "encoding": 3.9, ...}

Reading is the time that the consumer of patches waits for them. On a GPU the other parts are measured on the device,
between two events on the current stream, since the host only launches work; only `seconds` waits for the device. Host
and device work at the same time there, so the parts may sum to more than the time that passed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Part = Literal["reading", "copying", "encoding", "scoring", "learning"]

PARTS: tuple[Part, ...] = ("reading", "copying", "encoding", "scoring", "learning")

MAX_WAITING_EVENTS = 1024
"""Pairs of events that may wait for the device. If the host is further ahead, parts count as their mean."""


class Timer:
    """Measures seconds by part, on the one thread that consumes patches.

    Args:
        device: of the model; None measures nothing, at no cost.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.measures = device is not None
        self._events = _Events(device) if device is not None and device.type == "cuda" else None
        self._host = dict.fromkeys(PARTS, 0.0)
        self._inside: Part | None = None

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count the time inside for a part. Parts do not nest; switch streams outside of it."""
        if not self.measures:
            yield
            return
        assert self._inside is None, f"part `{name}` inside of `{self._inside}`"
        self._inside = name
        events = None if name == "reading" else self._events
        started = time.perf_counter()
        begun = None if events is None else events.begin()
        try:
            yield
        finally:
            self._inside = None
            if events is None:
                self._host[name] += time.perf_counter() - started
            else:
                events.end(name, begun)

    def so_far(self) -> dict[str, float]:
        """Return seconds by part, on a GPU of the work that it has finished; never waits."""
        device = {} if self._events is None else self._events.finished()
        return {name: self._host[name] + device.get(name, 0.0) for name in PARTS}

    def seconds(self) -> dict[str, float]:
        """Return seconds by part since the start or the last `reset`; on a GPU this waits for the device once."""
        if self._events is not None:
            self._events.wait()
        return self.so_far()

    def reset(self) -> None:
        """Start again from zero; on a GPU this waits for the device once."""
        if self._events is not None:
            self._events.wait()
            self._events.forget()
        self._host = dict.fromkeys(PARTS, 0.0)


NO_TIMER = Timer(None)
"""For callers who do not need the times."""


class _Events:
    """Pairs of events on a GPU; they are added up when the device has passed them, and used again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spare: list[torch.cuda.Event] = []
        self.waiting: deque[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.forget()

    def begin(self) -> torch.cuda.Event | None:
        self.collect()
        return self._record() if len(self.waiting) < MAX_WAITING_EVENTS else None

    def end(self, name: Part, begun: torch.cuda.Event | None) -> None:
        self.parts[name] += 1
        if begun is not None:
            self.waiting.append((name, begun, self._record()))

    def _record(self) -> torch.cuda.Event:
        import torch

        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def collect(self) -> None:
        """Add up the pairs that the device has passed; only the oldest one is queried."""
        while self.waiting and self.waiting[0][2].query():  # type: ignore[no-untyped-call]
            name, begun, ended = self.waiting.popleft()
            self.measured[name] += 1
            self.sums[name] += begun.elapsed_time(ended) / 1e3
            self.spare += [begun, ended]

    def finished(self) -> dict[Part, float]:
        """Return seconds by part; parts without events count as the mean of those with events."""
        self.collect()
        waiting = [name for name, _, _ in self.waiting]
        return {
            name: self.sums[name] * (self.parts[name] - waiting.count(name)) / self.measured[name]
            for name in PARTS
            if self.measured[name]
        }

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Start again from zero, without the pairs that still wait."""
        self.spare += [event for _, *pair in self.waiting for event in pair]
        self.waiting.clear()
        self.sums = dict.fromkeys(PARTS, 0.0)
        self.parts, self.measured = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
