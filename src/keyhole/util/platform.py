"""What differs between operating systems: the memory of this process.

Other modules do not import `resource` and do not read `/proc`; they ask here. Does not import torch.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

RESTART_PEAK = "5"
"""Written to `clear_refs`, it sets the peak to what is resident now (proc(5))."""

_peak_before_restart = 0


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; its peak where the system tells no more, 0 where nothing."""
    return _status("VmRSS") or peak_memory()


def peak_memory(since_restart: bool = False) -> int:
    """Return the largest resident memory of this process so far in bytes; 0 where the system does not tell it.

    Args:
        since_restart: count from the last `restart_peak`.
    """
    peak = _status("VmHWM")  # on Linux, ru_maxrss of a child starts with its parent's memory
    if not peak and resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak if since_restart else max(peak, _peak_before_restart)


def restart_peak() -> bool:
    """Set the peak to what is resident now; `peak_memory` still knows the peak from before.

    Returns:
        Whether the system can do this: Linux can, unless a container forbids it.
    """
    global _peak_before_restart
    before = _status("VmHWM")
    try:
        Path("/proc/self/clear_refs").write_text(RESTART_PEAK)
    except OSError:
        return False
    _peak_before_restart = max(_peak_before_restart, before)
    return before > 0


def libc(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None where it does not have it, as `mallopt` outside of Linux."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except TypeError:  # Windows
        return None


def _status(name: str) -> int:
    """Return a figure of /proc/self/status in bytes, such as VmRSS; 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return 0 if match is None else int(match[1]) * 1024
