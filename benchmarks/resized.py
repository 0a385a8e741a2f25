"""The whole image made smaller, as a single patch: what IPS is compared with at equal cost."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from PIL import Image

from keyhole.config.settings import Config
from keyhole.util.files import csv_text, write_atomic

COST_OF_LEARNING = 5
"""Patches that are encoded in the time in which one is learned from; measured with Lite0 on two cores."""
SHIFTS = 16
"""The resized image shifts by up to this part of its side."""


def resized_side(patch: int, m: int, n: float, most: float = math.inf) -> int:
    """Return the side of an image, a multiple of 32, that costs in learning what IPS costs with its selection.

    Args:
        patch: Side of a patch.
        m: Patches that are learned from.
        n: Patches that are looked at.
        most: The largest side.
    """
    return max(32, int(min(patch * (m + n / COST_OF_LEARNING) ** 0.5, most) / 32 + 0.5) * 32)


def whole_image(config: Config, manifest: Path, side: int, folder: Path) -> Config:
    """Return a configuration that learns from whole images of `side` px, which are written below `folder`."""
    stride = side // SHIFTS
    return config.replace(
        data={"path": write_views(manifest, side, stride, folder / f"resized-{side}")},
        patch={"size": side, "stride": stride, "edge": "drop", "foreground": "all"},
        select={"m": 1, "chunk": 4},
        train={"explore": 2.0 * config.train.epochs},  # a single patch needs no score
    )


def write_views(manifest: Path, side: int, stride: int, folder: Path) -> Path:
    """Write every image of a manifest as a square, and the manifest of these, without annotations.

    Black beside and below it makes place for the shift: in each epoch another square of `side` px is read, up to
    `stride` px further; without a shift it is the image.
    """
    if (folder / manifest.name).exists():
        return folder / manifest.name
    folder.mkdir(parents=True, exist_ok=True)
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        with Image.open(manifest.parent / row["image"]) as image:
            view = Image.new(image.mode, (side + stride - 1, side + stride - 1))
            view.paste(image.resize((side, side), Image.Resampling.BILINEAR))
        row["image"] = f"{number}.png"
        view.save(folder / row["image"], compress_level=1)
    names = [name for name in rows[0] if name != "annotation"]
    return write_atomic(folder / manifest.name, csv_text([names, *([row[name] for name in names] for row in rows)]))
