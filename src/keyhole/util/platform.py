"""Hides what differs between operating systems: memory, cores, file locks, signals and processes.

Other modules do not import `resource`, `fcntl` or `ctypes` and do not read `/proc`; each function here says what it
returns where the system lacks something. Tests hide what Windows lacks, but run on Linux. Does not import torch.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ASSUMED_MEMORY = 2**32
"""Bytes of memory that are assumed where the system does not say how much it has."""
RESTART_PEAK = "5"
"""Written to `clear_refs`, it sets the peak to what is resident now (proc(5))."""
BROKEN_PIPE_EXIT = 128 + 13
"""Exit code of a program whose output nobody reads; 13 is SIGPIPE."""

_peak_before_restart = 0


# Memory


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; its peak where only that is known, 0 where nothing is."""
    return _status("VmRSS") or peak_memory()


def peak_memory(since_restart: bool = False) -> int:
    """Return the largest resident memory of this process, or since the last `restart_peak`; 0 if unknown."""
    peak = _status("VmHWM")  # on Linux, ru_maxrss of a child starts with its parent's memory
    if not peak and resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak if since_restart else max(peak, _peak_before_restart)


def restart_peak() -> bool:
    """Set the peak to what is resident now, and return whether that worked, as on Linux outside some containers."""
    global _peak_before_restart
    before = _status("VmHWM")
    try:
        Path("/proc/self/clear_refs").write_text(RESTART_PEAK)
    except OSError:
        return False
    _peak_before_restart = max(_peak_before_restart, before)
    return before > 0


def total_memory() -> int:
    """Return the memory of this machine in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return ASSUMED_MEMORY


def available_memory() -> int:
    """Return the bytes that this process can still take without swapping, within the limit of its container."""
    free = [total_memory()]
    if match := re.search(r"^MemAvailable:\s+(\d+)", _text("/proc/meminfo"), re.MULTILINE):
        free = [int(match[1]) * 1024]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, now = _text(limit).strip(), _text(used).strip()
        if most.isdigit() and now.isdigit():  # else it is "max"
            free.append(max(int(most) - int(now), 0))
    return min(free)


def libc(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None if it is missing, as `mallopt` is outside Linux."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (TypeError, OSError):  # Windows
        return None


def _status(name: str) -> int:
    """Return a figure of /proc/self/status in bytes, such as VmRSS; 0 if it is missing."""
    match = re.search(rf"^{name}:\s+(\d+) kB", _text("/proc/self/status"), re.MULTILINE)
    return 0 if match is None else int(match[1]) * 1024


def _text(path: str) -> str:
    """Return the text of a system file; "" if it does not exist."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# Processes


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def boot_id() -> str:
    """Return an identifier of this machine since its start; its host name where the system has none."""
    return _text("/proc/sys/kernel/random/boot_id").strip() or socket.gethostname()


def process_namespace() -> str:
    """Return the namespace of this process's number; "" where the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - not a path
    except OSError:
        return ""


def start_of_process(pid: int) -> str:
    """Return when a process started, in ticks since the boot, which tells reused numbers apart; "" if unknown."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def has_ended(pid: int, start: str) -> bool:
    """Return whether a process that began at `start` (see `start_of_process`) has ended; False if that is unknown."""
    if os.name != "posix":  # signal 0 would end the process on Windows
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return start != start_of_process(pid)


def after_fork(function: Callable[[], None]) -> None:
    """Call a function in each child that this process forks, where processes can be forked."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def signal_numbers(*names: str) -> list[int]:
    """Return the numbers of the signals that this system has."""
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


# Files

REMOVES_OPEN_FILES = os.name == "posix"
"""A file can be removed while it is open."""
_seeking = threading.Lock()


def lock_file(handle: int) -> bool | None:
    """Lock an open file until it is closed; False if another process holds the lock, None without support for locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise
    return True


def read_at(handle: int, count: int, offset: int) -> bytes:
    """Return up to `count` bytes of an open file from `offset` on."""
    if hasattr(os, "pread"):
        return os.pread(handle, count, offset)
    with _seeking:
        os.lseek(handle, offset, os.SEEK_SET)
        return os.read(handle, count)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to disk; only POSIX systems can do this."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
