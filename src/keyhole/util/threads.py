"""Threads that read files under a time limit, so that nothing waits forever.

They are daemons: `concurrent.futures` joins its threads at exit, so one read that hangs on a network share would keep
the process alive. A task that reads nothing for `stall` seconds fails with an error that names its file, and its thread
is replaced. Code that reads calls `beat` after each read.

At exit the process waits for reads for a short time: a library that is in the middle of a read while Python shuts down
may hold a lock forever, as HDF5 does, and the main thread would wait for it.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from keyhole.errors import StalledRead
from keyhole.util.platform import cores

T = TypeVar("T")
MAX_LINGER_SECONDS = 5.0
"""Time that the process waits for reads at exit; one that takes longer hangs."""
_here = threading.local()


def beat() -> None:
    """Restart the time limit of the task on this thread, which has just read something; no effect on other threads."""
    task = getattr(_here, "task", None)
    if task is not None:
        task.since = time.monotonic()


def given_up() -> bool:
    """Return whether the task on this thread was given up; hold the threads' lock while you act on it."""
    task = getattr(_here, "task", None)
    return task is not None and task.lost


def default_threads(beside_gpu: bool = False) -> int:
    """Return one thread per core that this process may use, at most 16; see `reading_cores`."""
    return min(reading_cores(cores(), beside_gpu), 16)


def reading_cores(available: int, beside_gpu: bool) -> int:
    """Return the cores for reading: beside a GPU, one of more than 2 is left to the thread that launches work."""
    return available - 1 if beside_gpu and available > 2 else available


