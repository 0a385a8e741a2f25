"""Both passes over an image -> its `Prediction`: nothing is computed a second time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keyhole.data.item import Item
from keyhole.engine import Inference
from keyhole.errors import ImageError
from keyhole.images import open_image
from keyhole.images.geometry import Size
from keyhole.loading import Reader
from keyhole.nn import IPSClassifier
from keyhole.nn.selection import Kept
from keyhole.patches.features import FeaturePatches
from keyhole.patches.sources import FilePatches, PatchSource
from keyhole.report.pictures import most_attended, pictures_of_features, pictures_of_file
from keyhole.report.prediction import KeptPatches, Prediction, Scores
from keyhole.tasks.kinds import Task


def make_prediction(
    model: IPSClassifier,
    tasks: Sequence[Task],
    name: str,
    item: Item,
    done: Inference,
    place: int,
    row: int,
    reader: Reader,
) -> Prediction:
    """What a model says of one image of a batch.

    Args:
        model: that looked at it.
        tasks: what it predicts.
        name: what predictions call the model.
        item: the image.
        done: its batch after both passes, with the logits of all patches.
        place: of the image in the bags.
        row: of the image in the batch.
        reader: for a look at the slide behind stored features.
    """
    kept, source = done.bags.kept[row], done.batch.sources[row]
    assert kept is not None
    assert source is not None
    scores = _scores(model, tasks, kept, source)
    # One meaning of score everywhere: a share of all patches, also under "streaming", which ranks by shares of the
    # patches that it holds at the end.
    found = kept.index.cpu().numpy()
    best = np.argsort(-scores.score[found], kind="stable")
    index = found[best]
    probability = {task.name: task.probability(done.logits[task.name][place].float().cpu().numpy()) for task in tasks}
    unreadable = np.array(sorted(done.batch.unreadable.get(row, ())), np.int64)
    size, origin = _slide(item, source, reader)
    return Prediction(
        name=item.name,
        image=item.image,
        size=size,
        origin=origin,
        tasks=tuple(tasks),
        probability={task.name: task.by_column(probability[task.name]) for task in tasks},
        label={task.name: task.label(probability[task.name]) for task in tasks},
        kept=KeptPatches(
            index,
            source.boxes(index),
            scores.score[index],
            {task: weights[best] for task, weights in _attention(model, tasks, kept).items()},
        ),
        scores=scores,
        patch=source.describe(),
        model=name,
        unreadable=source.boxes(unreadable) if len(unreadable) else None,
    )


def with_pictures(prediction: Prediction, done: Inference, row: int, reader: Reader) -> Prediction:
    """The prediction with the pixels that show it, from its own source; as it is where that cannot be read any more.

    Args:
        prediction: of one image of the batch.
        done: the batch, still open.
        row: of the image in the batch.
        reader: reads under its stall limit.
    """
    source, place = done.batch.sources[row], most_attended(prediction.kept)
    with suppress(ImageError):  # a share that hangs now; the prediction itself is whole
        if isinstance(source, FeaturePatches):
            pictures = reader.run(prediction.name, partial(pictures_of_features, source, prediction, place))
            return replace(prediction, pictures=pictures)
        assert isinstance(source, FilePatches)
        patches = _kept_pixels(prediction, place, done, row)
        if patches is not None:
            look = partial(pictures_of_file, source, prediction, place, patches)
            return replace(prediction, pictures=reader.run(prediction.name, look))
    return prediction


def _kept_pixels(
    prediction: Prediction, place: NDArray[np.int64], done: Inference, row: int
) -> NDArray[np.uint8] | None:
    """Pixels of kept patches: those that the model saw, or read from the same source where they are not held."""
    held, kept, index = done.bags.pixels[row], done.bags.kept[row], prediction.kept.index[place]
    if held is not None and kept is not None:
        found = kept.index.cpu().numpy()
        order = np.argsort(found)
        return held[order[np.searchsorted(found, index, sorter=order)]]
    wanted = [np.empty(0, np.int64)] * len(done.batch.names)
    wanted[row] = index
    return done.batch.fetch(wanted)[row]


def _attention(model: IPSClassifier, tasks: Sequence[Task], kept: Kept) -> dict[str, Any]:
    """Weight of each kept patch in the pooled embedding, per task: softmax over the kept, mean over heads."""
    assert kept.logits is not None
    weights = kept.logits[kept.index].softmax(dim=0).mean(dim=1).cpu().numpy()
    return {task.name: weights[:, model.queries[task.name]] for task in tasks}


def _scores(model: IPSClassifier, tasks: Sequence[Task], kept: Kept, source: PatchSource) -> Scores:
    """Every patch's share of the attention over all patches, per task: softmax over n, mean over heads."""
    assert kept.logits is not None
    score = kept.logits.softmax(dim=0).mean(dim=1)
    index = torch.arange(len(score)).numpy()
    rows, columns = source.map_shape
    return Scores(
        rows=rows,
        columns=columns,
        index=index,
        cells=source.cells(index),
        score=score.mean(dim=1).cpu().numpy(),
        per_task={task.name: score[:, model.queries[task.name]].cpu().numpy() for task in tasks},
        boxes=source.boxes,
        arrived=None if kept.arrived is None else kept.arrived.numpy(),
    )


def _slide(item: Item, source: PatchSource, reader: Reader) -> tuple[Size, tuple[int, int]]:
    """Size of the image and QuPath's origin on it.

    Stored features may not say them: then as the slide does, else what holds them all, counted from the corner.
    """
    stated, origin = source.l0_size, source.qupath_origin
    if stated is not None and origin is not None:
        return stated, origin
    if item.image != item.features and os.path.exists(item.image):  # noqa: PTH110 - raises nothing on a long name

        def look() -> tuple[Size, tuple[int, int]]:
            with open_image(item.image) as image:
                return stated or image.size, origin or image.qupath_origin

        with suppress(ImageError):  # its features are what was asked for
            return reader.run(item.name, look)
    return source.extent, origin or (0, 0)
