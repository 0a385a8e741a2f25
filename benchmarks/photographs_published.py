"""How the published pipeline brings photographs to the model: a torch Dataset that does everything on the host.

Written from the paper's settings (traffic signs): decode, enlarge to 1600 x 1200, change the colours, shift by up to
100 px, scale, normalise, cut into 192 patches of 100 px in float32; image after image in worker processes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SIZE = (1600, 1200)
PATCH = 100
PATCHES = (SIZE[0] // PATCH) * (SIZE[1] // PATCH)
JITTER = 0.1
AHEAD = 2
"""Batches that a worker prepares ahead; torch's default."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Photographs(Dataset[tuple[Tensor, int]]):
    """Image -> ((192 3 100 100) float32, label)."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int]) -> None:
        from torchvision import transforms

        self.files, self.labels = list(files), list(labels)
        self.jitter = transforms.ColorJitter(JITTER, JITTER, JITTER, JITTER)
        self.scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        from PIL import Image
        from torchvision.transforms import functional

        with Image.open(self.files[place]) as file:
            image: Any = file.convert("RGB").resize(SIZE, Image.Resampling.BILINEAR)
        image = self.jitter(image)
        shift = [random.randint(-PATCH, PATCH) for _ in range(2)]
        image = functional.affine(image, angle=0.0, translate=shift, scale=1.0, shear=[0.0])
        pixels: Tensor = self.scale(image)
        patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        return patches.permute(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH), self.labels[place]


def most_workers(batch: int) -> int:
    """So many as the shared memory can hold the finished batches of, two each; one more would kill the run."""
    shared = Path("/dev/shm")
    if not shared.exists():
        return 16
    found = os.statvfs(shared)
    return max(1, int(found.f_bavail * found.f_frsize // (AHEAD * batch * PATCHES * PATCH**2 * 3 * 4) - 1))


def load(
    files: Sequence[Path], labels: Sequence[int], batch: int, workers: int, pinned: bool
) -> DataLoader[tuple[Tensor, int]]:
    """Shuffled batches (b 192 3 100 100); workers stay between epochs, which favours the published pipeline."""
    torch.manual_seed(0)
    return DataLoader(
        Photographs(files, labels),
        batch,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pinned,
        persistent_workers=workers > 0,
        timeout=300 if workers else 0,
    )
