"""Measures what the two passes of a model cost in memory, on the model itself and its device, at a few small sizes.

Letters: b image, m kept, k patches of a chunk, d width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keyhole.engine.encoders import Encoders
from keyhole.engine.memory.meter import comes_in_steps, growth
from keyhole.engine.split import kept_buffers
from keyhole.nn import IPSClassifier, evaluating
from keyhole.nn.position import takes_centers
from keyhole.nn.tensors import AsRead, as_read, values_of
from keyhole.util.budget import out_of_memory

ENOUGH_BYTES = 2**28
"""Growth that is measured well; larger probes only take longer."""
ENOUGH_SECONDS = 0.5
REPEATS = 2
"""Runs that one measurement spans: on a CPU the second one leaves gaps in the heap that the first one did not."""
FIRST_PATCHES, FACTOR = 4, 4
"""Patches of the first probe, and the factor to the next."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a plan is made for."""

    patch_shape: Sequence[int]  # of one patch as it is read: (s, s, c) uint8, or (f,) float32
    m: int  # patches to keep of an image
    batch_size: int  # images of a step
    largest_bag: int  # patches of the largest image
    learn: bool = False  # there is a gradient step; else only selection and a forward pass of the kept patches
    chunk: int | None = None  # patches at a time in the pass without gradients, where the user has fixed them
    ahead: int = 4  # chunks that are read ahead
    color: bool = True  # training changes colors
    predicts: bool = False  # a prediction of batches of such images follows the last gradient step
    jpeg: bool = True  # patches may come as JPEG, which a GPU decodes
    turned: bool = False  # patches are flipped or rotated
    host_buffers: int = 0  # further bytes on the host, such as decoded images that stay in memory; they count on a CPU
    open_pictures: int = 0  # bytes of images that are decoded whole, as many as are open at a time; they count on a CPU

    @property
    def pixels(self) -> bool:
        """Whether patches are pixels; else stored features."""
        return len(self.patch_shape) > 1

    @property
    def patch_bytes(self) -> int:
        return math.prod(self.patch_shape) * (1 if self.pixels else 4)

    @property
    def kept(self) -> int:
        """Patches that the largest image keeps."""
        return min(self.m, self.largest_bag)


@dataclass(frozen=True)
class Line:
    """Bytes as a function of the patches k: base + each * k."""

    base: float
    each: float

    def __call__(self, k: int) -> int:
        return round(self.base + self.each * k)


@dataclass(frozen=True)
class PassBytes:
    """Bytes of the passes, beyond the weights."""

    score: Line  # of the pass without gradients over k patches
    learn: Line  # of encoding k patches with gradients; as `score` where the encoder does not learn
    pool: Line  # of pool, heads and their gradients over all images with m kept patches each
    dim: int  # width d of an embedding


