"""Open images in another process, which a broken file may crash or block.

`ImageProbe` is the parent's end. `main` is the other end: it answers each `Request` with `Probed` or `Failed`, and
sends None while data arrive, since a gigapixel image may take minutes to read. Both send lines of JSON, whose types are
checked: a hostile file that takes over the process must not run code in the parent. torch is not imported here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from keyhole.errors import KeyholeError
from keyhole.tools.check.look import Failed, Probed, Request, probe_here

MAX_PROCESSES = 4  # each may hold a tile or a thumbnail of gigapixels in memory
START_SECONDS = 120.0  # limit for the process to start: importing from a cold network disk is slow
BEAT_SECONDS = 1.0  # longest time between two answers of None
MAX_ANSWER_BYTES = 1 << 20
Message = tuple[float, Request] | None  # seconds without data that end a read, and what to read; or a greeting
MESSAGES: TypeAdapter[Any] = TypeAdapter(Message)
ANSWERS: TypeAdapter[Any] = TypeAdapter(Probed | Failed | str | None)  # a string answers a greeting


def probe_all(requests: Sequence[Request], stall: float, threads: int | None) -> Generator[Probed | Failed]:
    """Yield the result of every image in order; `stall` seconds may pass without data from an image."""
    probes = [ImageProbe(stall) for _ in range(min(len(requests), MAX_PROCESSES, threads or os.cpu_count() or 1))]
    free: queue.SimpleQueue[ImageProbe] = queue.SimpleQueue()
    for probe in probes:
        free.put(probe)

    def examine(request: Request) -> Probed | Failed:
        probe = free.get()
        try:
            return probe.probe(request)
        finally:
            free.put(probe)

    pool = ThreadPoolExecutor(len(probes), thread_name_prefix="keyhole-check")
    try:
        yield from pool.map(examine, requests)
    finally:
        # After Ctrl-C, killing the processes also ends the threads that wait for them.
        pool.shutdown(wait=False, cancel_futures=True)
        for probe in probes:
            probe.kill()
        pool.shutdown()
        for probe in probes:
            probe.close()


class ImageProbe:
    """A process that opens images one after the other, and is started again after it died."""

    def __init__(self, stall: float) -> None:
        self.stall = stall
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the probe

    @property
    def pid(self) -> int | None:
        """Number of the process, None while there is none."""
        return None if self._process is None else self._process.pid

    def probe(self, request: Request) -> Probed | Failed:
        """Open an image, read its first and last patch, and draw a preview if the request names one."""
        if self._killed:
            return Failed("not checked any more", "stalled")
        if self._process is None:
            self._start()
        found, stalled = self._ask((self.stall, request), self.stall)
        if isinstance(found, Probed | Failed):
            return found
        code = self._end()
        if stalled:
            return Failed(f"no data for {self.stall:g} s", "stalled")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Failed(f"reading it ended the process ({how}){self._last_words()}", "died")

    def kill(self) -> None:
        """Kill the process, from another thread; a `probe` that waits for it returns."""
        self._killed = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process and close its files; no `probe` may be running."""
        self.kill()
        self._end()
        self._errors.close()

    def _start(self) -> None:
        home = str(Path(__file__).resolve().parents[3])  # the folder that keyhole is in
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            # -P: files of the current folder must not replace modules
            [sys.executable, "-P", "-m", "keyhole.tools.check.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
        )
        greeting, _ = self._ask(None, START_SECONDS)
        if greeting is None:
            code = self._end()
            raise KeyholeError(f"the process that opens images did not start (exit code {code}){self._last_words()}")

    def _ask(self, message: Message, seconds: float) -> tuple[Any, bool]:
        """Return the answer, None if the process ended, and True if it was killed after `seconds` of silence."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        reply = None
        try:
            process.stdin.write(as_line(MESSAGES, message))
            process.stdin.flush()
            while reply is None:
                timer = threading.Timer(seconds, end)
                timer.daemon = True
                timer.start()
                try:
                    line = process.stdout.readline(MAX_ANSWER_BYTES)
                finally:
                    timer.cancel()
                reply = from_line(ANSWERS, line)
        except (BrokenPipeError, ValueError, RecursionError):
            pass  # the process has ended, or sends something else than answers and is ended
        return reply, late.is_set()

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        try:
            code = process.wait(1.0)  # it has closed its output, so it is about to end with its own exit code
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        for pipe in (process.stdout, process.stdin):
            with contextlib.suppress(BrokenPipeError):  # unsent data for a process that has ended
                assert pipe is not None
                pipe.close()
        return code

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [" ".join(line.split()) for line in lines if line.strip()]
        return f", saying: {said[-1][:160]}" if said else ""


def as_line(kind: TypeAdapter[Any], value: object) -> bytes:
    """Return a value as one line of JSON."""
    return json.dumps(kind.dump_python(value, mode="json")).encode() + b"\n"


def from_line(kind: TypeAdapter[Any], line: bytes) -> Any:
    """Return the value of a whole line; ValueError if it is cut, not JSON or not of the `kind`."""
    if not line.endswith(b"\n"):
        raise ValueError("the line is cut")
    return kind.validate_python(json.loads(line))


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent ends this one
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not be read as an answer

    def answer(reply: object) -> None:
        answers.write(as_line(ANSWERS, reply))
        answers.flush()

    serve((from_line(MESSAGES, line) for line in sys.stdin.buffer), answer)


def serve(messages: Iterable[Message], answer: Callable[[object], None]) -> None:
    """Answer each message once; before that, answer None from time to time while a long read progresses."""
    from keyhole.util.threads import ReadingThreads

    threads = ReadingThreads(1, stall=math.inf)
    for message in messages:
        if message is None:
            answer("ready")
            continue
        limit, request = message
        task = threads.submit(str(request.item.source), partial(probe_here, request))
        last = None
        while not task.done:
            if task.since != last:
                # If the parent is killed, nothing else ends a read that hangs.
                faulthandler.dump_traceback_later(limit + 60, exit=True)
                if last is not None:
                    answer(None)
                last = task.since
            threads.wait(task, seconds=BEAT_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        answer(task.value())
    threads.close()


if __name__ == "__main__":
    main()
