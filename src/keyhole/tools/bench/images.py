"""Writes images for a measurement if the user gives none: files as those that the recipe is for.

A few different ones are written and then linked under as many names as needed. Only what they cost to read matters:
photographs with grain, generated tissue, or rows of random features.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from keyhole.config.settings import Config
from keyhole.images.geometry import Size

DIFFERENT_FILES = 4
"""Files that are written; more would take longer and cost the same to read."""
JPEG_QUALITY = 90
"""As cameras and scanners write."""


@dataclass(frozen=True)
class Kind:
    """A kind of images that a recipe is for.

    Attributes:
        what: photographs, slides, or stored features.
        size: pixels of an image, or rows and numbers of a file of features.
        grey: photographs of one channel.
        images: number of training images of the published data; whether compiling pays depends on it.
    """

    what: Literal["photographs", "slides", "features"]
    size: Size
    grey: bool = False
    images: int = 1000

    def describe(self) -> str:
        if self.what == "features":
            return f"files of {self.size.height:,} features of {self.size.width:,} numbers, as HDF5"
        shape = f"{self.size.width} x {self.size.height} pixels"
        if self.what == "slides":
            return f"slides of tissue, {shape}, as tiled JPEG TIFF"
        return f"{'grey ' if self.grey else ''}photographs of {shape}, as JPEG"


KINDS = {
    "traffic": Kind("photographs", Size(1600, 1200), images=747),
    "megapixel-mnist": Kind("photographs", Size(1500, 1500), grey=True, images=5000),
    "demo": Kind("photographs", Size(1536, 1536), grey=True, images=240),
    "slides": Kind("slides", Size(6144, 6144), images=100),
    "camelyon16": Kind("slides", Size(6144, 6144), images=270),
    "camelyon16-features": Kind("features", Size(2048, 10_000), images=270),
}
PHOTOGRAPHS, SLIDES = Kind("photographs", Size(2048, 1536)), Kind("slides", Size(6144, 6144))


def kind_of(recipe: str | None, config: Config) -> Kind:
    """Return the kind of images of a recipe; for other settings, slides if they use tissue or microns."""
    if recipe in KINDS:
        return KINDS[recipe]
    if config.model.feature_width is not None:
        return Kind("features", Size(config.model.feature_width, 10_000))
    if config.patch.foreground == "tissue" or config.patch.mpp is not None:
        return SLIDES
    size, grey = PHOTOGRAPHS.size, config.model.channels == 1
    side = 4 * config.patch.size  # at least 4 x 4 patches
    return replace(PHOTOGRAPHS, size=Size(max(size.width, side), max(size.height, side)), grey=grey)


def write_images(kind: Kind, folder: Path, count: int) -> Path:
    """Write files and a CSV of `count` images of two classes, all in the training split.

    Args:
        kind: of the images.
        folder: an empty folder.
        count: rows of the CSV, at least two.

    Returns:
        The CSV. Features lie in the folder `features` beside it.
    """
    write = {"photographs": _photograph, "slides": _slide, "features": _features}[kind.what]
    suffix = {"photographs": ".jpg", "slides": ".tif", "features": ".h5"}[kind.what]
    place = folder / ("features" if kind.what == "features" else "images")
    place.mkdir()
    names = [f"{number}{suffix}" for number in range(max(2, count))]
    for number, name in enumerate(names):
        if number < DIFFERENT_FILES:
            write(place / name, kind, number)
        else:
            os.link(place / names[number % DIFFERENT_FILES], place / name)
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "split"])
        rows.writerows([place / name, "ab"[number % 2], "train"] for number, name in enumerate(names))
    return path


def _photograph(path: Path, kind: Kind, seed: int) -> None:
    """Write soft shapes and grain, with as many bytes per pixel as a photograph of that quality (about 0.3)."""
    from PIL import Image

    draw = np.random.default_rng([seed, 1])
    size, channels = kind.size, 1 if kind.grey else 3
    shapes = draw.integers(0, 256, (12, 16, channels), np.uint8)
    soft = Image.fromarray(shapes.squeeze()).resize((size.width, size.height), Image.Resampling.BICUBIC)
    grain = draw.normal(0, 5, (size.height, size.width, 1))
    pixels = np.asarray(soft).reshape(size.height, size.width, channels) + grain
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze()).save(path, quality=JPEG_QUALITY)


def _slide(path: Path, kind: Kind, seed: int) -> None:
    from keyhole.datasets.slides import make_slide

    make_slide(path, kind.size.width, seed, tissue=0.6, positive=bool(seed % 2))


def _features(path: Path, kind: Kind, seed: int) -> None:
    import h5py

    rows = np.random.default_rng([seed, 2]).normal(size=(kind.size.height, kind.size.width)).astype(np.float32)
    index = np.arange(len(rows))
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=rows)
        file.create_dataset("coords", data=np.stack([index % 100, index // 100], axis=1) * 256)
