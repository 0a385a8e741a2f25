"""Digits for canvases of Megapixel MNIST: those of MNIST where its files are, else of scikit-learn, enlarged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from keyhole.datasets.digits import handwriting
from keyhole.datasets.megapixel_mnist import MegapixelMnist, make_megapixel_mnist
from keyhole.datasets.mnist import Digits, mnist_splits

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"


def write_canvases(folder: Path, mnist: Path = MNIST, **data: object) -> Path:
    """The manifest of a `MegapixelMnist(**data)`, which is drawn if it is not there."""
    if (folder / "manifest.csv").exists():
        return folder / "manifest.csv"
    wanted = MegapixelMnist(**data)  # type: ignore[arg-type]
    return make_megapixel_mnist(folder, wanted, digits(mnist, val=wanted.val > 0))


def digits(mnist: Path = MNIST, val: bool = True) -> dict[str, Digits]:
    """What the canvases of each split show; no two splits share a handwriting sample."""
    return mnist_splits(mnist, val) if mnist.is_dir() else _bundled()


def _bundled() -> dict[str, Digits]:
    """scikit-learn's digits, enlarged to 24 px inside a border of 2."""
    found = {}
    for split, samples in handwriting(range(10)).items():
        pixels = [
            np.pad(
                np.asarray(Image.fromarray(np.uint8(sample * (255 / 16))).resize((24, 24), Image.Resampling.BICUBIC)), 2
            )
            for digit in range(10)
            for sample in samples[digit]
        ]
        labels = np.repeat(range(10), [len(samples[digit]) for digit in range(10)])
        found[split] = Digits(np.stack(pixels), labels.astype(np.int64))
    return found
