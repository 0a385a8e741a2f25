"""The training images of one epoch: their order, their augmentation, and their batches as they are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from keyhole.data.item import Item
from keyhole.errors import DataError
from keyhole.loading import Batch, FetchOnly, Opener
from keyhole.training.augment import draw, stack_colors
from keyhole.training.choice import Choice
from keyhole.training.job import Job


class Epoch:
    """Iterates over the batches of an epoch, from the one that the state is at: the images and what is read of them.

    Raises:
        DataError: every training image has failed.
    """

    def __init__(self, job: Job, choice: Choice) -> None:
        self.job, self.choice = job, choice
        items, size = epoch_items(job), job.config.train.batch
        self.images = len(items)
        self.batches = [items[start : start + size] for start in range(0, len(items), size)][job.state.batch :]
        self._counted = job.engine.reader.read_patches

    def __len__(self) -> int:
        """Return the number of images that are still to come."""
        return sum(map(len, self.batches))

    def __iter__(self) -> Iterator[tuple[list[Item], Batch]]:
        job, config, state = self.job, self.job.config, self.job.state
        stride = config.patch.stride or config.patch.size
        draws = [
            [
                draw(config.augment, config.train.seed, state.epoch, item.name, stride, config.model.channels)
                for item in items
            ]
            for items in self.batches
        ]
        openers: list[list[Opener]] = [
            [job.images.opener(item, change.view, change.offset) for item, change in zip(*both, strict=True)]
            for both in zip(self.batches, draws, strict=True)
        ]
        if self.batches:
            for row in self.choice.known(state.step, self.batches[0]):
                openers[0][row] = FetchOnly(openers[0][row])
        for step, wanted in enumerate(openers, start=state.step):
            if self.choice.exploration.is_blind(step):
                wanted[:] = [FetchOnly(one) for one in wanted]
        for items, changes, batch in zip(self.batches, draws, job.engine.stream(openers, "mask"), strict=True):
            batch.color = stack_colors(changes)
            yield items, batch

    def patches(self) -> int:
        """Return the patches that were read or known since the last call."""
        before, self._counted = self._counted, self.job.engine.reader.read_patches
        return self._counted - before + self.choice.seen_before


def epoch_items(job: Job) -> list[Item]:
    """Return the training images in the epoch's order, without those that failed in an earlier epoch."""
    usable = [item for item in job.manifest.split("train") if job.usable(item)]
    if not usable:
        raise DataError(f"{job.run.path}: every training image has failed; see left_out.csv")
    order = np.random.default_rng([job.config.train.seed, job.state.epoch]).permutation(len(usable))
    return [usable[place] for place in order]
