"""The first epochs from random weights: patches are kept at random at first, then ever fewer of them.

In the first half of `train.explore` all are drawn at random, and attention is held uniform (its key projection stays
at zero): encoder and heads learn from what there is. No patch needs a score then, so only those drawn are read. In the
second half attention learns too, and the random share falls to none. Without this, scores that mean nothing yet can
settle on patches that tell nothing, and what is not kept is never learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from keyhole.nn import Kept, explore
from keyhole.patches.sources import PatchSource


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
