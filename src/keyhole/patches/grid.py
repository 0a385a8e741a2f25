"""Where the patches of an image are, and their pixels.

Coordinates: `l0_` level-0 pixels, `lv_` pixels of the level read from, `g_` row and column of the full grid;
without prefix, output pixels: those of the level or of the microns per pixel that were asked for.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyhole.errors import ConfigError
from keyhole.images.geometry import Box, Size
from keyhole.images.image import Image, Uses
from keyhole.images.pixels import Pixels, place
from keyhole.images.resample import inside, resample, spans, surroundings
from keyhole.patches.edge import Edge, edge_for, mirrored, place_patches
from keyhole.patches.edge import inside as moved_inside
from keyhole.util.threads import beat

SAME = 1e-3
"""Scales that differ by less than this share are one: no resampling for a 0.1 % wrong `mpp`."""
WASTE = 1.5
"""Patches are read together while their common box has at most so many times their own pixels."""
RUN_PATCHES, RUN_PIXELS = 64, 2**24
"""Most patches, and most level pixels, of one read (but at least one patch)."""

Index = NDArray[np.int64]


def checked_index(index: ArrayLike | slice, n: int, what: str = "patch") -> Index:
    """Return `index` as int64 (k,), each 0 ... n - 1.

    Raises:
        IndexError: no such patch.
        ValueError: neither a slice nor one row of integers.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(n), dtype=np.int64)
    flat = np.asarray(index)
    if flat.ndim != 1 or (flat.size and flat.dtype.kind not in "iu"):
        raise ValueError(f"index must be a slice or one row of integers, not {flat.dtype} {flat.shape}")
    flat = flat.astype(np.int64)
    if flat.size and not (flat.min() >= 0 and flat.max() < n):
        raise IndexError(f"{what} index {flat.min()} ... {flat.max()} outside 0 ... {n - 1}")
    return flat


class NoPatches(ConfigError):  # noqa: N818 - says what came out
    """The foreground mask leaves no patch of an image."""


