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
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyhole.errors import BitsUnknown, ConfigError, ImageError, KeyholeError, OutputError
from keyhole.images.geometry import Size
from keyhole.wording import problem_and_fix

if TYPE_CHECKING:
    from keyhole.grid import PatchGrid
    from keyhole.images import Image
    from keyhole.patches import FileOpener

START_SECONDS = 120.0
"""For the process to start: importing from a cold network disk is slow and says nothing about the image."""
DARK = 16
"""Value, of 255: a picture whose brightest value is below is nearly black."""
FEW = 4
"""Patches that are read for the time it takes."""
BEAT_SECONDS = 1.0
"""Between signs of life at least."""
Trouble = Literal["image", "settings", "died", "stalled", "unexpected", "output"]


@dataclass(frozen=True)
class Probed:
    """What an image turned out to be.

    Attributes:
        size: width and height at level 0; 0 x 0 for stored features.
        levels: how many resolutions.
        mpp: microns per level-0 pixel, or None.
        channels: 1 or 3; the width of stored features.
        patches: how many the grid has, after the foreground mask.
        level_bytes: of the decoded pixels at the level that is read.
        file_mpp: `mpp` as the file says, whatever the CSV does.
        mpp_note: what the file says of its resolution that is not to be believed.
        preview_problem: why there is no preview although one was asked for.
        note: what of the file is not read.
        darkest, brightest: values of the patches looked at.
        image_seconds, patch_seconds: to open it and decode what belongs to all of it, and to read a patch.
        origin: of stored features, the fields of `Origin`; empty for images.
    """

    size: Size
    levels: int
    mpp: float | None
    channels: int
    patches: int
    level_bytes: int
    file_mpp: float | None = None
    mpp_note: str = ""
    preview_problem: str = ""
    note: str = ""
    darkest: int = field(default=0, compare=False)
    brightest: int = field(default=255, compare=False)
    image_seconds: float = field(default=0.0, compare=False)
    patch_seconds: float = field(default=0.0, compare=False)
    origin: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """Why an image cannot be used.

    Attributes:
        problem: one line without the image's name.
        trouble: of which kind it is.
        previewed: whether the preview was made all the same.
        fix: what to do, where the error said it.
        largest: value of an image of which only the bits in use are not known.
    """

    problem: str
    trouble: Trouble
    previewed: bool = False
    fix: str = ""
    largest: int | None = None


@dataclass(frozen=True)
class Request:
    """What is to be looked at.

    Attributes:
        path: the image, or the file of features.
        patch: size, stride, level, mpp, bits, foreground, min_foreground and edge, as `FileOpener` takes them.
        image_mpp: microns per pixel over the file's own.
        mask: PNG or GeoJSON of the foreground.
        features: whether `path` holds stored features.
        name: of the image, for the preview.
        preview: PNG to make of the foreground and the grid.
    """

    path: str
    patch: dict[str, Any]
    image_mpp: float | None = None
    mask: str | None = None
    features: bool = False
    name: str = ""
    preview: str | None = None


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


def probe_here(request: Request) -> Probed | Failed:
    """What the other process does: opens one image, reads its first and last patch."""
    path = Path(request.path)
    try:
        return _probe_features(path, request.name) if request.features else _probe_image(path, request)
    except BitsUnknown as error:
        return Failed(error.problem, "image", largest=error.largest)
    except ImageError as error:
        problem, fix = problem_and_fix(error.problem)
        return Failed(problem if error.path == request.path else f"{error.path}: {problem}", "image", fix=fix)
    except ConfigError as error:
        problem, fix = problem_and_fix(str(error).removeprefix(f"{path}: "))
        return Failed(problem, "settings", fix=fix)
    except OutputError as error:
        return Failed(str(error), "output")
    except Exception as error:  # noqa: BLE001 - reported; a fault of one reader must not hide the other images
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())}", "unexpected")


