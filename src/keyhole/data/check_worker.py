"""Opens images in a process of its own, which a broken file may take down or hold up without harm to ours.

Decoders written in C can abort the whole process on a broken file, and a read can hang for ever. `ImageProbe` is our
end; `main` is the other end, which answers one JSON line for each on its standard input. It never imports torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from keyhole.errors import ConfigError, ImageError, KeyholeError
from keyhole.images.geometry import Size

START_SECONDS = 120.0
"""For the process to start: importing from a cold network disk is slow and says nothing about the image."""
Trouble = Literal["image", "settings", "died", "stalled", "unexpected"]


@dataclass(frozen=True)
class Probed:
    """What an image turned out to be.

    Attributes:
        size: width and height at level 0.
        levels: how many resolutions.
        mpp: microns per level-0 pixel, or None.
        channels: 1 or 3.
        patches: how many the grid has, after the foreground mask.
        level_bytes: of the decoded pixels at the level that is read.
    """

    size: Size
    levels: int
    mpp: float | None
    channels: int
    patches: int
    level_bytes: int


@dataclass(frozen=True)
class Failed:
    """Why an image cannot be used, one line without the image's name."""

    problem: str
    trouble: Trouble


class ImageProbe:
    """A process that opens images one after the other, started again after it died.

    Args:
        stall: seconds that one image may take.
    """

    def __init__(self, stall: float) -> None:
        self.stall = stall
        self._process: subprocess.Popen[str] | None = None
        self._killed = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the probe

    def probe(self, path: Path, image_mpp: float | None, patch: dict[str, Any]) -> Probed | Failed:
        """Opens an image, lays the grid and reads its first and last patch.

        Args:
            path: the file.
            image_mpp: microns per pixel over the file's own.
            patch: size, stride, level, mpp and foreground, as `FileOpener` takes them.

        Raises:
            KeyholeError: the process cannot be started at all.
        """
        if self._killed:
            return Failed("not looked at any more", "stalled")
        if self._process is None:
            self._start()
        request = {"path": str(path), "image_mpp": image_mpp, "limit": self.stall, **patch}
        reply, stalled = self._ask(json.dumps(request), self.stall)
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
            [sys.executable, "-P", "-m", "keyhole.data.check_worker"],
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

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        finally:
            timer.cancel()
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


def probe_here(path: str, image_mpp: float | None, patch: dict[str, Any]) -> Probed | Failed:
    """What the other process does: opens one image, reads its first and last patch."""
    from keyhole.patches import FileOpener
    from keyhole.store import decoded_bytes

    try:
        source = FileOpener(path=Path(path), name=path, image_mpp=image_mpp, **patch)()
        try:
            source.read([0, len(source) - 1])
            image = source.image
            size = decoded_bytes(image, source.grid.level)
            return Probed(image.size, len(image.levels), image.mpp, image.channels, len(source), size)
        finally:
            source.close()
    except ImageError as error:
        return Failed(error.problem, "image")
    except ConfigError as error:
        return Failed(str(error).removeprefix(f"{path}: "), "settings")
    except Exception as error:  # noqa: BLE001 - reported; a fault of one reader must not hide the other images
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())}", "unexpected")


def main() -> None:
    """Answers requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; ours ends this one
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a decoder prints must not be taken for an answer
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            # Should our end be killed meanwhile, nobody else would end a read that hangs.
            faulthandler.dump_traceback_later(request.pop("limit") + 60, exit=True)
            reply = asdict(probe_here(request.pop("path"), request.pop("image_mpp"), request))
            faulthandler.cancel_dump_traceback_later()
        else:
            reply = {}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
