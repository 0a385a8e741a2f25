"""Which patches an image keeps for learning: the best by attention, and in the first epochs patches drawn at random.

In the first half of `train.explore` all are drawn at random, and attention is held uniform (its key projection stays
at zero): encoder and heads learn from what there is. No patch needs a score then, so only those drawn are read. In the
second half attention learns too, and the random share falls to none. Without this, scores that mean nothing yet can
settle on patches that tell nothing, and what is not kept is never learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from keyhole.config.auto import number
from keyhole.data.item import Item
from keyhole.loading import Batch
from keyhole.loading.chunks import is_alone
from keyhole.nn import Kept, explore
from keyhole.patches.sources import PatchSource
from keyhole.runs.journal import SelectionJournal
from keyhole.training.job import Job


@dataclass(frozen=True)
class Exploration:
    """How much is drawn at random in each step.

    Attributes:
        epochs: as `train.explore`; 0 explores nothing.
        steps_per_epoch: of the run.
        seed: of the run.
    """

    epochs: float
    steps_per_epoch: int
    seed: int

    def share(self, step: int) -> float:
        """Return the share of the kept patches that are drawn at random: 1 in the first half, then falling to 0."""
        return min(1.0, max(0.0, 2 * (1 - self._done(step))))

    def is_blind(self, step: int) -> bool:
        """Whether all patches are drawn, so that none needs a score."""
        return self.epochs > 0 and self._done(step) < 0.5

    def draw(self, step: int, sources: Sequence[PatchSource | None], m: int) -> list[Kept | None]:
        """m patches of each image, at random."""
        generator = self._generator(step)
        nothing = Kept(torch.empty(0, dtype=torch.long), torch.empty(0))
        return [
            None if source is None else explore(nothing, len(source), 1.0, generator, places=m) for source in sources
        ]

    def mix(self, step: int, kept: Sequence[Kept | None], sources: Sequence[PatchSource | None]) -> list[Kept | None]:
        """The random share in the places of the least of the kept."""
        share = self.share(step)
        if share == 0:
            return list(kept)
        generator = self._generator(step)
        return [
            image if image is None or source is None else explore(image, len(source), share, generator)
            for image, source in zip(kept, sources, strict=True)
        ]

    def _done(self, step: int) -> float:
        return step / self.steps_per_epoch / self.epochs if self.epochs else 1.0

    def _generator(self, step: int) -> torch.Generator:
        seed = int(np.random.SeedSequence([self.seed, step, 1]).generate_state(1)[0])
        return torch.Generator().manual_seed(seed)


class Choice:
    """What the images of each training batch keep. What large images keep is written down, so that a run that was
    killed in the middle of a batch does not encode them again.

    Attributes:
        seen_before: patches of the last batch that a process that was killed had encoded.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.seen_before = job, 0
        self.journal = SelectionJournal(job.run.path / "selection.safetensors")
        explore = number(job.config.train.explore, "train.explore")
        self.exploration = Exploration(explore, job.state.steps_per_epoch, job.config.train.seed)
        self._chunk = job.engine.plan.chunk

    def known(self, step: int, items: Sequence[Item]) -> dict[int, Kept]:
        """Return what images of a batch keep, as far as the journal says."""
        self._chunk = self.job.engine.plan.chunk
        return self.journal.begin(step, [item.name for item in items])

    def select(self, items: Sequence[Item], batch: Batch, on_chunk: Callable[[int], None]) -> list[Kept | None]:
        """Return what the images of a batch keep for learning in the step that the state is at."""
        job, step = self.job, self.job.state.step
        job.model.pool.key_proj.requires_grad_(not self.exploration.is_blind(step))
        known = self.journal.begin(step, [item.name for item in items])
        self.seen_before = sum(len(source) for row in known if (source := batch.sources[row]) is not None)
        if self.exploration.is_blind(step):
            for _ in batch.chunks():  # there are none, but images that cannot be opened show
                raise AssertionError("patches were streamed that are not needed")
            return self.exploration.draw(step, batch.sources, job.config.select.m)
        note = partial(self._note, batch)
        kept = job.engine.select(batch, on_chunk=on_chunk, known=known, on_image=note)
        return self.exploration.mix(step, kept, batch.sources)

    def _note(self, batch: Batch, row: int, finish: Callable[[], Kept]) -> None:
        """Write down what an image keeps if it is large; a small one's last bits depend on its neighbours' chunks."""
        source = batch.sources[row]
        if source is not None and is_alone(len(source), self._chunk):
            self.journal.add(row, finish())

    def end(self) -> None:
        """The batch has been learned from."""
        self.journal.end()
