"""Runs the parts of a call, each in a process group that ends at its limit, and keeps the Markdown up to date.

Whatever a part does (fail, hang, crash, leave processes behind), those after it run, and the Markdown tells of it. The
Markdown is written anew at most once a second while parts run and after each of them, so that a call that is cut loses
a second at most.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from on_gpu.calls import Part
from on_gpu.process import GRACE, Process
from on_gpu.result import Result

PART = Path(__file__).with_name("part.py")
LEAST = 8
"""Seconds below which a part is not begun."""
DRY_LIMIT = 240
"""Seconds of each part in a dry run: the limits are those of a GPU."""


@dataclass(frozen=True)
class Setting:
    """What all parts of a call are given.

    Attributes:
        scratch: a folder that they share.
        dry: tiny sizes on a CPU.
        mnist: folder of MNIST's files, if there is one.
        env: of their processes.
        log: receives every line.
    """

    scratch: Path
    dry: bool
    mnist: Path | None
    env: Mapping[str, str]
    log: IO[str]

    def start(self, part: Part, limit: float) -> Process:
        """Starts a part."""
        words = [part.name, "--seconds", f"{limit:.0f}", "--scratch", str(self.scratch)]
        words += ["--mnist", str(self.mnist)] if self.mnist else []
        if part.command or self.dry:
            return Process(part.command, [*words, "--dry"], self.env)
        return Process([sys.executable, "-u", str(PART), *words], words, self.env)

    def tell(self, name: str, line: str) -> None:
        print(f"{name}: {line}", flush=True)
        print(f"{time.strftime('%H:%M:%S')} {name}: {line}", file=self.log, flush=True)


def run_call(result: Result, setting: Setting, seconds: float, only: list[str] | None = None) -> bool:
    """Runs the stages; whether all parts ended well.

    Args:
        result: of the call; holds all that was found, and is written.
        setting: for the parts.
        seconds: after which the call ends, whatever is left of it.
        only: names of parts; the others are left out.
    """
    start = time.monotonic()
    for stage in result.call.stages:
        for part in stage:
            result.records[part.name].end = "" if only is None or part.name in only else "left out"
        parts = [part for part in stage if not result.records[part.name].end]
        left = start + seconds - time.monotonic() - GRACE
        if left < LEAST:
            for part in parts:
                result.records[part.name].end = "not run: no time was left"
        elif parts:
            _run_stage(parts, result, setting, left)
    result.note = f"{time.monotonic() - start:.0f} s in all"
    result.write()
    return all(record.end in ("done", "left out") for record in result.records.values())


def _run_stage(parts: list[Part], result: Result, setting: Setting, left: float) -> None:
    """Runs parts at the same time, for `left` seconds at most."""
    running: dict[str, tuple[Process, float]] = {}
    try:
        for part in parts:
            limit = min(DRY_LIMIT if setting.dry and not part.command else part.limit, left)
            setting.tell(part.name, f"== {part.shows} ({part.expected} s expected, {limit:.0f} s at most)")
            running[part.name] = setting.start(part, limit), limit
        _follow(running, result, setting)
    finally:  # also where this process was told to end
        for process, _ in running.values():
            process.end()


def _follow(running: dict[str, tuple[Process, float]], result: Result, setting: Setting) -> None:
    """Until all have ended; those leave `running`."""
    written = 0.0
    while running:
        time.sleep(0.05)
        for name, (process, limit) in list(running.items()):
            record, code = result.records[name], process.code()
            record.seconds = process.seconds
            lines, ended = process.lines(), ""
            if code is not None or process.seconds > limit:
                del running[name]
                lines += process.end()
                ended = _said(code, limit)
            for line in lines:
                record.lines.append(line)
                setting.tell(name, line)
            if ended:
                record.end = ended
                setting.tell(name, f"== {ended}, {record.seconds:.1f} s")
                written = 0.0
        if time.monotonic() > written + 1:
            result.write()
            written = time.monotonic()


def _said(code: int | None, limit: float) -> str:
    """How a part ended."""
    if code is None:
        return f"stopped at its limit of {limit:.0f} s"
    return "done" if code == 0 else f"failed with exit code {code}" if code > 0 else f"killed by signal {-code}"