@dataclass(eq=False)
class ReadTask(Generic[T]):
    """A function for a reading thread, and its result."""

    name: str  # the file, for messages
    function: Callable[[], T] | None
    urgent: bool = False
    since: float | None = None  # when it started or last called `beat`
    thread: threading.Thread | None = None  # that runs it
    done: bool = False
    awaited: bool = False  # another thread waits for it
    lost: bool = False  # given up; its thread is still in it
    followers: list[ReadTask[Any]] = field(default_factory=list)  # queued when this one has ended
    error: BaseException | None = None
    result: list[T] = field(default_factory=list)

    def value(self) -> T:
        """Return what the function returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.result[0]


class ReadingThreads:
    """Daemon threads that take tasks in order, urgent ones first.

    Attributes:
        lock: guards the threads and what is built on them. It is reentrant: the garbage collector may close an
            abandoned stream in the middle of any statement of any thread.
        changed: notified when a task ends that a thread waits for, and by users of the lock. Waking a thread takes some
            tens of microseconds, so no other task notifies it.
    """

    def __init__(self, count: int | None, stall: float) -> None:
        self.count = default_threads() if count is None else count
        self.stall = stall
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.closed = False
        self._work = threading.Condition(self.lock)
        self._queue: deque[ReadTask[Any]] = deque()
        self._urgent: deque[ReadTask[Any]] = deque()
        self._running: set[ReadTask[object]] = set()
        self._started = 0
        self._threads: list[threading.Thread] = []
        _all_threads.add(self)

    def submit(
        self, name: str, function: Callable[[], T], urgent: bool = False, after: ReadTask[Any] | None = None
    ) -> ReadTask[T]:
        """Queue a function that reads the file `name`; urgent ones are taken first.

        With `after`, it waits until that task has ended or failed and is then taken before all that are queued, so that
        no thread waits in between and later tasks do not overtake it.
        """
        task = ReadTask(name, function, urgent)
        with self.lock:
            if self.closed:
                raise RuntimeError("the reader is closed")
            if after is not None and not after.done:
                after.followers.append(task)
                return task
            (self._urgent if urgent else self._queue).append(task)
            while self._started < self.count:
                self._start()
            self._work.notify()
        return task

    def run_here(self, name: str, function: Callable[[], T]) -> ReadTask[T]:
        """Return a task that this thread has done: for functions that read no file, since nothing limits their time."""
        task: ReadTask[T] = ReadTask(name, None, done=True)
        try:
            task.result.append(function())
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            task.error = error
        return task

    def wait(self, task: ReadTask[T], stop: Callable[[], bool] = lambda: False, seconds: float = math.inf) -> None:
        """Wait until the task is done, `stop()` is true, or `seconds` have passed.

        `stop` is called after each change: code that makes it true has to notify `changed`.
        """
        end = time.monotonic() + seconds
        with self.lock:
            while not task.done and not stop():
                if self.closed:
                    raise RuntimeError("the reader was closed while it was read from")
                now = time.monotonic()
                if now >= end:
                    return
                # a task that starts in the meantime cannot be late before `stall` from now
                late = self.stall + min((running.since or now for running in self._running), default=now)
                if late <= now:
                    self._give_up(now)
                else:
                    task.awaited = True
                    self.changed.wait(max(min(late, end) - now, 0.001))

    def pause(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Wait for `seconds`, or until `stop()` is true, which is called as in `wait`."""
        end = time.monotonic() + seconds
        with self.lock:
            while not (stop() or self.closed) and (left := end - time.monotonic()) > 0:
                self.changed.wait(left)

    def close(self) -> None:
        """Drop what is queued and let the threads end. Does not wait: one may be stuck in a read."""
        with self.lock:
            self.closed = True
            self._queue.clear()
            self._urgent.clear()
            self._work.notify_all()
            self.changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait up to `seconds` for the threads to end, after `close`."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _give_up(self, now: float) -> None:
        for task in [task for task in self._running if now - (task.since or now) >= self.stall]:
            problem = (
                f"no data for {self.stall:g} s: the disk or network share does not answer. "
                "Copy the file to a local disk, or raise the limit (run.stall)"
            )
            task.lost = task.awaited = True
            self._end(task, [], StalledRead(task.name, problem))
            self._threads = [thread for thread in self._threads if thread is not task.thread]
            self._start()

    def _end(self, task: ReadTask[Any], result: list[Any], error: BaseException | None) -> None:
        """Store the result of a task, and queue what follows it, in order, before all else."""
        task.function, task.result, task.error, task.done = None, result, error, True
        self._running.discard(task)
        if not self.closed:
            for each in reversed(task.followers):
                (self._urgent if each.urgent else self._queue).appendleft(each)
            self._work.notify(len(task.followers))
        task.followers.clear()
        if task.awaited:
            self.changed.notify_all()

    def _start(self) -> None:
        self._started += 1
        self._threads.append(threading.Thread(target=self._run, name=f"keyhole-read-{self._started}", daemon=True))
        self._threads[-1].start()

    def _run(self) -> None:
        while True:
            with self.lock:
                while not (self._queue or self._urgent or self.closed):
                    self._work.wait()
                if self.closed:
                    return
                task = (self._urgent or self._queue).popleft()
                function, task.since, task.thread = task.function, time.monotonic(), threading.current_thread()
                self._running.add(task)
            assert function is not None
            _here.task = task
            result: list[object] = []
            error: BaseException | None = None
            try:
                result.append(function())
            except BaseException as caught:  # noqa: BLE001 - raised again in the thread that waits
                error = caught
            _here.task = None
            with self.lock:
                if task.lost:  # another thread has taken this one's place
                    return
                self._end(task, result, error)
            del task, function, result, error  # an idle thread must not keep pixels or open files alive


_all_threads: weakref.WeakSet[ReadingThreads] = weakref.WeakSet()


def end_reading() -> None:
    """End all reading threads, so that none is in the middle of a read when Python shuts down."""
    end = time.monotonic() + MAX_LINGER_SECONDS
    for threads in list(_all_threads):
        threads.close()
        threads.join(max(0.0, end - time.monotonic()))


def end_reading_first() -> None:
    """End reads before a library that was just imported shuts down: what is registered last is called first."""
    atexit.unregister(end_reading)
    atexit.register(end_reading)


end_reading_first()
