"""The images of a measurement: some of the user's, or generated ones that cost as much to read as those of a recipe."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from keyhole.config.settings import Config, DataConfig
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest, read_for_tasks, read_manifest
from keyhole.engine.device import choose_device
from keyhole.images.geometry import Size
from keyhole.runs.checkpoint import read_info
from keyhole.runs.run import Run
from keyhole.runs.seal import State
from keyhole.tasks.kinds import Task
from keyhole.training.setup import cache_limit
from keyhole.util.platform import available_memory
from keyhole.util.tables import read_rows

DIFFERENT_FILES = 4
"""Number of files that are written, then linked under as many names as needed: more would cost the same to read."""
JPEG_QUALITY = 90
"""The quality of cameras and scanners."""


@dataclass(frozen=True)
class Kind:
    """A kind of images that a recipe is for."""

    what: Literal["photographs", "slides", "features"]
    size: Size  # pixels of an image, or numbers and rows of a file of features
    grey: bool = False
    images: int = 1000  # training images of the published data; whether compiling pays depends on it

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


class Data(NamedTuple):
    """The images of a measurement in words, and the numbers of all training and validation images."""

    told: str
    train: int
    val: int
    share: float  # training images per measured image


def measured_data(
    config: Config, run: Run | None, recipe: str | None, scratch: Path, steps: int, say: Callable[[str], None]
) -> tuple[Config, Data]:
    """Return the configuration with a CSV of the training images to measure."""
    wanted = (1 + steps) * config.train.batch
    if run is None and config.data.path is None:
        kind = kind_of(recipe, config)
        say(f"writing {kind.describe()}")
        path = write_images(kind, scratch, wanted)
        features = scratch / "features" if kind.what == "features" else None
        config = config.replace(data=DataConfig(path=path, features=features, cache=0.0))
        told = f"generated {kind.describe()}, read from disk each time"
        return config, Data(told, kind.images, 0, kind.images / wanted)
    if run is not None and config.data.path is None:
        # the manifest has absolute paths, and only the training images need to exist
        kept = {name: getattr(config.data, name) for name in ("cache", "on_bad_image")}
        source, data = str(run.path), run.config.data.replace(path=run.path / "manifest.csv", root=None, **kept)
        last = run.path / "last.safetensors"
        tasks = [Task.from_json(task) for task in State.from_json(read_info(last), last).tasks]
        manifest = read_for_tasks(data, tasks, ("train",))
        val = sum(row["split"] == "val" for row in read_rows(run.path / "manifest.csv"))
    else:
        source, data = str(config.data.path), config.data
        manifest = read_manifest(data, config.train.seed)
        val = len(manifest.split("val"))
    train, some = len(manifest.split("train")), _some(manifest, wanted, config.train.seed)
    # the share of images that stays decoded in memory is that of the whole run
    limit = cache_limit(config, choose_device(config.run.device))
    data = data.replace(
        path=replace(manifest, items=some).write(scratch / "some.csv"),
        root=None,
        tasks=tuple(f"{task.name}={task.kind}" for task in manifest.tasks),
        cache=len(some) / train * (available_memory() / 4e9 if limit is None else limit),
    )
    told = f"{len(some)} of {train} training images of {source}"
    return config.replace(data=data), Data(told, train, val, train / len(some))


def _some(manifest: Manifest, wanted: int, seed: int) -> tuple[Item, ...]:
    """Return `wanted` random training images, and one of each class that would be missing."""
    train = manifest.split("train")
    order = [train[place] for place in np.random.default_rng(seed).permutation(len(train))]
    some, rest = order[:wanted], order[wanted:]
    classed = [task for task in manifest.tasks if task.classes]

    def classes(item: Item) -> set[tuple[str, str]]:
        return {(task.name, label) for task in classed for label in task.classes_of(item.labels[task.name])}

    known = {label for item in some for label in classes(item)}
    for item in rest:
        if not classes(item) <= known:
            some.append(item)
            known |= classes(item)
    return tuple(some)


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
    """Write files in a new folder named `kind.what`, and return a CSV of training images of two classes."""
    write, suffix = {
        "photographs": (_photograph, ".jpg"),
        "slides": (_slide, ".tif"),
        "features": (_features, ".h5"),
    }[kind.what]
    place = folder / kind.what
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
    """Write soft shapes and grain, with the bytes per pixel of a photograph (about 0.3)."""
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
