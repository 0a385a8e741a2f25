"""Small generated data sets on which a run takes minutes, for comparing settings from random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvases import write_canvases
from marks import write_marks

from keyhole.datasets.digits import make_digits
from keyhole.datasets.slides import SlideSet, make_slides
from keyhole.tasks.intervals import NORMAL, newcombe, wilson

QUICK = {"train": 80, "val": 20, "test": 20}
"""Images of each split, to see that everything works."""


@dataclass(frozen=True)
class Setting:
    """A data set, and what all variants have in common on it.

    Attributes:
        name: Of the folder, the option and the table.
        about: What the images are, for the reader.
        counts: Images of each split.
        write: Writes the images into a folder, with the counts as arguments; returns the manifest.
        recipe, changes: Its recipe, None for the defaults, and what is changed of it for this size.
        task, metric, chance: The figure that is judged, and what guessing gives.
        upright: Up, down, left and right differ, so that `init` gets `augment.flip` and `augment.rotate` off, as it
            asks for.
    """

    name: str
    about: str
    counts: Mapping[str, int]
    write: Callable[..., Path]
    recipe: str | None
    changes: Mapping[str, Any]
    task: str
    metric: str
    chance: float
    upright: bool = False

    @property
    def figure(self) -> str:
        """The name of the figure among those of a result."""
        return f"{self.task}.{self.metric}"

    def images(self, folder: Path, counts: Mapping[str, int]) -> Path:
        """Return the manifest of so many images in a folder below `folder`; they are drawn if they are not there."""
        manifest = folder / "-".join([self.name, *map(str, counts.values())]) / "images" / "manifest.csv"
        return manifest if manifest.exists() else self.write(manifest.parent, **counts)

    def lower(self, value: float, images: int) -> float:
        """Return the lower limit of the 95 % interval of a share, or of an AUROC with classes of one size."""
        limits = (
            newcombe(value, images / 2, images / 2, NORMAL) if self.metric == "auroc" else wilson(value, images, NORMAL)
        )
        return limits[0]


def write_slides(folder: Path, *, train: int, val: int, test: int) -> Path:
    return make_slides(folder, SlideSet(count=train + val + test, val=val, test=test, side=2048))


def write_small_canvases(folder: Path, **counts: int) -> Path:
    return write_canvases(folder, size=400, noise=4, **counts)


SETTINGS = {
    each.name: each
    for each in (
        Setting(
            "demo",
            "the images of `keyhole demo`: copies of one digit among strokes, 1536 px",
            {"train": 240, "val": 40, "test": 200},
            make_digits,
            "demo",
            {},
            "label",
            "accuracy",
            0.2,
            upright=True,
        ),
        Setting(
            "slides",
            "generated slides of 2048 px, with nests of three nuclei under 0.1 % of the tissue or without",
            {"train": 200, "val": 40, "test": 80},
            write_slides,
            "slides",
            {},
            "label",
            "auroc",
            0.5,
        ),
        Setting(
            "canvases",
            "Megapixel MNIST as published, reduced to 400 px and 4 strokes of noise; judged by the task `majority`",
            {"train": 1000, "val": 200, "test": 250},
            write_small_canvases,
            "megapixel-mnist",
            {
                "data.tasks": ["majority=multiclass", "max=multiclass", "top=multiclass", "multi=multilabel"],
                "model.encoder": "small",
                "model.width": 16,
                "model.stages": 2,
                "select.m": 10,
                "select.chunk": 10,
                "train.epochs": 40,
                "train.warmup": 5,
            },
            "majority",
            "accuracy",
            0.1,
            upright=True,
        ),
        Setting(
            "marks",
            "generated photographs of 96 px with clutter; three small marks decide the class",
            {"train": 600, "val": 60, "test": 200},
            write_marks,
            None,
            {"patch.size": 16, "select.m": 4, "select.chunk": 8},
            "label",
            "accuracy",
            0.5,
        ),
    )
}