class Probe:
    """Runs the passes of a model over random patches; everything of the model stays as it was."""

    def __init__(self, encoders: Encoders, work: Workload) -> None:
        self.encoders, self.model, self.work = encoders, encoders.model, work
        self.device = encoders.device
        self.rng = np.random.default_rng(0)
        self.dim = 0

    def measure(self, chunk: int, room: int) -> PassBytes:
        """Measure chunks of up to `chunk` patches, and none that would need more than `room` bytes."""
        model, work, steps = self.model, self.work, comes_in_steps(self.device)
        learns = work.learn and any(parameter.requires_grad for parameter in model.encoder.parameters())
        with as_it_was(model, self.device):
            with evaluating(model):
                self.dim = model.encode(self._converted(self._patches(2))).shape[1]
            score = _line(self._score, chunk, room, steps)
            model.train(work.learn)
            learn = _line(self._encode, max(2, work.batch_size * work.kept), room, steps) if learns else score
            return PassBytes(score, learn, _line(self._pool, work.kept, room, steps), self.dim)

    def _score(self, k: int) -> int:
        pixels, where = self._patches(k), example_positions(self.model, (k,), self.device)
        colors = self._colors(k)

        def score() -> Tensor:
            embedding = self.encoders.embed(torch.from_numpy(pixels).to(self.device), colors)
            return self.encoders.logits(embedding, where)

        with self.encoders.inference():
            return growth(self.device, score, REPEATS)

    def _encode(self, k: int) -> int:
        pixels = self._patches(k)

        def step() -> None:
            embedding = self.encoders.learn(self._converted(pixels))
            torch.autograd.backward(embedding, torch.ones_like(embedding))

        return growth(self.device, step, REPEATS)

    def _pool(self, m: int) -> int:
        images, learn, device = self.work.batch_size, self.work.learn, self.device
        mask = torch.ones(images, m, dtype=torch.bool, device=device)
        where = example_positions(self.model, (images, m), device)

        def step() -> None:
            embedding = torch.randn(images * m, self.dim, device=device, requires_grad=learn)
            padded = torch.zeros(images, m, self.dim, device=device).masked_scatter(mask[..., None], embedding)
            logits = self.model.classify(padded, where, mask)
            if learn:
                torch.autograd.backward([each.sum() for each in logits.values()])

        with torch.set_grad_enabled(learn):
            return growth(device, step, REPEATS)

    def _patches(self, k: int) -> NDArray[Any]:
        if self.work.pixels:
            return self.rng.integers(0, 256, (k, *self.work.patch_shape), np.uint8)
        return self.rng.standard_normal((k, *self.work.patch_shape), np.float32)

    def _colors(self, k: int) -> Tensor | None:
        if not (self.work.learn and self.work.color and self.work.pixels):
            return None
        channels = self.work.patch_shape[-1]
        return torch.eye(channels, channels + 1, device=self.device).expand(k, -1, -1)

    def _converted(self, pixels: NDArray[Any]) -> Tensor | AsRead:
        read = as_read(torch.from_numpy(pixels), self.device, self._colors(len(pixels)))
        return values_of(read) if self.device.type == "cpu" else read  # the bill counts pixels on the host


def _line(measure: Callable[[int], int], most: int, room: int, steps: bool) -> Line:
    """Measure growing sizes up to `most`, at least two where there is room, and fit a line through the last two.

    Each size is measured twice and the smaller figure taken, since the first run also allocates what stays for good:
    kernels, plans, threads. Where bytes come in `steps`, a growth that is small beside a step says nothing about a
    patch, and a first run that is slow because libraries are loaded is not a reason to stop.
    """
    points: list[tuple[int, int]] = []
    k = min(FIRST_PATCHES, most)
    if steps:
        measure(k)
    while True:
        began = time.perf_counter()
        try:
            points.append((k, min(measure(k), measure(k))))
        except Exception as error:
            if not points or not out_of_memory(error):
                raise
            break
        seconds, size = time.perf_counter() - began, points[-1][1]
        enough = len(points) > 1 and (size >= ENOUGH_BYTES or (seconds >= ENOUGH_SECONDS and not steps))
        if enough or k >= most or size * FACTOR > room:
            break
        k = min(k * FACTOR, most)
    (k, size), (before, less) = points[-1], points[-2] if len(points) > 1 else (0, 0)
    each = (size - less) / (k - before)
    return Line(size - each * k, each) if 0 <= each * k <= size else Line(0, size / k)


def example_positions(model: IPSClassifier, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Return positions of any patches, as the model's position code takes them; None where it has none."""
    if model.position is None:
        return None
    if takes_centers(model.position):
        return torch.zeros(*shape, 2, device=device)
    return torch.zeros(shape, dtype=torch.long, device=device)


@contextmanager
def as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore everything that a step changes. Inside, weights that learn have gradients, so that no pass makes them."""
    modes = [(part, part.training) for part in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), kept_buffers(model):
        try:
            for parameter, _ in gradients:
                parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for part, mode in modes:
                part.training = mode
