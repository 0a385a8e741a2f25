"""Predictions without a model: a grid over an image of noise, with scores that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keyhole.images.geometry import Size
from keyhole.images.image import ArrayImage
from keyhole.patches.grid import PatchGrid
from keyhole.report.prediction import KeptPatches, Pictures, Prediction, Scores
from keyhole.tasks.kinds import Task

TASK = Task("tumour", "binary", ("no", "yes"))


class Blank(ArrayImage):
    """An image of any size of which nothing is read."""

    def __init__(self, size: Size) -> None:
        super().__init__(np.zeros((1, 1, 3), np.uint8))
        self.size = size
        self.levels = (self.levels[0]._replace(size=size),)


def made_prediction(
    size: tuple[int, int] = (400, 300),
    patch: int = 50,
    stride: int | None = None,
    score: np.ndarray | None = None,
    m: int = 4,
    mpp: float | None = None,
    edge: str = "background",
) -> Prediction:
    """A prediction for an image of `size` (width, height); `score` (n,) are the shares, by default random ones."""
    whole = Size(*size)
    grid = PatchGrid(Blank(whole), patch, stride, edge=edge)
    rng, n = np.random.default_rng(0), len(grid)
    share = rng.dirichlet(np.full(n, 0.2)).astype(np.float32) if score is None else score.astype(np.float32)
    index = np.argsort(-share, kind="stable")[:m]
    weights = share[index] / share[index].sum()
    down = max(size) / min(1024, max(size))
    shape = round(whole.height / down), round(whole.width / down), 3
    p = TASK.probability([3.0])
    return Prediction(
        name="slides/a.svs",
        image=Path("a.svs"),
        size=whole,
        tasks=(TASK,),
        probability={TASK.name: TASK.by_column(p)},
        label={TASK.name: TASK.label(p)},
        kept=KeptPatches(index, grid.boxes(index), share[index], {TASK.name: weights}),
        scores=Scores(
            grid.rows, grid.columns, np.arange(n), grid.cells(slice(None)), share, {TASK.name: share}, grid.boxes
        ),
        patch={"size": patch, "stride": grid.stride, "level": 0, "mpp": mpp, "scale": 1.0, "edge": edge},
        model="one",
        pictures=Pictures(
            rng.integers(120, 136, shape, dtype=np.uint8),
            down,
            rng.integers(0, 255, (len(index), 40, 40, 3), dtype=np.uint8),
            np.arange(len(index)),
        ),
    )
