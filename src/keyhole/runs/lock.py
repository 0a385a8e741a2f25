"""One process at a time may write a run folder; the file `lock` in it names the process.

Two mechanisms guard the folder, since neither is enough alone:

- `flock`: the kernel releases it when the process ends; on some shared file systems it works on one host only.
- the content of the file (host, process, start time) and its modification time, which the holder renews. A process of
  this machine is dead if it does not exist, any other if it has not renewed the file for `DEAD` seconds.

A folder in use is refused; nothing waits for a lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

from keyhole.errors import OutputError, RunError
from keyhole.util.platform import (
    REMOVES_OPEN_FILES,
    after_fork,
    boot_id,
    has_ended,
    lock_file,
    process_namespace,
    read_at,
    start_of_process,
)

NAME = "lock"
BEAT = 15.0
"""Seconds between two heartbeats."""
DEAD = 180.0
"""Seconds without a heartbeat after which a process on another machine counts as dead."""
SETTLE = 1.0
"""Seconds to wait for another machine that takes over the same lock at the same time."""


@dataclass(frozen=True)
class Holder:
    """The process that a lock names."""

    token: str  # random, so that no two locks are equal
    host: str
    kernel: str  # boot id of the machine; `flock` is reliable between processes of one kernel
    space: str  # process namespace, within which the pid is valid
    pid: int
    born: str  # start of the process by the kernel's clock, empty if unknown
    started: str  # when it took the lock, for people

    @classmethod
    def this(cls) -> Holder:
        host, pid, now = socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(uuid.uuid4().hex, host, boot_id(), process_namespace(), pid, start_of_process(pid), now)

    @classmethod
    def read(cls, text: bytes) -> Holder | None:
        try:
            holder = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        return holder if isinstance(holder.pid, int) else None

    def ended(self, seen_from: Holder) -> bool:
        """Return True if the process `seen_from` can see that this one has ended."""
        return (self.kernel, self.space) == (seen_from.kernel, seen_from.space) and has_ended(self.pid, self.born)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started},"


class RunLock:
    """Holds the right to write a run folder until `release`; RunError if another process holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.holder = folder, Holder.this()
        self._end = threading.Event()
        self._guard = threading.Lock()
        self._file = -1
        try:
            self._take()
        except OSError as error:
            self._close()
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror or error}). Free space or get permission, then again."
            ) from error
        except BaseException:
            self._close()
            raise
        _held.add(self)
        threading.Thread(target=self._beat, name="keyhole-lock", daemon=True).start()

    @property
    def path(self) -> Path:
        return self.folder / NAME

    def check(self) -> None:
        """Raise RunError if another process has taken over, as after a long sleep of this machine."""
        try:
            named = Holder.read(self.path.read_bytes())
        except OSError:
            named = None
        if named != self.holder:
            what = f"{self.path} was deleted" if named is None else f"{named} took it over"
            raise RunError(
                f"{self.folder}: this process does not own the run any more, {what}. "
                "It ends without writing; what was saved before is whole."
            )

    def release(self) -> None:
        """Give up the right, and delete the file if it still names this process."""
        if self._end.is_set():
            return
        with contextlib.suppress(OSError):  # a folder that is gone has no lock to delete
            if Holder.read(self.path.read_bytes()) == self.holder:
                if not REMOVES_OPEN_FILES:
                    self._close()
                self.path.unlink()
        self._close()

    def _take(self) -> None:
        created, alone = self._open()
        text = read_at(self._file, 10_000, 0)
        named, other = Holder.read(text), False
        if not created:
            same = named is not None and named.kernel == self.holder.kernel
            # the writer of a file that names no process was killed before it wrote
            dead = (alone is True and (named is None or same)) or (named is not None and named.ended(self.holder))
            if not dead and self._age() < DEAD:
                raise self._refusal(named)
            other = not same
        try:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, json.dumps(asdict(self.holder)).encode() + b"\n")
            os.fsync(self._file)
        except OSError:
            self.path.unlink(missing_ok=True)  # it does not name this process
            raise
        if other and not (named is None and alone is True):
            time.sleep(SETTLE)
            self.check()

    def _open(self) -> tuple[bool, bool | None]:
        """Open the file; return whether it is new, and whether `flock` reports that no other process holds it."""
        while True:
            try:
                self._file, created = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:
                try:
                    self._file, created = os.open(self.path, os.O_RDWR), False
                except FileNotFoundError:
                    continue  # its holder has just deleted it
            alone = lock_file(self._file)
            if alone is False:
                raise self._refusal(Holder.read(read_at(self._file, 10_000, 0)))
            with contextlib.suppress(FileNotFoundError):  # its holder may have deleted it, and another created it
                if os.path.samestat(self.path.stat(), os.fstat(self._file)):
                    return created, alone
            os.close(self._file)

    def _age(self) -> float:
        """Return the seconds since the last heartbeat by the clock of the file system, since clocks of hosts differ."""
        with tempfile.TemporaryFile(dir=self.folder) as now:
            now.write(b" ")
            now.flush()
            return os.fstat(now.fileno()).st_mtime - os.fstat(self._file).st_mtime

    def _refusal(self, named: Holder | None) -> RunError:
        run = self.folder
        if named is None:
            return RunError(
                f"{run}: another process is working on this run. Wait until it ends, or stop it. "
                f"If you know that there is none, delete {self.path}."
            )
        seen = named.kernel == self.holder.kernel
        away = "" if seen else f" If that process is dead, wait {DEAD / 60:.0f} minutes or delete {self.path}."
        return RunError(
            f"{run}: {named} is working on this run. Wait until it ends, or stop it there (kill {named.pid}); "
            f"then go on with: keyhole resume {run}.{away}"
        )

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            with self._guard, contextlib.suppress(OSError):  # `check` reports it before the next write
                if self._file >= 0:
                    os.utime(self._file)

    def _close(self) -> None:
        with self._guard:
            self._end.set()
            self.close_file()

    def close_file(self) -> None:
        """Close the file. A forked child must do so too, or it would hold the lock after its parent has ended."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_held):
        lock.close_file()


after_fork(_close_in_child)


def is_held(folder: Path) -> bool:
    """Return True if a running process holds the lock of a folder, or if this process may not open the lock."""
    try:
        RunLock(folder).release()
    except (RunError, OutputError):
        return True
    return False