def reading_level(
    image: Image, mpp: float | None, level: int | None, image_mpp: float | None = None
) -> tuple[int, float]:
    """The level to read, and the level-0 pixels per output pixel. `image_mpp` takes the place of the image's own.

    Raises:
        ConfigError: the level or the microns per pixel cannot be had from this image.
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
    level = max(i for i, lv in enumerate(image.levels) if i == 0 or lv.downsample <= scale * (1 + SAME))
    downsample = image.levels[level].downsample
    return level, downsample if abs(scale / downsample - 1) <= SAME else scale


class PatchGrid:
    """Patches of one size at regular steps over an image, in raster order.

    The last row and column may reach over the border, and a negative offset starts outside; `edge` says what becomes
    of such patches. No patch lies wholly outside. Safe to read from several threads.

    Args:
        image: what to read.
        size: side of a patch, in output pixels.
        stride: step between patches, in output pixels; default is the size, smaller overlaps.
        mpp: microns per output pixel; read from the best level and resampled. Excludes `level`.
        offset: (x, y) of the first patch, in output pixels.
        mask: bool (rows, columns) of any resolution, covering the whole image; only patches on it are in the grid.
        level: pyramid level whose pixels are the output pixels; default 0.
        mask_share: a patch is in the grid if at least this share of the mask's cells under it is True, and at least
            one cell. A cell that is partly under a patch counts whole, one beyond the image's border not at all.
        mask_name: what the mask is, for the message where it leaves nothing.
        edge: what becomes of patches that reach over the border: `drop` leaves them out, `shift` moves them inwards
            until they fit, `reflect` mirrors the image, `background` fills them with the image's background. `auto`
            is `background` for images of several levels (slides) and `shift` for others (photographs).

    Attributes:
        rows, columns: of the full grid, mask or not.
        size, stride: as above.
        edge: as above; never `auto`.
        starts: where the columns begin (columns,) and where the rows do (rows,), in output pixels.
        channels: of the pixels read.
        scale: level-0 pixels per output pixel.

    Raises:
        NoPatches: the mask leaves none.
        ConfigError: a patch larger than the image, or a resolution that is not there.
    """

    def __init__(
        self,
        image: Image,
        size: int,
        stride: int | None = None,
        mpp: float | None = None,
        offset: tuple[int, int] = (0, 0),
        mask: NDArray[np.bool_] | None = None,
        *,
        level: int | None = None,
        mask_share: float = 0.0,
        mask_name: str = "foreground mask",
        edge: Edge | Literal["auto"] = "background",
    ) -> None:
        stride = size if stride is None else stride
        if size < 1 or stride < 1:
            raise ConfigError(f"patch.size (={size}) and patch.stride (={stride}) must be at least 1")
        self.image = image
        self.size, self.stride = size, stride
        self.edge: Edge = edge_for(image) if edge == "auto" else edge
        self.channels = image.channels
        self.level, self.scale = reading_level(image, mpp, level)
        lv = image.levels[self.level]
        self._ratio = self.scale / lv.downsample  # level pixels per output pixel; 1: no resampling
        self._extent = self._shown()
        if size > min(self._extent):
            at = "" if self.scale == 1 else f" at 1/{self.scale:.4g} of its resolution"
            raise ConfigError(
                f"{image.path}: the patch ({size} x {size} px) is larger than the image "
                f"({self._extent.width} x {self._extent.height} px{at}); choose a smaller patch.size"
            )
        self.starts = self._placed(offset[0], self._extent.width), self._placed(offset[1], self._extent.height)
        self.columns, self.rows = map(len, self.starts)
        self._kept = None if mask is None else self._masked(mask, mask_share)
        if len(self) == 0:
            raise NoPatches(
                f"{image.path}: no patches: the {mask_name} leaves none of {self.rows * self.columns:,}. "
                "Look at it: keyhole check DATA --previews DIR; or choose another --patch.foreground "
                "(`all` takes every patch)"
            )

    def _shown(self) -> Size:
        """Output pixels of the image: those wholly inside it where patches must be inside, else all that show some."""
        whole = self.edge in ("drop", "shift")
        (width, height), (lv_width, lv_height) = (
            (
                (math.floor(side / self.scale + 1e-6) if whole else math.ceil(side / self.scale - 1e-6))
                for side in self.image.size
            ),
            self.image.levels[self.level].size,
        )
        if self._ratio != 1:
            return Size(width, height)
        return Size(min(width, lv_width), min(height, lv_height)) if whole else Size(lv_width, lv_height)

    def _placed(self, offset: int, extent: int) -> Index:
        """Where patches begin along one axis."""
        if offset >= extent:
            raise ConfigError(f"{self.image.path}: the grid starts at {offset} px, outside the image ({extent} px)")
        return place_patches(extent, self.size, self.stride, offset, self.edge)

    @functools.cached_property
    def _read_starts(self) -> tuple[Index, Index]:
        """`starts`, but for `reflect`, which shows pixels of the patch that is moved inside."""
        if self.edge != "reflect":
            return self.starts
        width, height = self._extent
        return moved_inside(self.starts[0], width, self.size), moved_inside(self.starts[1], height, self.size)

    def _masked(self, mask: NDArray[np.bool_], share: float) -> NDArray[np.integer[Any]]:
        """Raster indices of the patches on the mask: 4 bytes each unless there are billions.

        A row of patches at a time, from the sums of the mask's columns over the rows above its upper and its lower
        edge, so that every cell is added twice however much the patches overlap.
        """
        small = np.int32 if self.rows * self.columns < 2**31 else np.int64
        left, right = self._mask_span(self.starts[0], self.image.size.width, mask.shape[1])
        top, bottom = self._mask_span(self.starts[1], self.image.size.height, mask.shape[0])
        above, below = np.zeros((2, mask.shape[1]), np.int64)
        row_above = row_below = 0
        kept = []
        for g_row, (y0, y1) in enumerate(zip(top.tolist(), bottom.tolist(), strict=True)):
            above += mask[row_above:y0].sum(axis=0)
            below += mask[row_below:y1].sum(axis=0)
            row_above, row_below = y0, y1
            across = np.concatenate([[0], np.cumsum(below - above)])
            needed = np.maximum(np.ceil(share * (right - left) * (y1 - y0) - 1e-6), 1)
            kept.append((np.flatnonzero(across[right] - across[left] >= needed) + g_row * self.columns).astype(small))
        return np.concatenate(kept)

    def _mask_span(self, begin: Index, l0_extent: int, cells: int) -> tuple[Index, Index]:
        """First mask cell under each patch and the one after its last, along one axis; at least one cell each."""
        per_pixel = self.scale * cells / l0_extent
        low = np.floor(begin * per_pixel + 1e-6).astype(np.int64).clip(0, cells - 1)
        high = np.ceil((begin + self.size) * per_pixel - 1e-6).astype(np.int64).clip(0, cells)
        return low, np.maximum(high, low + 1)

    def __len__(self) -> int:
        return self.rows * self.columns if self._kept is None else len(self._kept)

    def _raster(self, index: ArrayLike | slice) -> Index:
        """Positions in the full grid of the patches `index`."""
        flat = checked_index(index, len(self))
        return flat if self._kept is None else self._kept[flat].astype(np.int64, copy=False)

    def corners(self, index: ArrayLike | slice) -> Index:
        """Left and top in output pixels, int64 (k, 2)."""
        g_row, g_column = np.divmod(self._raster(index), self.columns)
        return np.stack([self.starts[0][g_column], self.starts[1][g_row]], axis=1)

    def cells(self, index: ArrayLike | slice) -> Index:
        """Row and column in the full grid, int64 (k, 2)."""
        return np.stack(np.divmod(self._raster(index), self.columns), axis=1)

    def boxes(self, index: ArrayLike | slice) -> Index:
        """x, y, width, height in level-0 pixels, int64 (k, 4).

        They may reach over the border, but for those of `drop` and `shift`.
        """
        start = self.corners(index)
        l0_start, l0_end = (np.rint(edge * self.scale).astype(np.int64) for edge in (start, start + self.size))
        return np.concatenate([l0_start, l0_end - l0_start], axis=1)

    def centers(self, index: ArrayLike | slice) -> NDArray[np.float64]:
        """x, y of the middle in level-0 pixels, float64 (k, 2)."""
        return (self.corners(index).astype(np.float64) + self.size / 2) * self.scale

    def read(self, index: ArrayLike | slice, out: Pixels | None = None) -> Pixels:
        """Pixels, uint8 (k, size, size, channels), into `out` if given.

        Neighbours are read with one access, so that each tile of the file is decoded once per run of patches.
        What a patch holds does not depend on the others of the call.

        Raises:
            ImageError: the file is damaged there.
            IndexError: no such patch.
        """
        raster = self._raster(index)
        if out is None:
            out = np.empty((len(raster), self.size, self.size, self.channels), np.uint8)
        order = np.argsort(raster, kind="stable")
        g_row, g_column = np.divmod(raster[order], self.columns)
        x, y = self._read_starts[0][g_column], self._read_starts[1][g_row]
        tiled = self.image.tiling(self.level) is not None
        uses = self._uses if tiled and _is_pass(index) else None
        # A patch resampled from far below covers many level pixels; a run must stay within what a thread may hold.
        most = int(np.clip(RUN_PIXELS / (self.size * self._ratio) ** 2, 1, RUN_PATCHES))
        for first in range(0, len(order), most):
            block = slice(first, min(first + most, len(order)))
            if tiled:
                self._read_tiled(x[block], y[block], order[block].tolist(), out, uses)
                beat()
                continue
            for start, stop in self._runs(x[block], y[block]):
                run = slice(first + start, first + stop)
                self._read_run(x[run], y[run], order[run].tolist(), out)
                beat()
        if self.edge == "reflect":
            self._reflect(g_row, g_column, order, out)
        return out

    def _reflect(self, g_row: Index, g_column: Index, order: Index, out: Pixels) -> None:
        """Takes pixels of patches that were moved inside to where those over the border show them, mirrored."""
        (x, y), (read_x, read_y), (width, height) = self.starts, self._read_starts, self._extent
        moved = np.flatnonzero((x != read_x)[g_column] | (y != read_y)[g_row])
        for row, i, j in zip(order[moved].tolist(), g_row[moved].tolist(), g_column[moved].tolist(), strict=True):
            lines = mirrored(int(y[i]), self.size, height) - read_y[i]
            columns = mirrored(int(x[j]), self.size, width) - read_x[j]
            place(out[row], out[row][lines[:, None], columns])

    def _read_tiled(self, x: Index, y: Index, rows: Sequence[int], out: Pixels, uses: Uses | None) -> None:
        """Each tile of the file once, into all patches that it touches."""
        if self._ratio == 1:
            boxes = [Box(px, py, self.size, self.size) for px, py in zip(x.tolist(), y.tolist(), strict=True)]
            self.image.read_boxes(boxes, self.level, [out[row] for row in rows], uses)
            return
        needed, boxes = self._needed(x, y)
        crops = [np.empty((box.height, box.width, self.channels), np.uint8) for box in boxes]
        self.image.read_boxes(boxes, self.level, crops, uses)
        for row, px, py, under, box, crop in zip(rows, x.tolist(), y.tolist(), needed, boxes, crops, strict=True):
            place(out[row], self._resampled(crop, box.x, box.y, under, px, py))

    def _uses(self, left: Index, top: Index, right: Index, bottom: Index) -> Index:
        """How many patches need something of boxes of level pixels; with a mask, at most so many."""
        (starts_x, ends_x), (starts_y, ends_y) = self._spans
        across = np.searchsorted(starts_x, right) - np.searchsorted(ends_x, left, side="right")
        down = np.searchsorted(starts_y, bottom) - np.searchsorted(ends_y, top, side="right")
        return across * down

    @functools.cached_property
    def _spans(self) -> list[tuple[Index, Index]]:
        """First level pixel that each column of patches needs, and the one behind its last; then of each row."""
        found = []
        for places in self._read_starts:
            found.append((places, places + self.size) if self._ratio == 1 else spans(places, self.size, self._ratio))
        return found

    def _runs(self, x: Index, y: Index) -> Iterator[tuple[int, int]]:
        """Cuts patches in raster order into runs whose common box is not much more than the patches."""
        cuts = np.flatnonzero((np.diff(y) != 0) | (np.diff(x) > WASTE * self.size)) + 1
        bounds = [0, *cuts.tolist(), len(x)]
        start, left, right, top, bottom, covered = 0, 0, 0, 0, 0, 0
        for first, last in itertools.pairwise(bounds):  # pieces of one row
            piece_left, piece_right, piece_top = int(x[first]), int(x[last - 1]) + self.size, int(y[first])
            width = piece_right - piece_left
            if first > start:
                joint_left, joint_right = min(left, piece_left), max(right, piece_right)
                joint_covered = covered + width * min(self.size, piece_top + self.size - bottom)
                if (joint_right - joint_left) * (piece_top + self.size - top) <= WASTE * joint_covered:
                    left, right, bottom, covered = joint_left, joint_right, piece_top + self.size, joint_covered
                    continue
                yield start, first
            start, left, right, top, bottom = first, piece_left, piece_right, piece_top, piece_top + self.size
            covered = width * self.size
        yield start, len(x)

    def _read_run(self, x: Index, y: Index, rows: Sequence[int], out: Pixels) -> None:
        if self._ratio != 1:
            self._read_resampled(x, y, rows, out)
            return
        left, top = int(x.min()), int(y.min())
        box = Box(left, top, int(x.max()) - left + self.size, int(y.max()) - top + self.size)
        region = self.image.read(box, self.level)
        for row, px, py in zip(rows, (x - left).tolist(), (y - top).tolist(), strict=True):
            place(out[row], region[py : py + self.size, px : px + self.size])

    def _read_resampled(self, x: Index, y: Index, rows: Sequence[int], out: Pixels) -> None:
        """Each patch is resized alone, from the same level pixels whichever run it is in."""
        needed, boxes = self._needed(x, y)
        left, top = min(box.x for box in boxes), min(box.y for box in boxes)
        right, bottom = max(box.x + box.width for box in boxes), max(box.y + box.height for box in boxes)
        region = self.image.read(Box(left, top, right - left, bottom - top), self.level)
        for row, px, py, under in zip(rows, x.tolist(), y.tolist(), needed, strict=True):
            place(out[row], self._resampled(region, left, top, under, px, py))

    def _needed(self, x: Index, y: Index) -> tuple[list[Box], list[Box]]:
        """Boxes of level pixels that patches need, filter included, and what of them lies inside the level."""
        lv = self.image.levels[self.level].size
        (x0, x1), (y0, y1) = (spans(start, self.size, self._ratio) for start in (x, y))
        (left, right), (top, bottom) = inside(x0, x1, lv.width), inside(y0, y1, lv.height)
        needed = np.stack([x0, y0, x1 - x0, y1 - y0], axis=1).tolist()
        boxes = np.stack([left, top, right - left, bottom - top], axis=1).tolist()
        return [Box(*box) for box in needed], [Box(*box) for box in boxes]

    def _resampled(self, region: Pixels, left: int, top: int, needed: Box, x: int, y: int) -> Pixels:
        """The patch at output pixel (x, y) from level pixels around it; background outside the image."""
        crop = surroundings(region, (left, top), needed, self.image.levels[self.level].size)
        corner = x * self._ratio - needed.x, y * self._ratio - needed.y
        patch = resample(crop, corner, self.size * self._ratio, self.size)
        width, height = self._extent
        if x < 0 or y < 0 or x + self.size > width or y + self.size > height:
            shown = slice(max(-y, 0), height - y), slice(max(-x, 0), width - x)
            padded = np.full_like(patch, self.image.background)
            padded[shown] = patch[shown]
            return padded
        return patch


def _is_pass(index: ArrayLike | slice) -> bool:
    """Whether these patches follow each other, so that those behind them will want their tiles too."""
    if isinstance(index, slice):
        return index.step in (None, 1)
    return bool((np.diff(np.asarray(index)) == 1).all())
