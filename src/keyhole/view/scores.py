"""The score of every patch as `write_scores` stores it: a map whose cells lie where the patches are.

Letters: n patches, r rows and k columns of the map.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from keyhole.errors import RunError
from keyhole.images.geometry import Size
from keyhole.report.drawing import SCORE_COLORS, palette
from keyhole.report.score_layer import OPACITY, ScoreScale
from keyhole.view.tiles import TILE, tile_box

MAX_PATCHES = 2**24
"""More patches than a slide of 16 gigapixels has; a file that declares more is not read."""
_CLEAR = 255  # index in the palette of a pixel without a patch
_ALPHA = bytes([*np.rint(255 * np.linspace(OPACITY[0] / OPACITY[1], 1, _CLEAR)).astype(np.uint8).tolist(), 0])


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """The scores of one image.

    Attributes:
        prediction: prediction.json.
        scales: By task, what the colours mean.
        x_edges, y_edges: (k + 1,) and (r + 1,) level-0 borders between cells, halfway between the centres of patches.
        values: By task, (r, k) scores; NaN where there is no patch.
    """

    prediction: dict[str, Any]
    scales: Mapping[str, ScoreScale]
    x_edges: NDArray[np.float64]
    y_edges: NDArray[np.float64]
    values: Mapping[str, NDArray[np.float32]]

    def tile(self, task: str, zoom: int, column: int, row: int) -> bytes | None:
        """Return a tile of the coloured scores as a PNG, clear where no patch is; None if there is no such tile.

        A pixel that shows several patches has the highest of their scores.
        """
        size = Size(self.prediction["size"]["width"], self.prediction["size"]["height"])
        found = tile_box(size, zoom, column, row)
        if found is None:
            return None
        box, scale = found
        values = _spread(self.values[task], self.y_edges, box.y + scale * np.arange(TILE + 1.0), 0)
        values = _spread(values, self.x_edges, box.x + scale * np.arange(TILE + 1.0), 1)
        hot = self.scales[task].heat(values)
        index = np.where(np.isnan(hot), _CLEAR, np.rint(np.nan_to_num(hot) * (_CLEAR - 1))).astype(np.uint8)
        picture = Picture.fromarray(index, "P")
        picture.putpalette(colors().tobytes() + bytes(3))  # with that of `_CLEAR`
        out = io.BytesIO()
        picture.save(out, "PNG", transparency=_ALPHA, compress_level=1)
        return out.getvalue()


def colors() -> NDArray[np.uint8]:
    """Return the colours of scores (255, 3), from the equal share up."""
    return palette(SCORE_COLORS)[np.rint(np.linspace(0, 255, _CLEAR)).astype(np.int64)]


def read_scores(path: Path) -> ScoreMap:
    """Read a file of `write_scores`.

    Raises:
        RunError: It is damaged, of an older version of keyhole, or its patches have no places.
    """
    remedy = "Write it again with keyhole predict or keyhole evaluate."
    try:
        with np.load(path, allow_pickle=False) as file:
            if "prediction" not in file or "boxes" not in file:
                raise RunError(f"{path}: written by an older version of keyhole. {remedy}")
            _check_size(path)
            prediction = json.loads(bytes(file["prediction"]))
            cells, boxes = file["cells"].astype(np.int64), file["boxes"].astype(np.float64)
            rows, columns = file["map"].shape
            values = {task: file[f"map.{task}"].astype(np.float32) for task in prediction["tasks"]}
            scales = {task: ScoreScale.of(file[f"score.{task}"]) for task in prediction["tasks"]}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: damaged ({error}). {remedy}") from error
    if boxes.shape != (len(cells), 4) or any(shown.shape != (rows, columns) for shown in values.values()):
        raise RunError(f"{path}: damaged (its arrays do not fit each other). {remedy}")
    if not boxes[:, 2:].any():
        raise RunError(f"{path}: the patches have no places, as stored features without coordinates.")
    x_edges, y_edges = (
        _edges(cells[:, 1 - axis], boxes[:, axis], boxes[:, 2 + axis], (columns, rows)[axis]) for axis in (0, 1)
    )
    return ScoreMap(prediction, scales, x_edges, y_edges, values)


def _check_size(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > 64 * MAX_PATCHES:
            raise ValueError("more patches than any slide has")


def _edges(
    cell: NDArray[np.int64], start: NDArray[np.float64], side: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """Return the borders (count + 1) of the cells along one axis, from the starts and lengths of their patches (n).

    Rows or columns without a patch are placed between their neighbours.
    """
    low = np.full(count, np.inf)
    np.minimum.at(low, cell, start)
    known = np.flatnonzero(np.isfinite(low))
    length = float(np.median(side))
    centers = np.interp(np.arange(count), known, low[known]) + length / 2
    between = (centers[:-1] + centers[1:]) / 2
    return np.concatenate([[centers[0] - length / 2], between, [centers[-1] + length / 2]])


def _spread(
    values: NDArray[np.float32], edges: NDArray[np.float64], pixels: NDArray[np.float64], axis: int
) -> NDArray[np.float32]:
    """Return values along one axis for the pixels between borders (t + 1,): the highest of the cells in each pixel."""
    first = np.searchsorted(edges, pixels[:-1], side="right") - 1
    last = np.searchsorted(edges, pixels[1:], side="left") - 1  # the cell in which the pixel ends
    inside = (last >= 0) & (first < len(edges) - 1)
    first, last = first.clip(0, len(edges) - 2), last.clip(0, len(edges) - 2)
    if (last - first).max() <= 1:  # no cell lies between, so the two ends are all
        out = (
            np.fmax(values.take(first, axis), values.take(last, axis))
            if (last > first).any()
            else values.take(first, axis)
        )
    else:
        out = np.stack(
            [np.fmax.reduce(values.take(range(a, b + 1), axis), axis=axis) for a, b in zip(first, last, strict=True)],
            axis,
        )
    out = np.moveaxis(out, axis, 0)
    out[~inside] = np.nan
    return np.moveaxis(out, 0, axis)
