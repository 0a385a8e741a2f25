"""Threads that read files under a stall limit, so that nothing can wait for ever.

They are daemons: `concurrent.futures` joins its threads at exit, so one read that hangs on a network share
would keep the whole process alive. A task that gives no sign of life for `stall` seconds is given up with an
error that names it, and its thread is replaced. `beat` is that sign; whatever reads calls it after each read.

The end of the process waits for them, but not for long: a library that is in the middle of a read while Python shuts
down may hold a lock for ever, as HDF5's, for which the main thread then waits for ever.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from keyhole.errors import StalledRead
from keyhole.util.platform import cores

T = TypeVar("T")
LINGER = 5.0
"""Seconds that the end of the process waits for reads under way; longer ones hang."""
_here = threading.local()


def beat() -> None:
    """Say that the task on this thread has just read something; its time starts again. Elsewhere: nothing."""
    task = getattr(_here, "task", None)
    if task is not None:
        task.since = time.monotonic()


def given_up() -> bool:
    """Whether the task on this thread has been given up meanwhile, so that nobody will take what it returns.

    Call it under the pool's lock to decide by it.
    """
    task = getattr(_here, "task", None)
    return task is not None and task.lost


def default_threads(beside_gpu: bool = False) -> int:
    """One thread per core that this process may use, at most 16.

    Args:
        beside_gpu: whether one more thread gives work to a GPU; see `reading_cores`.
    """
    return min(reading_cores(cores(), beside_gpu), 16)


def reading_cores(available: int, beside_gpu: bool) -> int:
    """Cores for the threads that read.

    With a GPU and more than 2 cores one is left to the thread that launches the work: while it waits, the GPU does.
    """
    return available - 1 if beside_gpu and available > 2 else available


class Task(Generic[T]):
    """A function handed to the pool, and what became of it. `name` is the file, for messages."""

    def __init__(self, name: str, function: Callable[[], T], urgent: bool = False) -> None:
        self.name = name
        self.function: Callable[[], T] | None = function
        self.urgent = urgent
        self.since: float | None = None  # when it started or last gave a sign of life
        self.thread: threading.Thread | None = None  # that runs it
        self.done = False
        self.awaited = False  # somebody waits for it, and is to be woken at its end
        self.lost = False  # done by giving it up; its thread is still stuck in it
        self.followers: list[Task[Any]] = []  # to be queued when this one has ended
        self.error: BaseException | None = None
        self._value: list[T] = []

    def end(self, value: list[T], error: BaseException | None) -> None:
        self.function, self._value, self.error, self.done = None, value, error, True

    def value(self) -> T:
        """What the function returned, or its exception raised here."""
        if self.error is not None:
            raise self.error
        return self._value[0]


class Pool:
    """Daemon threads that take tasks in order, urgent ones first.

    Attributes:
        lock: guards the pool and whatever is built on it. Reentrant, because the garbage collector may
            close an abandoned stream in the middle of any statement of any thread.
        changed: notified when a task ends that somebody waits for, and by whoever builds on the lock. Waking costs a
            thread some tens of microseconds of the one interpreter, so nobody is woken for nothing.
    """

    def __init__(self, threads: int | None, stall: float) -> None:
        self.threads = default_threads() if threads is None else threads
        self.stall = stall
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.closed = False
        self._work = threading.Condition(self.lock)
        self._queue: deque[Task[Any]] = deque()
        self._urgent: deque[Task[Any]] = deque()
        self._running: set[Task[object]] = set()
        self._started = 0
        self._threads: list[threading.Thread] = []
        _pools.add(self)

    def submit(
        self, name: str, function: Callable[[], T], urgent: bool = False, after: Task[Any] | None = None
    ) -> Task[T]:
        """Queue a function; urgent ones are taken before all others.

        Args:
            name: the file, for messages.
            function: what to do.
            urgent: whether it goes before all that are not.
            after: a task of this pool that has to end first, in whichever way. Then this one goes before all that is
                queued: no thread waits in between, and what follows a task is not left behind by later ones.
        """
        task = Task(name, function, urgent)
        with self.lock:
            if self.closed:
                raise RuntimeError("the reader is closed")
            if after is not None and not after.done:
                after.followers.append(task)
                return task
            (self._urgent if urgent else self._queue).append(task)
            while self._started < self.threads:
                self._start()
            self._work.notify()
        return task

    def wait(self, task: Task[T], stop: Callable[[], bool] = lambda: False, seconds: float = math.inf) -> None:
        """Return when the task is done, when `stop()` is true, or after `seconds`.

        `stop` is called after each change: whoever makes it true notifies `changed`.
        """
        end = time.monotonic() + seconds
        with self.lock:
            while not task.done and not stop():
                if self.closed:
                    raise RuntimeError("the reader was closed while it was read from")
                now = time.monotonic()
                if now >= end:
                    return
                self._give_up(now)
                if not task.done:
                    task.awaited = True
                    # A task that starts while we sleep cannot be late before `stall` from now.
                    oldest = min((running.since or now for running in self._running), default=now)
                    self.changed.wait(max(min(oldest + self.stall, end) - now, 0.001))

    def pause(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Let time pass on the calling thread, or return early when `stop()` is true.

        `stop` is called after each change: whoever makes it true notifies `changed`. The end of a task does not; to
        wait for a task, call `wait`.
        """
        end = time.monotonic() + seconds
        with self.lock:
            while not (stop() or self.closed) and (left := end - time.monotonic()) > 0:
                self.changed.wait(left)

    def close(self) -> None:
        """Forget what is queued and let the threads end. Does not wait: one may be stuck in a read."""
        with self.lock:
            self.closed = True
            self._queue.clear()
            self._urgent.clear()
            self._work.notify_all()
            self.changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for the threads of a closed pool to end, so long at most."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _give_up(self, now: float) -> None:
        for task in [task for task in self._running if now - (task.since or now) >= self.stall]:
            problem = (
                f"no data for {self.stall:g} s: the disk or network share does not answer. "
                "Copy the file to a local disk, or raise the limit (run.stall)"
            )
            task.lost = True
            task.end([], StalledRead(task.name, problem))
            self._running.discard(task)
            self._follow(task)
            self._threads = [thread for thread in self._threads if thread is not task.thread]  # nobody waits for it
            self._start()
            self.changed.notify_all()

    def _follow(self, task: Task[Any]) -> None:
        """Queue what was to begin after a task, in order, before all else."""
        if not self.closed:
            for each in reversed(task.followers):
                (self._urgent if each.urgent else self._queue).appendleft(each)
            self._work.notify(len(task.followers))
        task.followers.clear()

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
                function = task.function
                task.since = time.monotonic()
                task.thread = threading.current_thread()
                self._running.add(task)
            assert function is not None
            _here.task = task
            value: list[object] = []
            error: BaseException | None = None
            try:
                value.append(function())
            except BaseException as caught:  # noqa: BLE001 - raised again in the thread that waits
                error = caught
            _here.task = None
            with self.lock:
                if task.lost:  # another thread has taken this one's place
                    return
                self._running.discard(task)
                task.end(value, error)
                self._follow(task)
                if task.awaited:
                    self.changed.notify_all()
            del task, function, value, error  # an idle thread must not keep pixels or open files alive


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def end_reading() -> None:
    """Let no thread be in the middle of a read when Python shuts down."""
    end = time.monotonic() + LINGER
    for pool in list(_pools):
        pool.close()
        pool.join(max(0.0, end - time.monotonic()))


def end_reading_first() -> None:
    """Have reads end before a library that was just imported is shut down: what is registered last comes first."""
    atexit.unregister(end_reading)
    atexit.register(end_reading)


end_reading_first()
