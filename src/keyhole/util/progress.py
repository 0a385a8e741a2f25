"""Shows how far the work is: a bar on a terminal, one plain line per interval elsewhere.

    epoch 3/30 ━━━━━━━━━╺━━ 112/160 00:41 1,830 patches/s, reading 1% encoding 84% learning 14%, peak 1.2 GB, loss 0.31

Does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from keyhole.util.budget import memory_text
from keyhole.util.platform import peak_memory

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from keyhole.util.timing import Timer


REDRAW_SECONDS = 0.25
"""Seconds between two states of the bar, as often as rich draws it."""


class Progress:
    """Counts images and patches, and shows them. Use as a context manager; safe to call from several threads.

    Args:
        total_images: number of images to process.
        description: name of the work, such as `epoch 3/30`.
        stream: where to show it, by default standard error; a terminal gets a bar.
        interval: seconds between plain lines.
        after: seconds that this work takes -> seconds that the rest of the run takes after it.
        device_bytes: returns the peak memory of the device so far, None or 0 without a device.
    """

    def __init__(
        self,
        total_images: int,
        description: str,
        stream: TextIO | None = None,
        interval: float = 10.0,
        after: Callable[[float], float] | None = None,
        device_bytes: Callable[[], int | None] | None = None,
    ) -> None:
        self.total_images, self.description, self.interval = total_images, description, interval
        self.after, self.device_bytes = after, device_bytes
        self.stream = stream or sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115 - as long as the process
        self.images, self.patches, self.waited, self.text = 0, 0, 0.0, ""
        self.timer: Timer | None = None
        self._start = self._shown = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._start = self._shown = time.monotonic()
        if self.stream.isatty():
            self._bar = _bar(self.stream)
            self._task = self._bar.add_task(self.description, total=self.total_images, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._bar is not None:
                self._show_bar()
                self._bar.stop()
                self._bar = None
            elif kind is None:
                say(self.status(finished=True), self.stream)

    def update(
        self,
        images: int = 0,
        patches: int = 0,
        waited: float = 0.0,
        text: str | None = None,
        timer: Timer | None = None,
    ) -> None:
        """Add images, patches and seconds waited for reading; show `text`, and shares of `timer` if given."""
        with self._lock:
            self.images += images
            self.patches += patches
            self.waited += waited
            self.text = self.text if text is None else text
            self.timer = timer or self.timer
            since = time.monotonic() - self._shown
            if self._bar is not None:
                if images or text is not None or since >= REDRAW_SECONDS:
                    self._show_bar()
            elif self.images < self.total_images and since >= self.interval:
                self._shown = time.monotonic()
                say(self.status(), self.stream)

    def line(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        with self._lock:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                say(text, self.stream)

    def status(self, finished: bool = False) -> str:
        seconds = time.monotonic() - self._start
        parts = [f"{self.description}: {self.images}/{self.total_images} images", *self._figures(seconds)]
        if finished:
            parts.append(f"{_duration(seconds)} taken")
        elif 0 < self.images < self.total_images:
            run = self._run_left(seconds)
            left = f"{_duration(seconds / self.images * (self.total_images - self.images))} left"
            parts.append(f"{left} and {run}" if run else left)
        return ", ".join(parts)

    def _run_left(self, seconds: float) -> str:
        if self.after is None or not self.images:
            return ""
        whole = seconds / self.images * self.total_images
        return f"{_duration(max(0.0, whole - seconds) + self.after(whole))} of the run"

    def _figures(self, seconds: float) -> list[str]:
        parts = []
        if self.patches:
            parts.append(f"{self.patches / max(seconds, 1e-9):,.0f} patches/s")
            if self.timer is None:
                parts.append(f"{min(self.waited / max(seconds, 1e-9), 1):.0%} waiting for reading")
            elif told := shares_text(self.timer.so_far(), seconds):
                parts.append(told)
        peaks = [memory_text(peak)] if (peak := peak_memory()) else []
        if self.device_bytes is not None and (device_bytes := self.device_bytes()):
            peaks.append(f"{memory_text(device_bytes)} on the device")
        return [*parts, *([f"peak {' and '.join(peaks)}"] if peaks else []), *([self.text] if self.text else [])]

    def _show_bar(self) -> None:
        assert self._bar is not None
        assert self._task is not None
        self._shown = time.monotonic()
        seconds = self._shown - self._start
        run = self._run_left(seconds)
        status = ", ".join([*self._figures(seconds), *([f"{run} left"] if run else [])])
        self._bar.update(self._task, completed=self.images, total=self.total_images, status=status)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, by default on standard error; a closed terminal or a full disk does not stop the work."""
    stream = sys.stderr if stream is None else stream
    if stream is None:  # `2>&-`
        return
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: the stream is closed
        forget(stream)


def forget(stream: TextIO) -> None:
    """Discard what is written to a standard stream from now on; otherwise Python tries it again at exit, and fails."""
    with contextlib.suppress(OSError, ValueError):
        if stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def shares_text(parts: Mapping[str, float], seconds: float) -> str:
    """Return the shares of `seconds` that went into each part, without those below half a percent.

    >>> shares_text({"reading": 0.1, "copying": 0.01, "encoding": 8.4, "learning": 1.4}, 10)
    'reading 1% encoding 84% learning 14%'
    """
    shares = {name: part / max(seconds, 1e-9) for name, part in parts.items()}
    return " ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def _bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        # The only column that may wrap, so that a narrow terminal loses nothing.
        TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=False)),
        console=Console(file=stream),
        refresh_per_second=4,
        # rich would send what is printed to our stream, also where standard output goes to a file
        redirect_stdout=sys.stdout.isatty(),
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
