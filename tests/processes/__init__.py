"""Code that tests run in a process of its own, one file each, and how it is run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT = 120
"""Seconds until a test gives up on a process."""


def command(name: str, *arguments: object) -> list[str]:
    """The command line of a file of this folder."""
    return [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """That of this process, with one thread for arithmetic and the given variables."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | variables


def run_process(name: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a file of this folder to its end, which must be a success; `options` are those of `subprocess.run`."""
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300}
    settings |= {"env": environment(), "check": False, "text": True} | options
    done = subprocess.run(command(name, *arguments), **settings)
    assert done.returncode == 0, done.stderr
    return done


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Wait until something is true of a process; fail where it ends first."""
    end = time.monotonic() + TIMEOUT
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the process did not get there"
        time.sleep(0.001)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL
