"""Processes that decode for the server: a file that ends or blocks one does not block the others.

A job waits until a process is free and its image uses fewer than its share of them. An image that gave nothing for
`patience` seconds is left alone for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MAX_PROCESSES = 6
"""Processes at once. Two decode as fast as two cores can; others are started while some wait for a stalled disk."""
PER_IMAGE = 2
"""Processes that one image uses at once, one after it stalled."""
REST_SECONDS = 30.0
"""Time for which an image that stalled is refused."""
MAX_ANSWER_BYTES = 2**28
NOT_FOUND, UNREADABLE = 404, 422
Gone = Callable[[], Awaitable[bool]]


class Reply(NamedTuple):
    """Bytes and their type, or the reason why there are none; `status` is that of HTTP."""

    status: int
    body: bytes
    type: str = "text/plain; charset=utf-8"


@dataclass(eq=False)
class Question:
    """A message for a process, and those who wait for the reply."""

    image: object
    message: dict[str, Any]
    urgent: bool
    waiting: list[Gone]
    reply: asyncio.Future[Reply] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Decoders:
    """Processes of `keyhole.view.worker`, started when they are needed.

    Args:
        patience: Seconds after which a process that has not answered is ended.
        most: Number of processes; those beyond the number of cores are for images that wait for their disk.
    """

    def __init__(self, patience: float = 20.0, most: int = MAX_PROCESSES) -> None:
        self.patience, self.most = patience, most
        self._idle: list[_Process] = []
        self._busy: dict[_Process, Question] = {}
        self._jobs: list[Question] = []
        self._rests: dict[object, float] = {}  # until when an image that stalled is refused
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes that are running."""
        return [process.pid for process in (*self._idle, *self._busy) if process.pid]

    async def ask(self, image: object, message: dict[str, Any], urgent: bool, gone: Gone) -> Reply:
        """Return the reply to a message; equal messages that wait at the same time are one job.

        Args:
            image: What the message is about, for the limits.
            message: For `worker`.
            urgent: To be taken before others, as a tile of what somebody looks at.
            gone: Tells whether who asked has left; a job for nobody is dropped.
        """
        if (rest := self._rests.get(image, 0.0) - time.monotonic()) > 0:
            return self._refusal(rest)
        for job in (*self._jobs, *self._busy.values()):
            if job.message == message and not job.reply.done():
                job.waiting.append(gone)
                job.urgent |= urgent
                break
        else:
            job = Question(image, message, urgent, [gone])
            self._jobs.append(job)
            self._start()
        return await asyncio.shield(job.reply)

    async def close(self) -> None:
        """End all processes; who still waits is told so."""
        self._closed = True
        for job in (*self._jobs, *self._busy.values()):
            if not job.reply.done():
                job.reply.set_result(Reply(UNREADABLE, b"the server is closing"))
        self._jobs.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in (*self._idle, *self._busy):
            await process.end()

    def _start(self) -> None:
        """Give waiting jobs to processes, as far as the limits allow."""
        while not self._closed and (job := self._next()) is not None:
            self._jobs.remove(job)
            process = next((each for each in self._idle if each.image == job.image), None)
            if process is None:
                process = self._idle[0] if self._idle else _Process()
            if process in self._idle:
                self._idle.remove(process)
            self._busy[process] = job
            process.image, process.since = job.image, math.inf
            task = asyncio.ensure_future(self._run(process, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self) -> Question | None:
        if len(self._busy) >= self.most:
            return None
        running = [job.image for job in self._busy.values()]
        fit = [job for job in self._jobs if running.count(job.image) < self._share(job.image)]
        return max(fit, key=lambda job: job.urgent, default=None)  # the first of the urgent ones

    def _share(self, image: object) -> int:
        """Return how many processes an image may use: one while it has been silent, so that it takes no more."""
        now = time.monotonic()
        late = any(job.image == image and now - process.since > 1 for process, job in self._busy.items())
        return 1 if late or image in self._rests else PER_IMAGE

    def _give_up(self, image: object) -> None:
        """Refuse an image for a while, also to those who wait for a process to read it."""
        self._rests[image] = time.monotonic() + REST_SECONDS
        for job in [job for job in self._jobs if job.image == image]:
            self._jobs.remove(job)
            job.reply.set_result(self._refusal(REST_SECONDS))

    def _refusal(self, rest: float) -> Reply:
        return Reply(UNREADABLE, f"no data for {self.patience:g} s; tried again in {rest:.0f} s".encode())

    async def _run(self, process: _Process, job: Question) -> None:
        reply = Reply(UNREADABLE, b"nobody waits for it any more")
        try:
            if not all([await gone() for gone in job.waiting]):
                reply = await process.ask(job.message, self.patience)
                if process.stalled:
                    self._give_up(job.image)
        finally:
            self._busy.pop(process, None)
            self._idle.append(process)
            if not job.reply.done():
                job.reply.set_result(reply)
        self._start()


class _Process:
    """One process, started again after it ended."""

    def __init__(self) -> None:
        self.image: object = None
        self.since = math.inf  # when the present message was sent; infinite while it starts
        self.stalled = False
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def ask(self, message: dict[str, Any], patience: float) -> Reply:
        self.stalled = False
        if self._process is None:
            self._process = await _started()
            patience += 100.0  # importing from a cold network disk is slow
        self.since = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                return await self._exchange(self._process, message)
        except TimeoutError:
            self.stalled = True
            await self.end()
            return Reply(UNREADABLE, f"no data for {patience:g} s. Is the disk or share of the image there?".encode())
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            code = await self.end()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            problem = (
                f"reading it ended the process ({how}; {type(error).__name__}). The file is damaged: copy it again."
            )
            return Reply(UNREADABLE, problem.encode())
        except asyncio.CancelledError:
            await self.end()
            raise

    async def _exchange(self, process: asyncio.subprocess.Process, message: dict[str, Any]) -> Reply:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise EOFError
        head = json.loads(line)
        for name, status in (("lost", NOT_FOUND), ("problem", UNREADABLE)):
            if name in head:
                return Reply(status, str(head[name]).encode(errors="replace"))
        count = head["bytes"]
        if not isinstance(count, int) or not 0 <= count <= MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of {count} bytes")
        return Reply(200, await process.stdout.readexactly(count), str(head["type"]))

    async def end(self) -> int:
        """Kill the process and return its exit code, its own if it ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(0.2 if not self.stalled else 0):
                return await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            return await process.wait()


async def _started() -> asyncio.subprocess.Process:
    home = str(Path(__file__).resolve().parents[2])  # the folder that keyhole is in
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "keyhole.view.worker"),  # -P: files of the current folder do not replace modules
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
