"""Times training steps through the loop of `keyhole train`, in a run folder of their own, and the encoder alone."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from keyhole.engine.scoring import blank_rows
from keyhole.errors import DataError, Interrupted
from keyhole.training.interrupt import Interrupt, StopRequested
from keyhole.training.job import Job
from keyhole.training.loop import Loop
from keyhole.util.timing import PARTS

MIN_FLOOR_RUNS, FLOOR_SECONDS = 5, 1.0
"""The encoder's rate is the median of as many runs over a chunk as fit into the time, and of this many at least."""


@dataclass(frozen=True)
class Steps:
    """What was measured.

    Attributes:
        first: seconds of the first step, including what it builds, compiles and allocates.
        seconds: of the steps after the warm-up.
        steps: number of these steps.
        images: in these steps.
        patches: scored in these steps.
        parts: seconds by part, of `keyhole.util.timing`.
    """

    first: float
    seconds: float
    steps: int
    images: int
    patches: int
    parts: dict[str, float]


def run_steps(job: Job, warm: int, steps: int, limit: float) -> Steps:
    """Train for as many epochs as it takes to make enough steps.

    Args:
        job: new; closed by the caller.
        warm: steps before the clock starts, one at least.
        steps: to measure.
        limit: seconds after which no further step begins, when one has been measured.

    Raises:
        Interrupted: by a signal.
    """
    with Interrupt() as interrupt, job.engine.limit():
        loop = _Clocked(job, interrupt, warm, steps, limit)
        try:
            with suppress(_Enough):
                while True:
                    loop.learn()
                    job.state.epoch, job.state.batch = job.state.epoch + 1, 0
        except StopRequested as stop:
            assert interrupt.signal is not None
            raise Interrupted("stopped; nothing was changed", interrupt.signal) from stop
    return loop.result()


class _Enough(Exception):  # noqa: N818 - an event, not an error
    """There are enough steps."""


class _Clocked(Loop):
    """The training loop, timed at the end of each step instead of saved."""

    def __init__(self, job: Job, interrupt: Interrupt, warm: int, steps: int, limit: float) -> None:
        super().__init__(job, interrupt)
        self.warm, self.steps, self.limit = max(1, warm), steps, limit
        self.done = self.patches = self.images = 0
        self.began = self.start = time.perf_counter()
        self.first = self.passed = 0.0
        self.parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.before = dict(self.parts)

    def learn(self) -> dict[str, float]:
        self.before = dict.fromkeys(PARTS, 0.0)  # an epoch's shares begin at nothing
        return super().learn()

    def after_step(self, patches: int) -> None:
        """Note the time at the end of a step; end the loop after the last one."""
        parts = self.engine.timer.seconds()  # waits for the device
        now = time.perf_counter()
        self.done += 1
        if self.done == 1:
            self.first = now - self.began
        if self.done == self.warm:
            self.start = now
        elif self.done > self.warm:
            self.patches += patches
            self.images += self.images_of_step()
            self.parts = {name: self.parts[name] + parts[name] - self.before[name] for name in PARTS}
            self.passed = now - self.start
            if self.done == self.warm + self.steps or self.passed > self.limit:
                raise _Enough
        self.before = parts

    def images_of_step(self) -> int:
        """Return the images of the step that has just ended: the last one of an epoch may have fewer."""
        batch, items = self.job.config.train.batch, len(self.job.manifest.split("train"))
        return min(batch, items - (self.job.state.batch - 1) * batch)

    def result(self) -> Steps:
        return Steps(self.first, self.passed, self.done - self.warm, self.images, self.patches, self.parts)


class Floor(NamedTuple):
    """The encoder alone.

    Attributes:
        rate: patches/s.
        colored: the rate with colors changed as in training, as a share of `rate`; 1 if they are not changed.
        blank: share of these patches that have one color; 0 for features.
    """

    rate: float
    colored: float
    blank: float


def floor(job: Job) -> Floor:
    """Measure the encoder over one full chunk of real patches that is on the device already.

    Args:
        job: after its steps, so that nothing is built or compiled for it; weights and modes stay as they are.
    """
    pixels = _chunk(job)
    blank = float(blank_rows(pixels.cpu().numpy()).mean())
    plain = _seconds(job, pixels, None)
    if pixels.dtype != torch.uint8 or not job.config.augment.color:
        return Floor(len(pixels) / plain, 1.0, blank)
    channels = pixels.shape[-1]
    color = torch.eye(channels, channels + 1, device=job.device).expand(len(pixels), -1, -1)
    return Floor(len(pixels) / plain, plain / _seconds(job, pixels, color), blank)


def _seconds(job: Job, pixels: Tensor, color: Tensor | None) -> float:
    """Return the median seconds of scoring these patches once."""
    times: list[float] = []
    encoders = job.engine.encoders
    with encoders.inference():
        for _ in range(2):  # builds, compiles, warms up
            encoders.embed(pixels, color)
        begun = time.perf_counter()
        while len(times) < MIN_FLOOR_RUNS or time.perf_counter() - begun < FLOOR_SECONDS:
            _wait(job.device)
            start = time.perf_counter()
            encoders.embed(pixels, color)
            _wait(job.device)
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _chunk(job: Job) -> Tensor:
    """Return a chunk of real patches on the device, repeated if the images have fewer.

    Raises:
        DataError: no training image can be read.
    """
    size, items, batch = job.engine.plan.chunk, job.manifest.split("train"), job.config.train.batch
    openers = [job.images.opener(item) for item in items]
    batches = [openers[start : start + batch] for start in range(0, len(openers), batch)]
    for read in job.engine.reader.stream(batches, size, "mask"):
        for part in read.chunks():
            found = torch.from_numpy(part.pixels[: part.count].copy())
            return torch.cat([found] * -(-size // len(found)))[:size].to(job.device)
    raise DataError(f"{job.config.data.path}: no training image can be read; see keyhole check")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
