"""Opens images in a process of its own, which a broken file may take down or hold up without harm to ours.

Decoders written in C can abort the whole process on a broken file, and a read can hang for ever. `ImageProbe` is our
end; `main` is the other end, which answers one JSON line for each on its standard input, and sends empty lines while
data come, for a gigapixel image without smaller levels takes minutes to look at. It never imports torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from keyhole.errors import KeyholeError
from keyhole.images.geometry import Size
from keyhole.tools.check.look import Failed, Probed, Request, probe_here

START_SECONDS = 120.0
"""For the process to start: importing from a cold network disk is slow and says nothing about the image."""
BEAT_SECONDS = 1.0
"""Between signs of life at least."""


class ImageProbe:
    """A process that opens images one after the other, started again after it died.

    Args:
        stall: seconds that may pass without anything being read from an image.
    """

    def __init__(self, stall: float) -> None:
        self.stall = stall
        self._process: subprocess.Popen[str] | None = None
        self._killed = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the probe

    def probe(self, request: Request) -> Probed | Failed:
        """Opens an image, lays the grid, reads its first and last patch, and draws a preview if asked for one.

        Raises:
            KeyholeError: the process cannot be started at all.
        """
        if self._killed:
            return Failed("not looked at any more", "stalled")
        if self._process is None:
            self._start()
        reply, stalled = self._ask(json.dumps({"limit": self.stall, **asdict(request)}), self.stall)
        if reply:
            answer = json.loads(reply)
            if "problem" in answer:
                return Failed(**answer)
            return Probed(**{**answer, "size": Size(*answer["size"])})
        code = self._end()
        if stalled:
            return Failed(f"no data for {self.stall:g} s", "stalled")
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return Failed(f"reading it ended the process ({how}){self._last_words()}", "died")

    def kill(self) -> None:
        """Ends the process, whatever it is doing, from another thread; whoever waits for it goes on."""
        self._killed = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """Gives back everything; no probe may be under way."""
        self.kill()
        self._end()
        self._errors.close()

    def _start(self) -> None:
        # -P: files of the current folder must not stand in for modules.
        import keyhole

        home = str(Path(keyhole.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "keyhole.tools.check.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        greeting, _ = self._ask("{}", START_SECONDS)
        if not greeting:
            code = self._end()
            raise KeyholeError(f"the process that opens images did not start (exit code {code}){self._last_words()}")

    def _ask(self, line: str, seconds: float) -> tuple[str, bool]:
        """The answer, empty if the process ended; and whether it was ended by us for taking too long."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            reply = "\n"
            while reply == "\n":  # a sign of life
                timer = threading.Timer(seconds, end)
                timer.daemon = True
                timer.start()
                try:
                    reply = process.stdout.readline()
                finally:
                    timer.cancel()
        except BrokenPipeError:
            reply = ""
        return (reply if reply.endswith("\n") else ""), late.is_set()

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # It has closed its output, so it is about to end by itself; its own exit code says why.
            code = process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what was not yet sent to a process that has ended
            process.stdin.close()
        return code

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [" ".join(line.split()) for line in lines if line.strip()]
        return f", saying: {said[-1][:160]}" if said else ""


def main() -> None:
    """Answers requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; ours ends this one
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a decoder prints must not be taken for an answer

    def answer(reply: str) -> None:
        answers.write(reply + "\n")
        answers.flush()

    serve(sys.stdin, answer)


def serve(lines: Iterable[str], answer: Callable[[str], None]) -> None:
    """Answer each request line with one JSON line, and with empty lines while a long read makes progress."""
    from keyhole.util.threads import Pool

    pool = Pool(1, stall=math.inf)
    for line in lines:
        asked = json.loads(line)
        if not asked:
            answer("{}")
            continue
        limit = asked.pop("limit")
        task = pool.submit(asked["path"], partial(probe_here, Request(**asked)))
        last = None
        while not task.done:
            if task.since != last:
                # Should our end be killed meanwhile, nobody else would end a read that hangs.
                faulthandler.dump_traceback_later(limit + 60, exit=True)
                if last is not None:
                    answer("")
                last = task.since
            pool.wait(task, seconds=BEAT_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        answer(json.dumps(asdict(task.value())))
    pool.close()


if __name__ == "__main__":
    main()
