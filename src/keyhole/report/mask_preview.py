"""A PNG that shows what a foreground mask selects: the slide, the outline of the mask, and the patches of the grid.

Each patch is outlined if patches are large enough to be seen, else the area that they cover. The rest is faded.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw

from keyhole.images.image import Image
from keyhole.images.resample import thumbnail
from keyhole.patches.grid import PatchGrid
from keyhole.report.drawing import GREY, INK, WRONG, Page, as_picture
from keyhole.util.files import file_names, write_atomic

SIDE = 1024
"""Longest side of the picture of the slide."""
MIN_WIDTH = 720
"""Smallest width of the whole picture; the caption of a narrow slide needs it."""
VISIBLE = 7
"""Patches that are at least this many pixels of the picture apart are outlined one by one."""
MASK, PATCH = (0, 150, 60), (30, 90, 220)
MARGIN, LINE = 16, 26
FADED = 0.45
"""Contrast of the picture where there is no patch."""

Colors = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Steps = NDArray[np.int64]


def mask_preview(
    image: Image, full: PatchGrid, kept: PatchGrid | None, mask: Mask | None, caption: Sequence[str], path: Path
) -> Path:
    """Write the picture of an open image and the number of patches.

    `full` is the grid without the mask (rows, cols), `kept` the grid with it, None where no patch is left.
    """
    pixels, downsample = thumbnail(image, SIDE)
    colors = np.array(as_picture(pixels))
    covered = np.zeros(colors.shape[:2], bool) if kept is None else covered_by(kept, colors.shape[:2], downsample)
    colors[~covered] = (255 - FADED * (255.0 - colors[~covered])).astype(np.uint8)
    if mask is not None:
        colors[_outline(_stretched(mask, colors.shape[:2]))] = MASK
    apart = kept is not None and min(kept.size, kept.stride) * kept.scale / downsample >= VISIBLE
    if not apart:
        colors[_outline(covered)] = PATCH
    picture = Picture.fromarray(colors)
    if kept is not None and apart:
        draw = ImageDraw.Draw(picture)
        for x, y, width, height in (kept.boxes(slice(None)) / downsample).tolist():
            draw.rectangle([round(x), round(y), round(x + width) - 1, round(y + height) - 1], outline=PATCH)
    count = 0 if kept is None else len(kept)
    said = f"{count:,} of {len(full):,} patches" if count else f"no patches: none of {len(full):,} is left"
    data = io.BytesIO()
    _with_caption(picture, [*caption, said], mask is not None, bool(count)).save(data, "PNG")
    return write_atomic(path, data.getvalue())


def covered_by(grid: PatchGrid, shape: tuple[int, int], downsample: float) -> Mask:
    """Return the pixels of the picture whose middle is in a patch."""
    starts = np.zeros((grid.rows + 1, grid.columns + 1), np.int32)  # patches that begin above and left of a cell
    for first in range(0, len(grid), 2**16):
        cells = grid.cells(slice(first, first + 2**16))
        starts[cells[:, 0] + 1, cells[:, 1] + 1] = 1
    np.cumsum(starts, axis=0, out=starts)
    np.cumsum(starts, axis=1, out=starts)
    (top, bottom), (left, right) = (
        _steps_over(grid, axis, extent, downsample) for axis, extent in ((1, shape[0]), (0, shape[1]))
    )
    below, above = starts[bottom], starts[top]
    covered: Mask = below[:, right] - below[:, left] - above[:, right] + above[:, left] > 0
    return covered


def _steps_over(grid: PatchGrid, axis: int, extent: int, downsample: float) -> tuple[Steps, Steps]:
    """Return the first grid column (axis 0) or row (axis 1) that covers each pixel, and the one after the last."""
    at = (np.arange(extent) + 0.5) * downsample / grid.scale
    starts = grid.starts[axis]
    low = np.searchsorted(starts + grid.size, at, side="right")
    return low, np.maximum(np.searchsorted(starts, at, side="right"), low)


def _stretched(mask: Mask, shape: tuple[int, int]) -> Mask:
    """Return a mask at the resolution of the picture; a pixel over several cells has any of them."""
    rows, columns = mask.shape
    if rows > shape[0] and columns > shape[1]:
        top, left = (-(-np.arange(side) * cells // side) for side, cells in zip(shape, mask.shape, strict=True))
        found: Mask = np.logical_or.reduceat(np.logical_or.reduceat(mask, top, axis=0), left, axis=1)
        return found
    row, column = ((np.arange(side) * cells // side) for side, cells in zip(shape, mask.shape, strict=True))
    nearest: Mask = mask[row[:, None], column]
    return nearest


def _outline(mask: Mask) -> Mask:
    """Return the pixels of the mask with a neighbour that is not in it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _with_caption(picture: Picture.Image, lines: Sequence[str], masked: bool, any_left: bool) -> Picture.Image:
    width = max(picture.width + 2 * MARGIN, MIN_WIDTH)
    page = Page(width, picture.height + (len(lines) + 1) * LINE + 3 * MARGIN)
    page.picture.paste(picture, ((width - picture.width) // 2, MARGIN))
    y = picture.height + 2 * MARGIN
    for number, line in enumerate(lines):
        color = INK if number == 0 else WRONG if number == len(lines) - 1 and not any_left else GREY
        page.text((MARGIN, y), line, 15, color, width - 2 * MARGIN, keep_end=True)
        y += LINE
    for shown, name, color in ((masked, "foreground mask", MASK), (any_left, "patches", PATCH)):
        if shown:
            x = MARGIN if name == "foreground mask" or not masked else MARGIN + 190
            page.draw.rectangle([x, y + 4, x + 18, y + 14], outline=color, width=2)
            page.text((x + 26, y), name, 15, color, width)
    return page.picture


def preview_names(names: Sequence[str]) -> list[str]:
    """Return a file name for the preview of each image: its name without suffix, safe and unique."""
    stems = [name.removesuffix(PurePath(name).suffix) for name in names]
    return [f"{name}.png" for name in file_names(stems, "image")]
