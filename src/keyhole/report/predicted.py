"""What a prediction carries: the kept patches, the score of every patch, small pictures, and the answer itself.

Drawings import this module and `Prediction` imports the drawings, so that a prediction can show itself. Torch-free. All
boxes are (x, y, width, height) in level-0 pixels and may reach over the border of the image.

Letters: n patches, m kept, k patches shown.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import RunError
from keyhole.images.geometry import Size
from keyhole.tasks.kinds import Task
from keyhole.util.wording import must_be_one_of

BOX = ("x", "y", "width", "height")
MAX_ROUNDING = 4 * float(np.finfo(np.float32).eps)
"""Relative difference of two scores that a softmax in float32 may give to equal logits."""


@dataclass(frozen=True, eq=False, repr=False)
class KeptPatches:
    """The m patches that a prediction was made from, best first.

    Attributes:
        index: (m,) patch index in the grid.
        boxes: (m, 4) level-0 x, y, width, height.
        score: (m,) share of the attention over all patches, mean over the tasks: that of `Scores` at these patches.
        attention: By task, (m,) weight of each patch in the pooled embedding, mean over heads; sums to 1.

    Raises:
        RunError: Attention is NaN, as from a model whose training diverged.
    """

    index: NDArray[np.int64]
    boxes: NDArray[np.int64]
    score: NDArray[np.float32]
    attention: Mapping[str, NDArray[np.float32]]

    def __post_init__(self) -> None:
        m = len(self.index)
        assert self.boxes.shape == (m, 4), self.boxes.shape
        assert self.score.shape == (m,), self.score.shape
        for task, weights in self.attention.items():
            assert weights.shape == (m,), weights.shape
            if not np.isfinite(weights).all():
                raise RunError(
                    f"{task}: the attention of the model is NaN. "
                    "Its weights are damaged or its training diverged; train with a lower rate."
                )
            assert abs(float(weights.sum()) - 1) < 1e-3, weights.sum()

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"KeptPatches({len(self)} patches)"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield plain values of one patch after the other: index, box, score, attention by task."""
        for i in range(len(self)):
            yield {
                "index": int(self.index[i]),
                "box": [int(value) for value in self.boxes[i]],
                "score": _plain(self.score[i]),
                "attention": {task: _plain(weights[i]) for task, weights in self.attention.items()},
            }


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """The score of every patch of an image, a by-product of the selection.

    Attributes:
        rows, columns: Of the full grid, patches left out by a mask included.
        index: (n,) patch index in the grid.
        cells: (n, 2) row and column in the full grid.
        score: (n,) mean over the tasks.
        per_task: By task, (n,).
        boxes: Patch indices (k,) to level-0 boxes (k, 4); `PatchGrid.boxes`.
        arrived: (n,) False where a patch could not be read, which has score 0; None if all could.
    """

    rows: int
    columns: int
    index: NDArray[np.int64]
    cells: NDArray[np.int64]
    score: NDArray[np.float32]
    per_task: Mapping[str, NDArray[np.float32]]
    boxes: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    arrived: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        n = len(self.index)
        assert self.cells.shape == (n, 2), self.cells.shape
        assert self.score.shape == (n,), self.score.shape
        assert all(score.shape == (n,) for score in self.per_task.values())
        assert self.arrived is None or self.arrived.shape == (n,)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"Scores({len(self)} patches on {self.rows} x {self.columns})"

    def tied(self, kept: NDArray[np.int64]) -> bool:
        """Return True if all scores are equal up to rounding, and the `kept` patches (m,) the first of them.

        The selection then followed the order of reading. False if all patches were kept.
        """
        read = slice(None) if self.arrived is None else self.arrived
        index, score = self.index[read], self.score[read]
        if len(kept) >= len(index) or score.max() - score.min() > MAX_ROUNDING * score.max():
            return False
        return bool(np.isin(kept, index[: len(kept)]).all())

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the boxes themselves instead of the grid, which holds the open image."""
        return {**self.__dict__, "boxes": partial(operator.getitem, np.asarray(self.boxes(self.index), np.int64))}

    def map(self, task: str | None = None) -> NDArray[np.float32]:
        """Return the scores on the full grid.

        Stored features need not be on one grid: a cell with several has the highest of their scores.

        Args:
            task: Name of a task; default is the mean over all.

        Returns:
            (rows, columns) float32, NaN where there is no patch.

        Raises:
            ValueError: There is no such task.
        """
        if task is not None and task not in self.per_task:
            raise ValueError(must_be_one_of("task", task, self.per_task))
        out = np.full((self.rows, self.columns), np.nan, np.float32)
        seen = slice(None) if self.arrived is None else self.arrived
        row, column = self.cells[seen].T
        np.fmax.at(out, (row, column), (self.score if task is None else self.per_task[task])[seen])
        return out


@dataclass(frozen=True, eq=False, repr=False)
class Pictures:
    """Pixels that show a prediction, read from its own source.

    Attributes:
        thumbnail: (h, w, c) uint8 of the whole image, c = 1 or 3.
        downsample: Level-0 pixels per pixel of the thumbnail.
        patches: (k, s, s, c) uint8, kept patches as the model saw them, scaled down where they are large.
        place: (k,) which of the kept patches these are; with very many kept, those with the highest attention.
        note: What the pixels are, if the model saw others; else "".
        of_scores: The thumbnail shows the scores, since there is no image that can be read.
        whole: (j, s, s, c) uint8, the first j kept patches in full, where they were requested; else none.
    """

    thumbnail: NDArray[np.uint8]
    downsample: float
    patches: NDArray[np.uint8]
    place: NDArray[np.int64]
    note: str = ""
    of_scores: bool = False
    whole: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))

    def __post_init__(self) -> None:
        assert self.place.shape == (len(self.patches),), self.place.shape

    def __repr__(self) -> str:
        height, width = self.thumbnail.shape[:2]
        return f"Pictures({width} x {height} pixels and {len(self.patches)} patches)"


@dataclass(frozen=True, eq=False, repr=False)
class Predicted:
    """What a model predicts for one image; the fields of `Prediction`.

    Attributes:
        name: The image as the user wrote it; `array` or `picture` for pixels in memory.
        image: The file; the name if there is none.
        size: Width and height of level 0 in pixels; for features of an unknown slide, of the area that holds them all.
        tasks: What was predicted.
        probability: By task and class; {"value": x} for regression.
        label: By task; labels of a multilabel task joined by `|`.
        kept: The patches that the prediction was made from.
        scores: Scores of every patch; None if they were not kept.
        patch: Geometry of the grid: size and stride in pixels of what was read, level, mpp, scale (level-0 pixels per
            pixel read), and edge, the rule for patches over the border. Stored features have, instead of `edge`,
            `features`, the file, and `size_known`, False where the size is inferred from the coordinates.
        model: Name of the model.
        origin: Level-0 x, y of the corner of QuPath's coordinates; (0, 0) unless the slide states bounds.
        unreadable: (k, 4) boxes of the patches that could not be read; None if all could.
        pictures: Pixels that show it; None unless requested.
        notes: Reasons for doubt, such as another resolution than that of the training images.
        threshold: By task and class, the probability above which the class is predicted; empty for a task whose largest
            probability decides.
        mpp: Microns per pixel of level 0; None where unknown.
        file_mpp: Those that the file states, also where others were given and used; None where it does not state them.
    """

    name: str
    image: Path
    size: Size
    tasks: tuple[Task, ...]
    probability: Mapping[str, Mapping[str, float]]
    label: Mapping[str, str]
    kept: KeptPatches
    scores: Scores | None
    patch: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    unreadable: NDArray[np.int64] | None = None
    pictures: Pictures | None = None
    origin: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    threshold: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    mpp: float | None = None
    file_mpp: float | None = None


def pictures_of(prediction: Predicted) -> Pictures:
    """Return the pictures of a prediction, or raise ValueError."""
    if prediction.pictures is None:
        raise ValueError(f"{prediction.name}: the prediction carries no pictures; predict with pictures=True")
    return prediction.pictures


def _plain(value: np.float32) -> float:
    """Return the shortest decimal number that reads back as this float32; CSV and JSON have the same."""
    return float(str(np.float32(value)))
