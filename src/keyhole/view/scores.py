"""The score of every patch as `write_scores` stores it, drawn by the rule of the overlay: `score_raster`.

Letters: n patches.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from keyhole.errors import RunError
from keyhole.images.geometry import Box, Size
from keyhole.report.drawing import SCORE_COLORS, palette
from keyhole.report.predicted import Scores
from keyhole.report.score_layer import OPACITY, ScoreScale, score_raster
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
        scores: Of all n patches, from the top of the image down.
        scales: By task, what the colours mean.
    """

    prediction: dict[str, Any]
    scores: Scores
    scales: Mapping[str, ScoreScale]

    def tile(self, task: str, zoom: int, column: int, row: int) -> bytes | None:
        """Return a tile of the coloured scores as a PNG, clear where no patch is; None if there is no such tile."""
        values = self._values(task, zoom, Box(column * TILE, row * TILE, TILE, TILE))
        if values is None:
            return None
        hot = self.scales[task].heat(values)
        index = np.where(np.isnan(hot), _CLEAR, np.rint(np.nan_to_num(hot) * (_CLEAR - 1))).astype(np.uint8)
        picture = Picture.fromarray(index, "P")
        picture.putpalette(colors().tobytes() + bytes(3))  # with that of `_CLEAR`
        out = io.BytesIO()
        picture.save(out, "PNG", transparency=_ALPHA, compress_level=1)
        return out.getvalue()

    def score(self, task: str, zoom: int, column: int, row: int) -> float | None:
        """Return the score that a pixel of the map at `zoom` shows; None where no patch is."""
        values = self._values(task, zoom, Box(column, row, 1, 1))
        return None if values is None or np.isnan(values).any() else float(values.item())

    def _values(self, task: str, zoom: int, window: Box) -> NDArray[np.float32] | None:
        """Return the scores in a window of the map at `zoom`, in its pixels; None where the image has no such place."""
        size = Size(self.prediction["size"]["width"], self.prediction["size"]["height"])
        if (found := tile_box(size, zoom, window.x // TILE, window.y // TILE)) is None:
            return None
        scale = found[1]
        top, bottom = (window.y - 2) * scale - self._tallest, (window.y + window.height + 2) * scale
        near = _part(self.scores, slice(*np.searchsorted(self._tops, (top, bottom)).tolist()))
        return score_raster(near, task, (-(-size.height // scale), -(-size.width // scale)), scale, window)

    @cached_property
    def _tops(self) -> NDArray[np.int64]:
        return self.scores.boxes(self.scores.index)[:, 1]

    @cached_property
    def _tallest(self) -> int:
        return int(self.scores.boxes(self.scores.index)[:, 3].max())


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
            boxes, (rows, columns) = file["boxes"].astype(np.int64), file["map"].shape
            cells, score = file["cells"].astype(np.int64), file["score"].astype(np.float32)
            per_task = {task: file[f"score.{task}"].astype(np.float32) for task in prediction["tasks"]}
            arrived = file["arrived"].astype(bool) if "arrived" in file else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: damaged ({error}). {remedy}") from error
    n = len(boxes)
    flat = [score, *per_task.values(), *([] if arrived is None else [arrived])]
    if boxes.shape != (n, 4) or cells.shape != (n, 2) or any(values.shape != (n,) for values in flat):
        raise RunError(f"{path}: damaged (its arrays do not fit each other). {remedy}")
    if not boxes[:, 2:].any():
        raise RunError(f"{path}: the patches have no places, as stored features without coordinates.")
    scores = Scores(rows, columns, np.arange(n), cells, score, per_task, boxes.__getitem__, arrived)
    order = np.argsort(boxes[:, 1], kind="stable")
    scores = replace(_part(scores, order), index=np.arange(n), boxes=boxes[order].__getitem__)
    return ScoreMap(prediction, scores, {task: ScoreScale.of(values) for task, values in per_task.items()})


def _part(scores: Scores, places: slice | NDArray[np.int64]) -> Scores:
    return replace(
        scores,
        index=scores.index[places],
        cells=scores.cells[places],
        score=scores.score[places],
        per_task={task: values[places] for task, values in scores.per_task.items()},
        arrived=None if scores.arrived is None else scores.arrived[places],
    )


def _check_size(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > 64 * MAX_PATCHES:
            raise ValueError("more patches than any slide has")
