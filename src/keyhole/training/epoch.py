"""Read the training images of an epoch, and choose the patches that each keeps for learning.

`train.explore` keeps scores of an untrained model from choosing patches. In its first half all kept patches are drawn
at random and attention stays uniform (its key projection stays at zero), so that only these patches are read. In its
second half attention learns too, and the random share falls to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from keyhole.config.auto import number
from keyhole.data.item import Item
from keyhole.errors import DataError
from keyhole.loading import Batch, FetchOnly, Opener, Shuffled
from keyhole.loading.chunks import is_alone
from keyhole.nn import Kept, explore
from keyhole.runs.journal import SelectionJournal
from keyhole.training.augment import draw, stack_colors
from keyhole.training.job import Job


class Choice:
    """Chooses the patches that the images of each training batch keep.

    A journal holds what large images keep, so that a resumed run does not encode them again.

    Attributes:
        seen_before: patches of the last batch that a killed process had encoded.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.seen_before = job, 0
        self.journal = SelectionJournal(job.run.path / "selection.safetensors")
        self._explored = number(job.config.train.explore, "train.explore")
        self._chunk = job.engine.plan.chunk

    def known(self, step: int, items: Sequence[Item]) -> dict[int, Kept]:
        """Return what the images of a batch keep according to the journal, by their index in the batch."""
        self._chunk = self.job.engine.plan.chunk
        return self.journal.begin(step, [item.name for item in items])

    def is_blind(self, step: int) -> bool:
        """Return True if all kept patches are drawn at random, so that none needs a score."""
        return self._explored > 0 and self._done(step) < 0.5

    def select(self, items: Sequence[Item], batch: Batch, on_chunk: Callable[[int], None]) -> list[Kept | None]:
        """Return what the images of a batch keep for learning in the current step."""
        job, step = self.job, self.job.state.step
        blind = self.is_blind(step)
        job.model.pool.key_proj.requires_grad_(not blind)
        known = self.journal.begin(step, [item.name for item in items])
        self.seen_before = sum(len(source) for row in known if (source := batch.sources[row]) is not None)
        kept: list[Kept | None]
        if blind:
            for _ in batch.chunks():  # without patches to score this only reports images that cannot be opened
                raise AssertionError("no patch needs a score")
            kept = [Kept(torch.empty(0, dtype=torch.long), torch.empty(0))] * len(batch.sources)
            share, places = 1.0, job.config.select.m
        else:
            kept = job.engine.select(batch, on_chunk=on_chunk, known=known, on_image=partial(self._note, batch))
            share, places = min(1.0, max(0.0, 2 * (1 - self._done(step)))), None
        if share == 0:
            return kept
        seed = int(np.random.SeedSequence([job.config.train.seed, step, 1]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        return [
            None if image is None or source is None else explore(image, len(source), share, generator, places=places)
            for image, source in zip(kept, batch.sources, strict=True)
        ]

    def _note(self, batch: Batch, row: int, finish: Callable[[], Kept]) -> None:
        """Add a large image to the journal; the last bits of a small one depend on the images that share its chunk."""
        source = batch.sources[row]
        if source is not None and is_alone(len(source), self._chunk):
            self.journal.add(row, finish())

    def _done(self, step: int) -> float:
        """Return the finished share of the exploration."""
        return step / self.job.state.steps_per_epoch / self._explored if self._explored else 1.0


class Epoch:
    """Iterates over the remaining batches of an epoch: the images, and the patches that are read of them.

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
        """Return the number of images in the remaining batches."""
        return sum(map(len, self.batches))

    def __iter__(self) -> Iterator[tuple[list[Item], Batch]]:
        job, config, state = self.job, self.job.config, self.job.state
        stride, seed = config.patch.stride or config.patch.size, config.train.seed
        draws = [
            [draw(config.augment, seed, state.epoch, item.name, stride, config.model.channels) for item in items]
            for items in self.batches
        ]
        openers: list[list[Opener]] = [
            [job.images.opener(item, change.view, change.offset) for item, change in zip(*both, strict=True)]
            for both in zip(self.batches, draws, strict=True)
        ]
        known = self.choice.known(state.step, self.batches[0]) if self.batches else ()
        for step, wanted in enumerate(openers, start=state.step):
            for row in range(len(wanted)):
                if config.select.shuffles:
                    wanted[row] = Shuffled(wanted[row], (seed, step))
                if self.choice.is_blind(step) or (step == state.step and row in known):
                    wanted[row] = FetchOnly(wanted[row])
        for items, changes, batch in zip(self.batches, draws, job.engine.stream(openers, "mask"), strict=True):
            batch.color = stack_colors(changes)
            yield items, batch

    def patches(self) -> int:
        """Return the number of patches read since the last call, or known from the journal."""
        before, self._counted = self._counted, self.job.engine.reader.read_patches
        return self._counted - before + self.choice.seen_before


def epoch_items(job: Job) -> list[Item]:
    """Return the training images in the order of the epoch, without those that failed in an earlier one."""
    usable = [item for item in job.manifest.split("train") if job.usable(item)]
    if not usable:
        raise DataError(f"{job.run.path}: every training image has failed; see left_out.csv")
    order = np.random.default_rng([job.config.train.seed, job.state.epoch]).permutation(len(usable))
    return [usable[place] for place in order]
