"""Memory of this process, for the files beside this one."""

import re
from pathlib import Path


def memory(what: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the peak; not ru_maxrss, with which a child starts where its parent is)."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
