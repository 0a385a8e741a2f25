"""Make a `Prediction` of each image from the result of both passes over a batch.

Letters: n patches, m kept, h heads, t queries.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keyhole.data.item import Item
from keyhole.data.resolution import Resolution, enlarged, overridden
from keyhole.engine import Engine, Inference
from keyhole.errors import ImageError, KeyholeError
from keyhole.images import open_image
from keyhole.images.geometry import Size
from keyhole.loading.unreadable import Ledger
from keyhole.nn import Kept
from keyhole.patches.features import FeaturePatches
from keyhole.patches.sources import FilePatches, PatchSource
from keyhole.report.pictures import most_attended, pictures_of_features, pictures_of_file
from keyhole.report.prediction import KeptPatches, Pictures, Prediction, Scores
from keyhole.tasks.kinds import Task
from keyhole.util.progress import say
from keyhole.util.tally import Tally
from keyhole.util.wording import counted

FEW = 4
"""With fewer patches than this part of the M that a model keeps, an image may be noted; see `Answers.usual_patches`."""


@dataclass
class Answers:
    """Makes predictions from open batches after both passes, with the logits of all patches.

    Attributes:
        engine: Engine of the model.
        tasks, name: Tasks of the model, and its name in predictions.
        resolution: Resolution of the training images.
        told: Doubts about features of which the user has been warned.
        silent: Do not warn.
        whole: Number of kept patches that pictures hold in full.
        above: By task and class, the probability above which the class is predicted.
        usual_patches: Number of patches that nearly all training images have at least; 0 where it is not known. Few
            patches are noted only where the model is used to more: small photographs have few, and always had.
    """

    engine: Engine
    tasks: tuple[Task, ...]
    name: str
    resolution: Resolution
    told: set[str]
    silent: bool
    whole: int = 0
    above: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    usual_patches: int = 0
    unlike: int = 0
    scales: Tally = field(default_factory=Tally)

    def warn_about_features(self, done: Inference) -> None:
        for source in done.batch.sources:
            for text in () if source is None or self.silent else source.doubts():
                if source is not None and text not in self.told:
                    self.told.add(text)
                    say(f"warning: {source.name}: {text}")

    def prediction(self, done: Inference, item: Item, row: int) -> Prediction:
        kept, source, queries = done.bags.kept[row], done.batch.sources[row], self.engine.model.queries
        assert kept is not None
        assert kept.logits is not None
        assert source is not None
        scores = self._scores(kept, source)
        # Under every rule a score is a share of all patches. "streaming" ranks by shares of the patches that it holds.
        found = kept.index.cpu().numpy()
        best = np.argsort(-scores.score[found], kind="stable")
        index = found[best]
        # Weight of each kept patch in the pooled embedding: softmax over the m kept, mean over heads.
        weights = kept.logits[kept.index].softmax(dim=0).mean(dim=1).cpu().numpy()[best]
        bag = done.bags.rows.index(row)
        logits = {task: done.logits[task.name][bag].float().cpu().numpy() for task in self.tasks}
        probability = {task: task.probability(logits[task]) for task in self.tasks}
        unreadable = np.array(sorted(done.batch.unreadable.get(row, ())), np.int64)
        size, origin = self._slide(item, source)
        patch = source.describe()
        return Prediction(
            name=item.name,
            image=item.image,
            size=size,
            origin=origin,
            tasks=self.tasks,
            probability={task.name: task.by_column(p) for task, p in probability.items()},
            label={task.name: task.label(p, self.above.get(task.name)) for task, p in probability.items()},
            kept=KeptPatches(
                index,
                source.grid.boxes(index),
                scores.score[index],
                {task.name: weights[:, queries[task.name]] for task in self.tasks},
            ),
            scores=scores,
            patch=patch,
            model=self.name,
            unreadable=source.grid.boxes(unreadable) if len(unreadable) else None,
            threshold=self.above,
            notes=(
                *source.doubts(),
                *self._about_scale(item, source),
                *self._doubt(item.name, patch),
                *self._few(len(source)),
            ),
            mpp=source.l0_mpp,
            file_mpp=source.file_mpp,
        )

    def _scores(self, kept: Kept, source: PatchSource) -> Scores:
        """Return the share of each patch in the attention over all n patches: softmax over n, mean over heads."""
        assert kept.logits is not None
        score = kept.logits.softmax(dim=0).mean(dim=1)
        index = torch.arange(len(score)).numpy()
        rows, columns = source.grid.rows, source.grid.columns
        queries = self.engine.model.queries
        return Scores(
            rows=rows,
            columns=columns,
            index=index,
            cells=source.grid.cells(index),
            score=score.mean(dim=1).cpu().numpy(),
            per_task={task.name: score[:, queries[task.name]].cpu().numpy() for task in self.tasks},
            boxes=source.grid.boxes,
            arrived=None if kept.arrived is None else kept.arrived.numpy(),
        )

    def _slide(self, item: Item, source: PatchSource) -> tuple[Size, tuple[int, int]]:
        """Return the size of the image and its QuPath origin, from the slide if stored features do not state them."""
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

    def _about_scale(self, item: Item, source: PatchSource) -> list[str]:
        """Return notes on an image whose own resolution is overridden, or that is enlarged."""
        given = overridden(item.mpp, source.file_mpp, item.mpp_from)
        notes = list(filter(None, [given, enlarged(source.l0_mpp, source.scale)]))
        for note in notes:
            self.scales.add(item.name, note)
        return notes

    def _few(self, patches: int) -> list[str]:
        """Return a note on an image with few patches, such as a slide that is nearly blank, if that is unusual."""
        m = self.engine.settings.m
        if patches * FEW >= m or patches >= self.usual_patches:
            return []
        had = f"nearly all images that it learned from have {counted(self.usual_patches, 'patch', 'patches')} or more"
        return [f"{counted(patches, 'patch', 'patches')}, of {m} that the model keeps; {had}"]

    def _doubt(self, name: str, patch: Mapping[str, Any]) -> list[str]:
        """Return doubts about the resolution, which files of features need not state."""
        mpp = patch["mpp"]
        doubt = self.resolution.doubt(mpp) if mpp is not None or "features" not in patch else ""
        self.unlike += bool(doubt)
        if doubt and self.unlike == 1 and not self.silent:
            say(f"warning: {name}: {doubt}")
        return [doubt] if doubt else []

    def with_pictures(
        self, done: Inference, prediction: Prediction, row: int, before: Pictures | None = None
    ) -> Prediction:
        """Return the prediction with pictures; unchanged, with a warning, if its source cannot be read any more.

        The thumbnail is that of `before`, if given.
        """
        source, place = done.batch.sources[row], most_attended(prediction.kept)
        first = np.arange(min(self.whole, len(prediction.kept)))
        try:
            if isinstance(source, FeaturePatches):
                draw = partial(pictures_of_features, source, prediction, place, first)
            else:
                assert isinstance(source, FilePatches)
                wanted = np.union1d(place, first)
                pixels = _kept_pixels(done, prediction.kept.index[wanted], row)
                each = pixels[np.searchsorted(wanted, place)]
                draw = partial(pictures_of_file, source, prediction, place, each, pixels[: len(first)], before)
            return replace(prediction, pictures=self.engine.reader.run(prediction.name, draw))
        except ImageError as error:  # such as a network share that hangs; the prediction is complete without
            say(f"warning: {prediction.name} is shown without pictures: {error}")
            return prediction

    def finish(self, images: int) -> None:
        """Warn of the number of images with another resolution, and of those of `_about_scale`."""
        for each in () if self.silent else self.scales.kinds.values():
            where = "" if each.count == 1 else f"{each.count} of {images} images, the first "
            say(f"warning: {where}{each.name}: {each.text}")
        if self.unlike > 1 and not self.silent:
            told = f"{self.unlike} of {images} images have another resolution than the model learned at"
            say(f"warning: {told} ({self.resolution} um per pixel), or none")


def _kept_pixels(done: Inference, index: NDArray[np.int64], row: int) -> NDArray[np.uint8]:
    """Return the pixels of kept patches from memory, or else read them from the same source; ImageError if lost."""
    held, kept, batch = done.bags.pixels[row], done.bags.kept[row], done.batch
    if held is not None and kept is not None:
        found = kept.index.cpu().numpy()
        order = np.argsort(found)
        return held[order[np.searchsorted(found, index, sorter=order)]]
    wanted = [np.empty(0, np.int64)] * len(batch.names)
    wanted[row] = index
    pixels = batch.fetch(wanted)[row]
    if pixels is None:
        raise ImageError(batch.names[row], "its kept patches cannot be read again")
    return pixels


def damage(name: str, source: PatchSource, unreadable: Mapping[int, str], allowed: float) -> KeyholeError | None:
    """Return an error if more patches of an image are unreadable (reasons by index) than the share `allowed`."""
    ledger, index = Ledger(len(source), allowed), list(unreadable)
    ledger.add(name, source.grid.boxes(index), index, list(unreadable.values()))
    try:
        ledger.check()
    except KeyholeError as error:
        return error
    return None
