"""`keyhole train` with the arguments given; prints the peak of its resident memory, then what is resident after each
epoch, in bytes. For host_memory.py and tests/test_told.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from keyhole.cli.main import main
from keyhole.training.loop import Loop

STATUS = Path("/proc/self/status")
after: list[int] = []


def resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def end_epoch(loop: Loop, row: dict[str, float]) -> None:
    ended(loop, row)
    after.append(resident("VmRSS"))


ended, Loop.end_epoch = Loop.end_epoch, end_epoch  # type: ignore[method-assign]
code = main(["train", *sys.argv[1:]])
print(resident("VmHWM"), *after)
sys.exit(code)
