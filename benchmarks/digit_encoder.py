"""A small encoder that has seen single patches of Megapixel MNIST, as a start for runs that have minutes, not hours.

From random weights such a run stays at chance for tens of thousands of canvases: what is not kept is not learned from.
Here the encoder learns to name the digit in a patch of 50 px that shows one whole or in part, and to tell it from line
noise, by cross-entropy; the digits are those that the canvases to train on show. Attention, and what the digits of a
canvas mean together, are left to the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from canvases import digits as split_digits
from torch import Tensor, nn
from torch.nn import functional as F

from keyhole.datasets.megapixel_mnist import thick_stroke
from keyhole.datasets.mnist import SIDE, Digits
from keyhole.nn import SmallEncoder
from keyhole.util.files import atomic_file

PATCH = 50
SEEN = 0.5
"""Share of a digit that a patch must show to be named; with less it counts as none."""
NONE = 10
"""The class of everything else."""


def write_encoder(path: Path, width: int, steps: int, seed: int = 0) -> None:
    """Trains a `small` encoder of one channel in float32, and writes its weights as safetensors."""
    from safetensors.torch import save

    rng = np.random.default_rng(seed)
    digits = split_digits()["train"]
    noise = np.stack([thick_stroke(rng) for _ in range(2000)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SmallEncoder(1, width)
        head = nn.Linear(encoder.dim, NONE + 1)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        patches, labels = draw_patches(rng, digits, noise, 128)
        loss = F.cross_entropy(head(encoder(patches)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"encoder: step {step + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    with atomic_file(path) as file:
        file.write(save(encoder.state_dict()))


def draw_patches(rng: np.random.Generator, digits: Digits, noise: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Patches (count, 1, 50, 50) in 0 ... 1, half of them with a digit and half with noise, and their classes."""
    border = SIDE
    canvas = np.zeros((count, PATCH + 2 * border, PATCH + 2 * border), np.uint8)
    labels = np.full(count, NONE)
    for row, (x, y) in enumerate(rng.integers(8, border + PATCH - 8, (count, 2))):
        if row % 2:
            stamp = noise[rng.integers(len(noise))]
        else:
            number = rng.integers(len(digits.labels))
            stamp = digits.pixels[number]
            shown = [min(start + SIDE, border + PATCH) - max(start, border) for start in (x, y)]
            if shown[0] * shown[1] >= SEEN * SIDE**2:
                labels[row] = digits.labels[number]
        canvas[row, y : y + SIDE, x : x + SIDE] = stamp
    inside = canvas[:, None, border : border + PATCH, border : border + PATCH]
    return torch.from_numpy(inside.astype(np.float32) / 255), torch.from_numpy(labels)
