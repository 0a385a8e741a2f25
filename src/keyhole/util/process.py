"""Resident memory of this process, now and at its peak. Torch-free."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What `clear_refs` takes for: the peak starts again at what is resident now (proc(5))."""

_before_reset = 0


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes, such as VmRSS, VmHWM or VmData."""
    match = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"{STATUS} has no {name}"
    return int(match[1]) * 1024


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    On Linux it is VmHWM, also from before `reset_peak`: ru_maxrss of a child starts with its parent's memory.
    """
    if STATUS.exists():
        return max(_before_reset, status("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Let VmHWM start again at what is resident now; `peak_memory` still knows the peak from before.

    Raises:
        OSError: the system does not allow it.
    """
    global _before_reset
    before = status("VmHWM")
    CLEAR.write_text(RESET_PEAK)
    _before_reset = max(_before_reset, before)
