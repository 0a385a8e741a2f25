"""Sources of patches: an image file or an array in memory, with one base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import ConfigError
from keyhole.images.geometry import Size
from keyhole.images.image import Image
from keyhole.patches.grid import Grid, Index, PatchGrid
from keyhole.patches.image_cache import decoded_bytes
from keyhole.util.rows import checked_index, take_rows

Array = NDArray[Any]


@dataclass(frozen=True)
class View:
    """How a whole image is turned in one epoch: first the flips, then `turns` counter-clockwise quarter turns.

    Applying it to each patch and to the positions gives the same as reading the turned image.
    """

    flip_x: bool = False
    flip_y: bool = False
    turns: int = 0

    def pixels(self, block: Array) -> Array:
        """Turn each patch of (k, s, s, c); return a view of the same memory."""
        block = block[:, :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
        return np.rot90(block, self.turns, axes=(1, 2))

    def undo(self, block: Array) -> Array:
        """Invert `pixels`: pixels that are written to the result appear turned in `block`."""
        block = np.rot90(block, -self.turns, axes=(1, 2))
        return block[:, :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def centers(self, xy: NDArray[np.float64], l0_size: Size) -> NDArray[np.float64]:
        """Return points (k, 2) of an image of `l0_size`, in the turned image."""
        (x, y), (width, height) = xy.T, l0_size
        x, y = width - x if self.flip_x else x, height - y if self.flip_y else y
        for _ in range(self.turns % 4):
            x, y, width, height = y, width - x, height, width
        return np.stack([x, y], axis=1)

    def cells(self, g_cells: Index, rows: int, columns: int) -> tuple[Index, tuple[int, int]]:
        """Return row and column (k, 2) of a grid of `rows` x `columns` in the turned grid, and its (rows, columns)."""
        row, column = g_cells.T
        row, column = rows - 1 - row if self.flip_y else row, columns - 1 - column if self.flip_x else column
        for _ in range(self.turns % 4):
            row, column, rows, columns = columns - 1 - column, row, columns, rows
        return np.stack([row, column], axis=1), (rows, columns)


class PatchSource(ABC):
    """Patches, or stored features, of one image: their values, and where they are on the image.

    A subclass sets `name`, `grid`, `patch_shape` and `dtype` and implements `read`, which may block and is called from
    several threads.

    Attributes:
        name: for messages; as the manifest writes it.
        grid: where the patches are, and so the map of scores; a `Grid(n)` if that is unknown.
        patch_shape: of one patch, (s, s, c) or (d,).
        dtype: of the values.
        scale: level-0 pixels per pixel of a patch.
        mpp: microns per pixel of a patch; None where unknown.
        l0_mpp: microns per level-0 pixel; None where unknown.
        file_mpp: those that the file states, also where the user gives others; None where it does not state them.
        l0_size: width and height of the image at level 0; None where unknown.
        qupath_origin: level-0 x, y from which QuPath counts; None where unknown.
        view: how the image is turned by the augmentation.
        decoded_bytes: memory that the level read takes when it is decoded whole; 0 for features.
        whole_bytes: memory that the reader needs because it decodes the image whole; 0 where it reads parts.
        in_memory: reading only copies.
    """

    name: str
    grid: Grid
    patch_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    scale: float = 1.0
    mpp: float | None = None
    l0_mpp: float | None = None
    file_mpp: float | None = None
    l0_size: Size | None = None
    qupath_origin: tuple[int, int] | None = None
    view: View = View()
    decoded_bytes: int = 0
    whole_bytes: int = 0
    in_memory: bool = False

    def __len__(self) -> int:
        return self.grid.n

    @abstractmethod
    def read(self, index: ArrayLike | slice, out: Array | None = None) -> Array:
        """Return patches (k, *patch_shape), written into `out` if given."""

    def close(self) -> None:  # noqa: B027 - an array in memory has no file
        """Close the file, if there is one. Reading afterwards is an error."""

    @property
    def extent(self) -> Size:
        """Width and height in level-0 pixels that hold all patches."""
        return self.l0_size or self.grid.extent

    def positions_1d(self, index: ArrayLike | slice) -> Index:
        """Index int64 (k,) in raster order of the full grid of the turned image."""
        return checked_index(index, len(self))

    def positions_2d(self, index: ArrayLike | slice) -> NDArray[np.float64]:
        """x, y float64 (k, 2) of the centres, in level-0 pixels of the turned image."""
        raise ConfigError(f"{self.name}: a 2-D position code needs `centers`; give them, or use `1d` or `none`")

    def describe(self) -> dict[str, Any]:
        """Size, step and resolution of the patches, for `Prediction.patch`."""
        grid = self.grid
        sizes = {"size": grid.size, "stride": grid.stride, "level": grid.level} if grid.size else {}
        return {**sizes, "mpp": self.mpp, "scale": self.scale, **({"edge": grid.edge} if grid.edge else {})}

    def doubts(self) -> list[str]:
        """Return what a user should know before trusting predictions for this image."""
        return []

    def gives_jpeg(self) -> bool:
        """Return whether `encoded` returns JPEG streams."""
        return False

    def encoded(self, index: ArrayLike | slice, colors: Container[str]) -> list[bytes | None] | None:
        """Return a JPEG stream for each patch as the file stores it; the decoder has to apply `view`.

        None for a patch that is not a whole JPEG tile of one of the `colors` ("grey", "rgb", "ycbcr"), and instead of
        the list if no patch is one.
        """
        return None


class FilePatches(PatchSource):
    """The patches of a grid over an image, which `close` closes.

    `channels` are 1 or 3; grey from RGB by ITU-R 601 luma, RGB from grey by repeating; default as in the file.
    """

    grid: PatchGrid

    def __init__(
        self,
        image: Image,
        grid: PatchGrid,
        view: View = View(),
        channels: int | None = None,
        name: str | None = None,
    ) -> None:
        self.image, self.grid, self.view = image, grid, view
        self.channels = grid.channels if channels is None else channels
        if self.channels not in (1, 3):
            raise ConfigError(f"channels (={channels}) must be 1 or 3")
        self.name = str(image.path) if name is None else name
        self.patch_shape = (grid.size, grid.size, self.channels)
        self.dtype = np.dtype(np.uint8)
        self.scale, self.l0_size, self.qupath_origin = grid.scale, image.size, image.qupath_origin
        self.mpp = None if image.mpp is None else image.mpp * grid.scale
        self.l0_mpp = self.file_mpp = image.mpp
        self.decoded_bytes = decoded_bytes(image, grid.level)
        self.whole_bytes = image.held_pixels * image.channels
        same = grid.scale == image.levels[grid.level].downsample
        self.in_memory = same and image.in_memory(grid.level) is not None

    def read(self, index: ArrayLike | slice, out: Array | None = None) -> Array:
        if self.channels == self.grid.channels and out is not None:
            self.grid.read(index, out=self.view.undo(out))
            return out
        pixels = self.grid.read(index)
        if self.channels < self.grid.channels:
            k, height, width, _ = pixels.shape
            rgb = PIL.Image.fromarray(pixels.reshape(k * height, width, 3)) if k else None
            pixels = pixels[..., :1] if rgb is None else np.asarray(rgb.convert("L")).reshape(k, height, width, 1)
        pixels = self.view.pixels(pixels)  # (k, s, s, 1) fills all channels
        out = np.empty((len(pixels), *self.patch_shape), np.uint8) if out is None else out
        out[...] = pixels
        return out

    def positions_1d(self, index: ArrayLike | slice) -> Index:
        cells, (_, columns) = self.view.cells(self.grid.cells(index), self.grid.rows, self.grid.columns)
        return cells[:, 0] * columns + cells[:, 1]

    def positions_2d(self, index: ArrayLike | slice) -> NDArray[np.float64]:
        return self.view.centers(self.grid.centers(index), self.image.size)

    def close(self) -> None:
        self.image.close()

    def gives_jpeg(self) -> bool:
        grid = self.grid
        plain = self.channels == grid.channels and grid.scale == self.image.levels[grid.level].downsample
        return plain and self.image.jpeg_tiling(grid.level) == (grid.size, grid.size)

    def encoded(self, index: ArrayLike | slice, colors: Container[str]) -> list[bytes | None] | None:
        if not self.gives_jpeg():
            return None
        cells, beside = np.divmod(self.grid.corners(index), self.grid.size)
        cells[(beside != 0).any(axis=1)] = -1  # not a tile, which gives None
        return self.image.jpeg_tiles(cells, self.grid.level, colors)


class TensorPatches(PatchSource):
    """Patches or features that are in memory already.

    Args:
        array: (n, ...), such as (n, h, w, c) uint8 pixels or (n, d) float features; anything numpy takes.
        name: for messages.
        centers: x, y (n, 2) of the patches, for 2-D position codes.

    >>> source = TensorPatches(np.arange(12).reshape(4, 3))
    >>> source.read([3, 0])
    array([[ 9, 10, 11],
           [ 0,  1,  2]])
    """

    def __init__(self, array: ArrayLike, name: str = "tensor", centers: ArrayLike | None = None) -> None:
        self.array = np.asarray(array)
        if self.array.ndim < 2:
            raise ConfigError(f"{name}: patches must be an array (n, ...), not {self.array.shape}")
        self._centers = None if centers is None else np.asarray(centers, np.float64)
        if self._centers is not None and self._centers.shape != (len(self.array), 2):
            raise ConfigError(f"{name}: centers must be ({len(self.array)}, 2), not {self._centers.shape}")
        self.name, self.patch_shape, self.dtype = name, self.array.shape[1:], self.array.dtype
        self.grid = Grid(len(self.array))

    def read(self, index: ArrayLike | slice, out: Array | None = None) -> Array:
        chosen = checked_index(index, len(self))
        if out is None:
            return np.asarray(self.array[chosen])
        take_rows(self.array, chosen, out)
        return out

    def positions_2d(self, index: ArrayLike | slice) -> NDArray[np.float64]:
        return super().positions_2d(index) if self._centers is None else self._centers[checked_index(index, len(self))]
