"""A part's process, in a group of its own: started, read without waiting, and ended with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""
STEP = 0.02


class Started(Protocol):
    """A process: its id is that of its group too."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""


class Forked:
    """A copy of this process that runs a part, as a dry run does it: torch is loaded once instead of in each part.

    This process must have no other thread that holds a lock.
    """

    def __init__(self, arguments: Sequence[str], output: int, env: Mapping[str, str]) -> None:
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(arguments, output, env)

    def _run(self, arguments: Sequence[str], output: int, env: Mapping[str, str]) -> None:
        """All that the copy does; never returns."""
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            os.environ.update(env)

            from on_gpu.part import main

            main(arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # noqa: BLE001 - as the interpreter itself would
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code


class Process:
    """A part at work.

    Args:
        command: to run; without one a copy of this process runs `arguments` as a part.
        arguments: of `part.py`.
        env: variables of the process.
    """

    def __init__(self, command: Sequence[str], arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.start = time.monotonic()
        self._output, end = os.pipe()
        self._rest = b""
        os.set_blocking(self._output, False)
        self._process: Started = (
            subprocess.Popen(
                command, stdout=end, stderr=end, stdin=subprocess.DEVNULL, env=dict(env), start_new_session=True
            )
            if command
            else Forked(arguments, end, env)
        )
        os.close(end)

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.start

    def lines(self) -> list[str]:
        """The lines that it, and what it has started, have written since the last call."""
        with suppress(BlockingIOError):
            while block := os.read(self._output, 2**16):
                self._rest += block
        *whole, self._rest = self._rest.split(b"\n")
        return [line.decode(errors="backslashreplace").rstrip() for line in whole]

    def code(self) -> int | None:
        """The exit code once it has ended, negative for a signal."""
        return self._process.poll()

    def end(self) -> list[str]:
        """Ends all of its group that is left; returns its last lines."""
        if self.code() is None:
            self._signal(signal.SIGTERM)
            self._wait()
        self._signal(signal.SIGKILL)
        self._wait()
        self._rest += b"\n" if self._rest else b""
        said = self.lines()
        os.close(self._output)
        return said

    def _wait(self) -> None:
        """Some seconds at most: a process that hangs in a driver ignores even SIGKILL."""
        end = time.monotonic() + GRACE
        while self.code() is None and time.monotonic() < end:
            time.sleep(STEP)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
