"""Stored features as a source of patches."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.config.settings import Config, ModelConfig, PatchConfig
from keyhole.errors import ConfigError, ImageError
from keyhole.patches.features.files import UNKNOWN, FeatureFile, Origin, checked_coords, feature_faults
from keyhole.patches.features.grid import FeatureGrid, in_pixels
from keyhole.patches.features.hdf5 import Hdf5Features
from keyhole.patches.features.pt import TorchFeatures
from keyhole.patches.sources import PatchSource
from keyhole.util.rows import checked_index

READERS: tuple[type[Hdf5Features | TorchFeatures], ...] = (Hdf5Features, TorchFeatures)
"""Best first: HDF5 holds coordinates. Files of another suffix are read by the first."""
FEATURE_SUFFIXES = tuple(suffix for reader in READERS for suffix in reader.suffixes)


def open_features(path: Path) -> FeatureFile:
    """Open a file of features with the reader of its suffix; ImageLost if it cannot be reached, else ImageError."""
    with feature_faults(path, "cannot be read"):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "not a regular file, expected features as .h5 or .pt.")
        if status.st_size == 0:
            raise ImageError(path, "the file is empty (0 bytes). Copy it again.")
    return next((reader for reader in READERS if path.suffix.lower() in reader.suffixes), READERS[0])(path)


class FeaturePatches(PatchSource):
    """The features of one file, which `close` closes. Rows are read in their order in the file.

    Args:
        file: open; see `open_features`.
        name: for messages; default is the file's path.
        mpp: microns per level-0 pixel of the slide, by which coordinates in microns become pixels.
        learned: the encoder that the model learned from, as far as it is known.
    """

    grid: FeatureGrid

    def __init__(
        self, file: FeatureFile, name: str | None = None, mpp: float | None = None, learned: Origin = UNKNOWN
    ) -> None:
        self.file, self.origin, self.learned = file, file.origin, learned
        self.name = str(file.path) if name is None else name
        self.patch_shape, self.dtype = (file.d,), np.dtype(np.float32)
        self._coords, attributes = file.coords, file.attributes
        if file.coords_um is not None and mpp is not None:
            self._coords = checked_coords(file.path, file.coords_um / mpp, file.n)
            attributes = {**attributes, **in_pixels(attributes, mpp)}
        self.grid = grid = FeatureGrid(file.n, self._coords, attributes)
        self.scale, self.mpp, self.l0_size, self.qupath_origin = grid.scale, grid.mpp, grid.l0_size, grid.qupath_origin
        self.l0_mpp = None if self.mpp is None else self.mpp / self.scale

    def read(self, index: ArrayLike | slice, out: NDArray[Any] | None = None) -> NDArray[Any]:
        rows = checked_index(index, self.file.n, "feature")
        if out is None:
            out = np.empty((len(rows), self.file.d), np.float32)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        cuts = np.flatnonzero((np.diff(ordered) != 1) | (np.diff(order) != 1)) + 1
        for first, last in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            if last > first:  # a run of the file that is one in `out` too
                start, place = int(ordered[first]), int(order[first])
                self.file.read(start, start + int(last - first), out[place : place + int(last - first)])
        return out

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "features": str(self.file.path), "size_known": self.grid.known}

    def positions_2d(self, index: ArrayLike | slice) -> NDArray[np.float64]:
        """Return x, y of the centres in level-0 pixels; ConfigError if the file has none."""
        if self._coords is None:
            needs = "the dataset `coords`, which is missing; use 1d or none, or the .h5 files of the archive"
            if self.file.coords_um is not None:
                stated = "in microns; give the slide's microns per pixel in the column `mpp`"
                needs = f"pixels, and `coords` are {stated}, or use 1d or none"
            raise ConfigError(f"{self.file.path}: model.position 2d needs {needs}")
        return self.grid.centers(index)

    def doubts(self) -> list[str]:
        no_boxes = self.file.coords_um is not None and self._coords is None
        need = "features have places in microns: without the slide's microns per pixel (column `mpp`) there are"
        return list(filter(None, [self.origin.doubt(self.learned), f"{need} scores and no boxes" if no_boxes else ""]))

    def close(self) -> None:
        self.file.close()


@dataclass(frozen=True)
class FeatureOpener:
    """Opens the features of one file when called; making an opener costs nothing.

    Attributes:
        path: the file, .h5 or .pt.
        name: for messages; as the manifest writes it.
        width: values of each feature that the model takes; None takes any.
        learned: the encoder that the model learned from, as far as it is known.
        mpp: microns per level-0 pixel of the slide, if given.
    """

    path: Path
    name: str
    width: int | None = None
    learned: Origin = UNKNOWN
    mpp: float | None = None

    def __call__(self) -> FeaturePatches:
        """Open the file; ImageError if it is damaged, or of another layout or width than expected."""
        file, problem = open_features(self.path), ""
        if self.width is not None and file.d != self.width:
            problem = f"features of {file.d} numbers, but the model takes {self.width}."
        elif self.learned.excludes(file.origin):
            problem = f"features of {file.origin.describe()}, but the others, or the model, are of "
            problem += f"{self.learned.describe()}. Numbers of two encoders mean nothing to each other."
        if problem:
            file.close()
            raise ImageError(self.path, f"{problem} Extract the features of this slide by the encoder of the others.")
        return FeaturePatches(file, self.name, self.mpp, self.learned)


def feature_width(path: str | Path) -> int:
    """Return the number of values of each feature of a file, without reading a feature."""
    with closing(open_features(Path(path))) as file:
        return file.d


def learned_origin(model: ModelConfig) -> Origin:
    """Return the encoder that a model of stored features learned from."""
    return Origin(model.feature_encoder, model.feature_weights, model.feature_patches)


def common_origin(paths: Iterable[str | Path]) -> Origin:
    """Return the first origin that a file states. Damaged files are reported later, when they are read."""
    for path in paths:
        with suppress(ImageError), closing(open_features(Path(path))) as file:
            if file.origin.known:
                return file.origin
    return UNKNOWN


def check_features_config(config: Config) -> None:
    """Refuse settings of an encoder, which have no effect on stored features."""
    for name in ("encoder", "channels", "width", "stages", "pretrained", "weights"):
        value = getattr(config.model, name)
        if value != getattr(ModelConfig(), name):
            problem = f"model.{name} (={value}) is for images, but the data are stored features"
            remedy = f"model.dim (={config.model.dim}): drop it, or leave data.features out"
            raise ConfigError(f"{problem}, which are projected to {remedy}")


def idle_patch_settings(config: Config) -> list[str]:
    """Return a line that names the settings of patches that have no effect on stored features; none if there are none.

    The size of a patch is the unit of 2-D positions.
    """
    usual = PatchConfig()
    idle = [
        f"patch.{name}"
        for name in type(config.patch).model_fields
        if getattr(config.patch, name) != getattr(usual, name)
        and not (name == "size" and config.model.position == "2d")
    ]
    said = "no effect on stored features, whose patches were chosen when they were embedded"
    return [f"{', '.join(idle)}: {said}"] if idle else []
