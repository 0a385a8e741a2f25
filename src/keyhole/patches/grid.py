"""Where the patches of an image are, and their pixels.

Coordinates: `l0_` level-0 pixels, `lv_` pixels of the level read from, `g_` row and column of the full grid.
Without a prefix they are output pixels, those of the patches.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import ConfigError
from keyhole.images.geometry import Box, Size
from keyhole.images.image import Image, Uses
from keyhole.images.pixels import Pixels, place
from keyhole.images.resample import inside, resample, spans, surroundings
from keyhole.patches.edge import EDGE_RULES, Edge, edge_for, mirrored
from keyhole.util.rows import checked_index
from keyhole.util.threads import beat
from keyhole.util.wording import must_be_one_of

MAX_READ_PATCHES, MAX_READ_PIXELS = 64, 2**24
"""Patches, and level pixels, of one read (but at least one patch)."""
MAX_COPY_BYTES = 2**18
"""Bytes that are copied from an image in memory at once (but at least one patch), so that a cache of the CPU holds
them."""
MAX_SUMMED_CELLS = 2**13
"""Sums of cells of a foreground mask that are held at once (but at least those of one row of patches)."""
SAME_SCALE = 1e-3
"""Scales that differ by less than this share are one: no resampling for a 0.1 % wrong `mpp`."""

Index = NDArray[np.int64]


class NoPatches(ConfigError):  # noqa: N818 - names the result
    """The foreground mask leaves no patch of an image."""


class Foreground(NamedTuple):
    """Which part of an image has patches.

    Attributes:
        mask: bool (rows, columns) of any resolution, covering the whole image.
        share: a patch is in the grid if at least this share of the mask's cells under it is True, and at least one
            cell. A cell that is partly under a patch counts whole; cells beyond the image's border do not count.
        name: for the message if the mask leaves nothing.
    """

    mask: NDArray[np.bool_]
    share: float = 0.0
    name: str = "foreground mask"

    def check(self) -> None:
        """Raise ConfigError for a mask that is not bool (rows, columns), or a share outside 0 ... 1."""
        mask = self.mask
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2 or not mask.size:
            came = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise ConfigError(f"a {self.name} must be a NumPy array, bool (rows, columns), not {came}")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share (={self.share}) of a {self.name} must be between 0 and 1")


def reading_level(
    image: Image, mpp: float | None, level: int | None, image_mpp: float | None = None
) -> tuple[int, float]:
    """Return the level to read for microns per output pixel (`mpp`) or `level`, and level-0 pixels per output pixel.

    `image_mpp` are microns per level-0 pixel, instead of the image's own.
    """
    if mpp is None:
        level = 0 if level is None else level
        if not 0 <= level < len(image.levels):
            last = len(image.levels) - 1
            known = f"one of the image's levels 0 ... {last}" if last else "0, the image's only level"
            raise ConfigError(f"{image.path}: patch.level (={level}) must be {known}")
        return level, image.levels[level].downsample
    if level is not None:
        raise ConfigError(f"patch.level (={level}) and patch.mpp (={mpp:g}) exclude each other; give one of them")
    image_mpp = image.mpp if image_mpp is None else image_mpp
    if image_mpp is None:
        why = f"are not known ({image.mpp_note})" if image.mpp_note else "the file does not say"
        raise ConfigError(
            f"{image.path}: patch.mpp (={mpp:g}) needs the image's microns per pixel, which {why}. "
            "Give a column `mpp` in a CSV, or --mpp of keyhole predict; or train on pixels as they are: "
            "--patch.mpp none"
        )
    scale = mpp / image_mpp
    level = max(i for i, lv in enumerate(image.levels) if i == 0 or lv.downsample <= scale * (1 + SAME_SCALE))
    downsample = image.levels[level].downsample
    return level, downsample if abs(scale / downsample - 1) <= SAME_SCALE else scale


class Grid:
    """`n` patches whose places are unknown, in one row. The base of grids that know the places.

    `size` and `stride` are in pixels of a patch; a `size` of 0 is not known, nor is a `level` of None.
    """

    what = "patch"
    rows = 1
    size = stride = 0
    level: int | None = None
    edge: Edge | None = None
    extent = Size(0, 0)
    """Width and height in level-0 pixels that hold all patches; 0 x 0 if their places are unknown."""

    def __init__(self, n: int) -> None:
        self.n = self.columns = n

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n} of {self.rows} x {self.columns} {self.what}s)"

    @property
    def most_shifted(self) -> int:
        """Largest number of patches where augmentation moves the grid; these patches stay as they are."""
        return self.n

    def cells(self, index: ArrayLike | slice) -> Index:
        """Return row and column of patches in the full grid, int64 (k, 2)."""
        chosen = checked_index(index, self.n, self.what)
        return np.stack([np.zeros_like(chosen), chosen], axis=1)

    def boxes(self, index: ArrayLike | slice) -> Index:
        """Return x, y, width, height of patches in level-0 pixels, int64 (k, 4); all 0 if the places are unknown."""
        return np.zeros((len(checked_index(index, self.n, self.what)), 4), np.int64)


class PatchGrid(Grid):
    """Patches of one size at regular steps over an image, in raster order.

    The last row and column may reach over the border, and a negative offset starts outside; `edge` says what happens to
    such patches. No patch lies wholly outside. Several threads may read at once.

    Args:
        image: to be read.
        size: side of a patch, in output pixels.
        stride: step between patches, in output pixels; default is the size, smaller overlaps.
        mpp: microns per output pixel; read from the best level and resampled. Excludes `level`.
        offset: (x, y) of the first patch, in output pixels.
        mask: bool (rows, columns) of any resolution, covering the whole image; only patches on it are in the grid.
            `Foreground` also says how much of a patch must be on it.
        level: pyramid level whose pixels are the output pixels; default 0.
        edge: what happens to patches that reach over the border: `drop` leaves them out, `shift` moves them inwards
            until they fit, `reflect` mirrors the image, `background` fills them with the image's background. `auto`
            is `background` for images of several levels (slides) and `shift` for others (photographs).

    Attributes:
        rows, columns: of the full grid, with or without a mask.
        size, stride: as above.
        edge: as above; never `auto`.
        starts: where the columns begin (columns,) and where the rows do (rows,), in output pixels.
        channels: of the pixels read.
        level: that is read.
        scale: level-0 pixels per output pixel.

    Raises:
        NoPatches: the mask leaves none.
        ConfigError: the patch is larger than the image, the image does not have the resolution, `edge` is not a known
            rule, or the mask is not bool (rows, columns).

    >>> from keyhole.images import ArrayImage
    >>> grid = PatchGrid(ArrayImage(np.zeros((64, 100, 3), np.uint8)), size=32, edge="shift")
    >>> len(grid), grid.rows, grid.columns
    (8, 2, 4)
    >>> grid.boxes([3]), grid.centers([3])
    (array([[68,  0, 32, 32]]), array([[84., 16.]]))
    >>> grid.read(slice(0, 5)).shape
    (5, 32, 32, 3)
    """

    level: int

    def __init__(
        self,
        image: Image,
        size: int,
        stride: int | None = None,
        mpp: float | None = None,
        offset: tuple[int, int] = (0, 0),
        mask: NDArray[np.bool_] | Foreground | None = None,
        *,
        level: int | None = None,
        edge: Edge | Literal["auto"] = "background",
    ) -> None:
        stride = size if stride is None else stride
        for name, value in (("size", size), ("stride", stride)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ConfigError(f"patch.{name} (={value!r}) must be a whole number")
        self.image, self.size, self.stride = image, int(size), int(stride)
        if size < 1 or self.stride < 1:
            raise ConfigError(f"patch.size (={size}) and patch.stride (={self.stride}) must be at least 1")
        self.edge: Edge = edge_for(image) if edge == "auto" else edge
        if self.edge not in EDGE_RULES:
            raise ConfigError(must_be_one_of("edge", edge, ("auto", *EDGE_RULES)))
        self._rule = rule = EDGE_RULES[self.edge]
        self.channels = image.channels
        self.level, self.scale = reading_level(image, mpp, level)
        self._ratio = self.scale / image.levels[self.level].downsample  # level pixels per output pixel
        self._extent = self._output_size()
        if size > min(self._extent):
            at = "" if self.scale == 1 else f" at 1/{self.scale:.4g} of its resolution"
            raise ConfigError(
                f"{image.path}: the patch ({size} x {size} px) is larger than the image "
                f"({self._extent.width} x {self._extent.height} px{at}). "
                "Leave the image out, or train with a smaller patch.size"
            )
        for start, extent in zip(offset, self._extent, strict=True):
            if start >= extent:
                raise ConfigError(f"{image.path}: the grid starts at {start} px, outside the image ({extent} px)")
        x, y = (rule.starts(n, size, self.stride, at) for n, at in zip(self._extent, offset, strict=True))
        self.starts = self._read_starts = x, y
        if rule.mirrors:  # reads the pixels inside that it mirrors
            self._read_starts = x.clip(0, self._extent.width - size), y.clip(0, self._extent.height - size)
        self.columns, self.rows = len(x), len(y)
        self._kept: NDArray[np.integer[Any]] | None = None
        self.n = self.rows * self.columns
        if mask is not None:
            foreground = mask if isinstance(mask, Foreground) else Foreground(mask)
            foreground.check()
            self._kept = self._masked(foreground)
            if not len(self._kept):
                raise NoPatches(
                    f"{image.path}: no patches: the {foreground.name} leaves none of {self.n:,}. "
                    "Look at it: keyhole check DATA --previews DIR; or choose another --patch.foreground "
                    "(`all` takes every patch)"
                )
            self.n = len(self._kept)

    def __repr__(self) -> str:
        """Return for example `PatchGrid('photo.png', 8 of 2 x 4 patches of 32 px)`."""
        patches = f"{self.n} of {self.rows} x {self.columns} patches of {self.size} px"
        return f"{type(self).__name__}({str(self.image.path)!r}, {patches})"

    @property
    def nbytes(self) -> int:
        """Memory that the list of patches on the mask takes; 0 without a mask."""
        return 0 if self._kept is None else self._kept.nbytes

    def _output_size(self) -> Size:
        """Return the output pixels wholly inside the image if patches must be inside, else all that show some of it."""
        whole, lv = self._rule.inside, self.image.levels[self.level].size
        width, height = (
            math.floor(side / self.scale + 1e-6) if whole else math.ceil(side / self.scale - 1e-6)
            for side in self.image.size
        )
        if self._ratio != 1:
            return Size(width, height)
        return Size(min(width, lv.width), min(height, lv.height)) if whole else lv

    def _masked(self, foreground: Foreground) -> NDArray[np.integer[Any]]:
        """Return raster indices of the patches on the mask: 4 bytes each unless there are billions.

        Cells are summed down between the edges of patches, some rows of patches at a time, so that every cell is added
        once or twice, however much the patches overlap. These are few calls, since beside a GPU many threads that each
        call NumPy hundreds of times hold up the one that launches work.
        """
        mask, share, _ = foreground
        small = np.int32 if self.rows * self.columns < 2**31 else np.int64
        left, right = self._mask_span(self.starts[0], self.image.size.width, mask.shape[1])
        tops, bottoms = self._mask_span(self.starts[1], self.image.size.height, mask.shape[0])
        most = max(1, MAX_SUMMED_CELLS // mask.shape[1])
        kept = []
        for first in range(0, self.rows, most):
            top, bottom = tops[first : first + most], bottoms[first : first + most]
            edges, places = np.unique(np.concatenate([top, bottom]), return_inverse=True)
            down = np.zeros((len(edges), mask.shape[1]), np.int64)
            block = mask[edges[0] : edges[-1]].view(np.uint8)
            np.cumsum(np.add.reduceat(block, edges[:-1] - edges[0], axis=0, dtype=np.int64), axis=0, out=down[1:])
            across = np.zeros((len(top), mask.shape[1] + 1), np.int64)
            np.cumsum(down[places[len(top) :]] - down[places[: len(top)]], axis=1, out=across[:, 1:])
            needed = np.maximum(np.ceil(share * (right - left) * (bottom - top)[:, None] - 1e-6), 1)
            on_mask = np.flatnonzero(across[:, right] - across[:, left] >= needed)
            kept.append((on_mask + first * self.columns).astype(small))
        return np.concatenate(kept)

    def _mask_span(self, begin: Index, l0_extent: int, cells: int) -> tuple[Index, Index]:
        """Return the first mask cell under each patch and the one after its last, along one axis."""
        per_pixel = self.scale * cells / l0_extent
        low = np.floor(begin * per_pixel + 1e-6).astype(np.int64).clip(0, cells - 1)
        high = np.ceil((begin + self.size) * per_pixel - 1e-6).astype(np.int64).clip(0, cells)
        return low, np.maximum(high, low + 1)

    @property
    def most_shifted(self) -> int:
        """Number of patches to plan for where the grid may begin a stride before the image: a row and a column more.

        Of these, a foreground leaves the patches that overlap one of its patches here. That is an estimate where a
        patch needs more than a touch of foreground, or the stride leaves gaps.
        """
        if self._kept is None:
            return (self.rows + 1) * (self.columns + 1)
        near = np.full((self.rows + 2, self.columns + 2), self.edge == "drop")  # unknown what lies beyond the last ones
        near[0], near[:, 0] = False, False
        near[1:-1, 1:-1].flat[self._kept] = True
        return int((near[:-1, :-1] | near[:-1, 1:] | near[1:, :-1] | near[1:, 1:]).sum())

    def corners(self, index: ArrayLike | slice) -> Index:
        """Compute where patches begin.

        Args:
            index: patches, a slice or integers (k,).

        Returns:
            x, y of the upper left corner in output pixels, int64 (k, 2).
        """
        g_row, g_column = self.cells(index).T
        return np.stack([self.starts[0][g_column], self.starts[1][g_row]], axis=1)

    def cells(self, index: ArrayLike | slice) -> Index:
        """Compute where patches are in the full grid.

        Args:
            index: patches, a slice or integers (k,).

        Returns:
            Row and column, int64 (k, 2).
        """
        flat = checked_index(index, self.n)
        raster = flat if self._kept is None else self._kept[flat].astype(np.int64, copy=False)
        return np.stack(np.divmod(raster, self.columns), axis=1)

    def boxes(self, index: ArrayLike | slice) -> Index:
        """Compute the boxes of patches.

        Args:
            index: patches, a slice or integers (k,).

        Returns:
            x, y, width, height in level-0 pixels, int64 (k, 4). Boxes may reach over the border, except under `drop`
            and `shift`.
        """
        start = self.corners(index)
        l0_start, l0_end = (np.rint(edge * self.scale).astype(np.int64) for edge in (start, start + self.size))
        return np.concatenate([l0_start, l0_end - l0_start], axis=1)

    def centers(self, index: ArrayLike | slice) -> NDArray[np.float64]:
        """Compute the centres of patches.

        Args:
            index: patches, a slice or integers (k,).

        Returns:
            x, y in level-0 pixels, float64 (k, 2).
        """
        return (self.corners(index).astype(np.float64) + self.size / 2) * self.scale

    def read(self, index: ArrayLike | slice, out: Pixels | None = None) -> Pixels:
        """Read patches. Neighbours are read together, so that each tile of the file is decoded once per call.

        The pixels of a patch do not depend on the others of the call.

        Args:
            index: patches, a slice or integers (k,).
            out: where to write the pixels; default is new memory.

        Returns:
            Pixels, uint8 (k, size, size, channels).

        Raises:
            ImageError: the file is damaged there.
            IndexError: no such patch.
        """
        cells = self.cells(index)
        if out is None:
            out = np.empty((len(cells), self.size, self.size, self.channels), np.uint8)
        pixels = self.image.in_memory(self.level) if self._ratio == 1 else None
        if pixels is None:
            self._read_file(index, cells, out)
        else:
            self._copy(pixels, cells, out)
        if self._rule.mirrors:
            self._reflect(cells, out)
        return out

    def _read_file(self, index: ArrayLike | slice, cells: Index, out: Pixels) -> None:
        """Read patches from the file, or resample those of an image in memory."""
        order = np.lexsort((cells[:, 1], cells[:, 0]))  # by row, then by column
        x, y = self._read_from(cells[order])
        # The patches after consecutive ones will need their tiles too.
        in_order = index.step in (None, 1) if isinstance(index, slice) else (np.diff(np.asarray(index)) == 1).all()
        uses = self._uses if in_order else None
        # A patch resampled from far below covers many level pixels; a run must stay within what a thread may hold.
        most = int(np.clip(MAX_READ_PIXELS / (self.size * self._ratio) ** 2, 1, MAX_READ_PATCHES))
        for first in range(0, len(order), most):
            run = slice(first, first + most)
            targets = [out[row] for row in order[run].tolist()]
            if self._ratio == 1:
                self.image.read_boxes(self._squares(x[run], y[run]), self.level, targets, uses)
            else:
                self._read_resampled(x[run], y[run], targets, uses)
            beat()

    def _copy(self, pixels: Pixels, cells: Index, out: Pixels) -> None:
        """Copy patches from an image in memory. NumPy does it without holding up Python's other threads."""
        (x, y), (height, width, _), size = self._read_from(cells), pixels.shape, self.size
        there = (x >= 0) & (y >= 0) & (x <= width - size) & (y <= height - size)
        windows = sliding_window_view(pixels, (size, size), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
        most = int(np.clip(MAX_COPY_BYTES / (size**2 * self.channels), 1, MAX_READ_PATCHES))
        for first in range(0, len(cells), most):
            run = slice(first, first + most)
            if there[run].all():
                place(out[run], windows[y[run], x[run]])
            else:
                self.image.read_boxes(self._squares(x[run], y[run]), self.level, list(out[run]))
            beat()

    def _read_from(self, cells: Index) -> tuple[Index, Index]:
        """Return x and y, in output pixels, of where the pixels of patches are read."""
        return self._read_starts[0][cells[:, 1]], self._read_starts[1][cells[:, 0]]

    def _squares(self, x: Index, y: Index) -> list[Box]:
        return [Box(left, top, self.size, self.size) for left, top in zip(x.tolist(), y.tolist(), strict=True)]

    def _reflect(self, cells: Index, out: Pixels) -> None:
        """Mirror the pixels of patches that were read further inside than they lie."""
        (x, y), (read_x, read_y), (width, height) = self.starts, self._read_starts, self._extent
        g_row, g_column = cells.T
        moved = np.flatnonzero((x != read_x)[g_column] | (y != read_y)[g_row])
        for row, i, j in zip(moved.tolist(), g_row[moved].tolist(), g_column[moved].tolist(), strict=True):
            lines = mirrored(int(y[i]), self.size, height) - read_y[i]
            columns = mirrored(int(x[j]), self.size, width) - read_x[j]
            place(out[row], out[row][lines[:, None], columns])

    def _read_resampled(self, x: Index, y: Index, out: Sequence[Pixels], uses: Uses | None) -> None:
        """Read patches that begin at output pixels x, y in raster order, and resample each by itself."""
        lv = self.image.levels[self.level].size
        (x0, x1), (y0, y1) = (spans(start, self.size, self._ratio) for start in (x, y))
        (left, right), (top, bottom) = inside(x0, x1, lv.width), inside(y0, y1, lv.height)
        needed = np.stack([x0, y0, x1 - x0, y1 - y0], axis=1).tolist()  # filter included
        boxes = [Box(*box) for box in np.stack([left, top, right - left, bottom - top], axis=1).tolist()]
        crops = [np.empty((box.height, box.width, self.channels), np.uint8) for box in boxes]
        self.image.read_boxes(boxes, self.level, crops, uses)
        for target, px, py, under, box, crop in zip(out, x.tolist(), y.tolist(), needed, boxes, crops, strict=True):
            around = surroundings(crop, (box.x, box.y), Box(*under), lv)
            corner = px * self._ratio - under[0], py * self._ratio - under[1]
            patch = resample(around, corner, self.size * self._ratio, self.size)
            shown = slice(max(-py, 0), self._extent.height - py), slice(max(-px, 0), self._extent.width - px)
            if patch[shown].shape != patch.shape:
                target[...] = self.image.background
            place(target[shown], patch[shown])

    def _uses(self, left: Index, top: Index, right: Index, bottom: Index) -> Index:
        """Count the patches that need pixels of each box of level pixels; with a mask, an upper bound."""
        (starts_x, ends_x), (starts_y, ends_y) = self._spans
        across = np.searchsorted(starts_x, right) - np.searchsorted(ends_x, left, side="right")
        down = np.searchsorted(starts_y, bottom) - np.searchsorted(ends_y, top, side="right")
        return across * down

    @functools.cached_property
    def _spans(self) -> list[tuple[Index, Index]]:
        """The first level pixel that each column of patches needs and the one after its last; then those of rows."""
        if self._ratio == 1:
            return [(starts, starts + self.size) for starts in self._read_starts]
        return [spans(starts, self.size, self._ratio) for starts in self._read_starts]
