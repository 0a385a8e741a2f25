"""Both passes over a batch of images -> a `Prediction` of each.

Letters: n patches, m kept, h heads, t queries.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from keyhole.data.item import Item
from keyhole.engine import Engine, Inference
from keyhole.errors import ImageError
from keyhole.images import open_image
from keyhole.images.geometry import Size
from keyhole.nn import Kept
from keyhole.patches.features import FeaturePatches
from keyhole.patches.sources import FilePatches, PatchSource
from keyhole.report.pictures import most_attended, pictures_of_features, pictures_of_file
from keyhole.report.prediction import KeptPatches, Prediction, Scores
from keyhole.tasks.kinds import Task


@dataclass(frozen=True)
class BatchAnswers:
    """Turns a batch after both passes, still open and with the logits of all patches, into predictions."""

    engine: Engine
    tasks: tuple[Task, ...]
    name: str
    done: Inference

    def prediction(self, item: Item, row: int) -> Prediction:
        kept, source = self.done.bags.kept[row], self.done.batch.sources[row]
        assert kept is not None
        assert source is not None
        scores = self._scores(kept, source)
        # A score is a share of all patches under every rule, also under "streaming", which ranks by shares of the
        # patches that it holds at the end.
        found = kept.index.cpu().numpy()
        best = np.argsort(-scores.score[found], kind="stable")
        index = found[best]
        bag = self.done.bags.rows.index(row)
        logits = {task: self.done.logits[task.name][bag].float().cpu().numpy() for task in self.tasks}
        probability = {task: task.probability(logits[task]) for task in self.tasks}
        unreadable = np.array(sorted(self.done.batch.unreadable.get(row, ())), np.int64)
        size, origin = self._slide(item, source)
        attention = {task: weights[best] for task, weights in self._attention(kept).items()}
        return Prediction(
            name=item.name,
            image=item.image,
            size=size,
            origin=origin,
            tasks=self.tasks,
            probability={task.name: task.by_column(p) for task, p in probability.items()},
            label={task.name: task.label(p) for task, p in probability.items()},
            kept=KeptPatches(index, source.boxes(index), scores.score[index], attention),
            scores=scores,
            patch=source.describe(),
            model=self.name,
            unreadable=source.boxes(unreadable) if len(unreadable) else None,
        )

    def with_pictures(self, prediction: Prediction, row: int) -> Prediction:
        """Return the prediction with the pixels that show it; unchanged where its source cannot be read any more."""
        source, place = self.done.batch.sources[row], most_attended(prediction.kept)
        with suppress(ImageError):  # a share that hangs now; the prediction itself is complete
            if isinstance(source, FeaturePatches):
                draw = partial(pictures_of_features, source, prediction, place)
                return replace(prediction, pictures=self.engine.reader.run(prediction.name, draw))
            assert isinstance(source, FilePatches)
            pixels = self._pixels(prediction.kept.index[place], row)
            if pixels is not None:
                look = partial(pictures_of_file, source, prediction, place, pixels)
                return replace(prediction, pictures=self.engine.reader.run(prediction.name, look))
        return prediction

    def _pixels(self, index: NDArray[np.int64], row: int) -> NDArray[np.uint8] | None:
        """Pixels of kept patches: those that the model saw, or read from the same source where they are not held."""
        held, kept = self.done.bags.pixels[row], self.done.bags.kept[row]
        if held is not None and kept is not None:
            found = kept.index.cpu().numpy()
            order = np.argsort(found)
            return held[order[np.searchsorted(found, index, sorter=order)]]
        wanted = [np.empty(0, np.int64)] * len(self.done.batch.names)
        wanted[row] = index
        return self.done.batch.fetch(wanted)[row]

    def _attention(self, kept: Kept) -> dict[str, NDArray[np.float32]]:
        """Weight of each kept patch in the pooled embedding, per task: softmax over the m kept, mean over heads."""
        assert kept.logits is not None
        weights = kept.logits[kept.index].softmax(dim=0).mean(dim=1).cpu().numpy()
        return {task.name: weights[:, self.engine.model.queries[task.name]] for task in self.tasks}

    def _scores(self, kept: Kept, source: PatchSource) -> Scores:
        """Share of each patch in the attention over all n patches, per task: softmax over n, mean over heads."""
        assert kept.logits is not None
        score = kept.logits.softmax(dim=0).mean(dim=1)
        index = torch.arange(len(score)).numpy()
        rows, columns = source.map_shape
        queries = self.engine.model.queries
        return Scores(
            rows=rows,
            columns=columns,
            index=index,
            cells=source.cells(index),
            score=score.mean(dim=1).cpu().numpy(),
            per_task={task.name: score[:, queries[task.name]].cpu().numpy() for task in self.tasks},
            boxes=source.boxes,
            arrived=None if kept.arrived is None else kept.arrived.numpy(),
        )

    def _slide(self, item: Item, source: PatchSource) -> tuple[Size, tuple[int, int]]:
        """Size of the image and QuPath's origin on it.

        Where stored features do not state them, they are those of the slide, else those of what holds all features.
        """
        stated, origin = source.l0_size, source.qupath_origin
        if stated is not None and origin is not None:
            return stated, origin
        if item.image != item.features and os.path.exists(item.image):  # noqa: PTH110 - raises nothing on a long name

            def look() -> tuple[Size, tuple[int, int]]:
                with open_image(item.image) as image:
                    return stated or image.size, origin or image.qupath_origin

            with suppress(ImageError):
                return self.engine.reader.run(item.name, look)
        return source.extent, origin or (0, 0)
