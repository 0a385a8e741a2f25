"""Ctrl-C, SIGTERM and the signals of clusters: the loop checks for them between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from keyhole.util.platform import signal_numbers


class StopRequested(Exception):  # noqa: N818 - an event, not an error
    """A signal came. Raised only where stopping loses no work."""


NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Signals that save and stop: Ctrl-C, termination, a lost terminal, and a cluster's warning before its time limit."""


class Interrupt:
    """Context manager that catches the signals of `NAMES`; a second SIGINT stops at once.

    An ignored SIGHUP stays ignored, as under `nohup`. Outside the main thread, where Python allows no handlers, it
    catches nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in signal_numbers(*NAMES):
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def check(self, *_: object) -> None:
        """Raise StopRequested if a signal came."""
        if self.signal is not None:
            raise StopRequested