def _probe_image(path: Path, request: Request) -> Probed | Failed:
    from keyhole.grid import NoPatches
    from keyhole.images.image import open_image
    from keyhole.patches import FileOpener
    from keyhole.store import decoded_bytes

    mask = None if request.mask is None else Path(request.mask)
    opener = FileOpener(path=path, name=request.path, image_mpp=request.image_mpp, mask=mask, **request.patch)
    began = time.perf_counter()
    with open_image(path, opener.bits) as image:
        file_mpp, problem = image.mpp, ""
        try:
            grid: PatchGrid | None = opener.grid(image)
        except NoPatches as error:
            grid, nothing = None, problem_and_fix(str(error).removeprefix(f"{path}: "))
        opening = time.perf_counter() - began
        if request.preview is not None:
            try:
                _preview(opener, image, grid, request, Path(request.preview))
            except ImageError as error:  # at a level that a run does not read
                problem, _ = problem_and_fix(error.problem)
        if grid is None:
            previewed = request.preview is not None and not problem
            return Failed(nothing[0], "settings", previewed, nothing[1])
        seconds = _seconds(opening, grid.read, len(grid))
        size = decoded_bytes(image, grid.level)
        shape = image.size, len(image.levels), image.mpp, image.channels
        values = _values(image, grid)
        return Probed(*shape, len(grid), size, file_mpp, image.mpp_note, problem, image.note, *values, *seconds)


def _seconds(opening: float, read: Callable[[Sequence[int]], object], length: int) -> tuple[float, float]:
    """What the image costs and what a patch costs, of reading the first and last patch and then a few."""
    began = time.perf_counter()
    read([0, length - 1])
    first = time.perf_counter()
    count = min(length, FEW)
    read(range(count))
    again = time.perf_counter() - first
    return max(0.0, opening + first - began - again), again / count


def _values(image: Image, grid: PatchGrid) -> tuple[int, int]:
    """The darkest and brightest value of a few patches; of one alone where it is neither dark nor of one value."""
    level = image.levels[grid.level]
    darkest, brightest = 255, 0
    for place in sorted({round(k * (len(grid) - 1) / 8) for k in range(9)}):
        x, y, width, height = (round(side / level.downsample) for side in grid.boxes([place])[0].tolist())
        box = x, y, min(width, level.size.width - x), min(height, level.size.height - y)
        if min(box[2:]) < 1:
            continue
        try:
            pixels = image.read(box, grid.level)
        except ImageError:  # damage between the first and the last patch, of which a run leaves out what it must
            continue
        darkest, brightest = min(darkest, int(pixels.min())), max(brightest, int(pixels.max()))
        if darkest < brightest >= DARK:
            break
    return darkest, brightest


def _preview(opener: FileOpener, image: Image, grid: PatchGrid | None, request: Request, path: Path) -> None:
    from keyhole.report.mask_preview import mask_preview

    full = replace(opener, foreground="all").grid(image)
    mpp = "unknown microns per pixel" if image.mpp is None else f"{image.mpp:.4g} microns per pixel"
    at = f"level {full.level}" if opener.mpp is None else f"{opener.mpp:g} microns per pixel"
    step = f", stride {full.stride}" if full.stride != full.size else ""
    least = (
        f", at least {100 * opener.min_foreground:.3g} % of a patch" if opener.foreground in ("tissue", "mask") else ""
    )
    caption = [
        request.name or request.path,
        f"{image.size.width:,} x {image.size.height:,} pixels, {mpp}",
        f"patches of {full.size} px{step} at {at}; foreground {opener.foreground}{least}",
    ]
    mask_preview(image, full, grid, opener.foreground_mask(), caption, path)


def _probe_features(path: Path, name: str) -> Probed:
    from keyhole.features import FeatureOpener

    began = time.perf_counter()
    source = FeatureOpener(path, name)()
    try:
        image, patch = _seconds(time.perf_counter() - began, source.read, len(source))
        return Probed(
            Size(0, 0),
            1,
            None,
            source.patch_shape[0],
            len(source),
            0,
            image_seconds=image,
            patch_seconds=patch,
            origin=asdict(source.origin),
        )
    finally:
        source.close()


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
    from keyhole.pool import Pool

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
