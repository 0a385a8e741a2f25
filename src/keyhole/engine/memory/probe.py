"""What the two passes of a model cost in memory: measured on the model itself, on its device, at a few small sizes.

Letters: b image, m kept, k patches of a chunk, d width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keyhole.engine.memory.meter import comes_in_steps, growth
from keyhole.nn import CenterPosition, IPSClassifier, evaluating
from keyhole.nn.pixels import AsRead
from keyhole.nn.split import kept_buffers
from keyhole.nn.tensors import as_read, values_of
from keyhole.util.budget import out_of_memory

ENOUGH_BYTES = 2**28
"""A growth of this size is measured well; larger probes would only take longer."""
ENOUGH_SECONDS = 0.5
REPEATS = 2
"""Runs that one measurement spans: on the CPU, the second leaves gaps in the heap that the first did not."""
SMALLEST, STEP = 4, 4
"""Patches of the first probe; each further one is so many times the size of the one before."""


@dataclass(frozen=True)
class Line:
    """Bytes as a function of patches: base + each * k."""

    base: float
    each: float

    def __call__(self, k: int) -> int:
        return round(self.base + self.each * k)


@dataclass(frozen=True)
class Costs:
    """Bytes beyond the weights.

    Attributes:
        score: of the pass without gradients over k patches.
        learn: of encoding k patches with gradients; as `score` where the encoder does not learn.
        pool: of pool, heads and their gradients over all images with m kept patches each.
        dim: width d of an embedding.
    """

    score: Line
    learn: Line
    pool: Line
    dim: int


def probe(
    model: IPSClassifier,
    patch_shape: Sequence[int],
    *,
    images: int,
    m: int,
    chunk: int,
    learn: bool,
    color: bool,
    room: int,
) -> Costs:
    """Measures a model; leaves weights, gradients, buffers, modes and random state as they were.

    Args:
        model: on its device.
        patch_shape: of one patch as it is read: (s, s, c) uint8, or (f,) float32.
        images: b.
        m: kept patches of an image.
        chunk: largest number of patches that the pass without gradients may be given.
        learn: whether there is a gradient step.
        color: whether colours are changed at random, which takes copies of the pixels.
        room: bytes that there are; a probe is not made larger where it would need more.

    Raises:
        An error of which `out_of_memory` is true: even the smallest probe does not fit.
    """
    device = next(model.parameters()).device
    rng = np.random.default_rng(0)

    def patches(k: int) -> NDArray[Any]:
        if len(patch_shape) == 1:
            return rng.standard_normal((k, *patch_shape), np.float32)
        return rng.integers(0, 256, (k, *patch_shape), np.uint8)

    def identity(k: int) -> Tensor:
        channels = patch_shape[-1]
        return torch.eye(channels, channels + 1, device=device).expand(k, -1, -1)

    def convert(pixels: NDArray[Any]) -> Tensor | AsRead:
        colors = identity(len(pixels)) if color and pixels.dtype == np.uint8 else None
        read = as_read(torch.from_numpy(pixels), device, colors)
        return values_of(read) if device.type == "cpu" else read  # pixels on the host are counted by the bill

    def score(k: int) -> int:
        pixels, where = patches(k), example_positions(model, (k,), device)
        colors = identity(k) if color and pixels.dtype == np.uint8 else None
        with model.looking():
            return growth(device, lambda: model.score(torch.from_numpy(pixels).to(device), where, colors), REPEATS)

    def encode(k: int) -> int:
        pixels = patches(k)

        def step() -> None:
            embedding = model.encode(convert(pixels))
            torch.autograd.backward(embedding, torch.ones_like(embedding))

        return growth(device, step, REPEATS)

    def pool(width: int) -> int:
        mask = torch.ones(images, width, dtype=torch.bool, device=device)
        where = example_positions(model, (images, width), device)

        def step() -> None:
            embedding = torch.randn(images * width, dim, device=device, requires_grad=learn)
            padded = torch.zeros(images, width, dim, device=device).masked_scatter(mask[..., None], embedding)
            logits = model.classify(padded, where, mask)
            if learn:
                torch.autograd.backward([each.sum() for each in logits.values()])

        with torch.set_grad_enabled(learn):
            return growth(device, step, REPEATS)

    steps = comes_in_steps(device)
    learns = learn and any(parameter.requires_grad for parameter in model.encoder.parameters())
    with as_it_was(model, device):
        with evaluating(model):
            dim = model.encode(convert(patches(2))).shape[1]
        scoring = _line(score, chunk, room, steps)
        model.train(learn)
        learning = _line(encode, max(2, images * m), room, steps) if learns else scoring
        return Costs(scoring, learning, _line(pool, m, room, steps), dim)


def _line(measure: Callable[[int], int], most: int, room: int, steps: bool) -> Line:
    """Measures growing sizes up to `most`, two of them at least where there is room, and lays a line through the last.

    Each is measured twice and the smaller figure taken: what a first run leaves for good (kernels, plans, threads) is
    no part of what a pass needs.

    Args:
        measure: patches to bytes.
        most: patches.
        room: bytes that there are.
        steps: whether bytes come in steps. A growth that is small beside a step then says nothing about a patch, and a
            first run that is slow because libraries are loaded is not a reason to stop.
    """
    points: list[tuple[int, int]] = []
    k = min(SMALLEST, most)
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
        if enough or k >= most or size * STEP > room:
            break
        k = min(k * STEP, most)
    (k, size), (before, less) = points[-1], points[-2] if len(points) > 1 else (0, 0)
    each = (size - less) / (k - before)
    return Line(size - each * k, each) if 0 <= each * k <= size else Line(0, size / k)


def example_positions(model: IPSClassifier, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Positions of any patches, as the model's code takes them; None where it has none."""
    if model.position is None:
        return None
    if isinstance(model.position, CenterPosition):
        return torch.zeros(*shape, 2, device=device)
    return torch.zeros(shape, dtype=torch.long, device=device)


@contextmanager
def as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Everything that a step changes is put back; meanwhile every weight that learns has a gradient to add to, so that
    gradients, which stay, are not counted with what a pass needs."""
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
