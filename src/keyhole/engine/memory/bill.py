"""What a plan costs: bytes of every part of a run, as a function of how many patches are taken at a time.

Letters: b image, m kept, d width, n patches of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keyhole.engine.memory.probe import Costs
from keyhole.nn import parts

HELD_BYTES = 2**28
"""Kept pixels of a batch that stay in host memory; more are read again, a part at a time, when they are wanted."""
SHARED_TILES = 2**25
"""Bytes that decoded tiles may take which patches that are read later share, where the user has named a budget: rows of
170 tiles of 256 px in RGB. Of wider ones in a grid that is not aligned, some are decoded twice."""
MARGIN = 0.1
"""What a plan leaves free, as a share of what it adds to the process: predictions are not exact."""


@dataclass(frozen=True)
class Bill:
    """What everything costs, in bytes.

    Attributes:
        costs: of the two passes, measured.
        now: taken before the first step.
        training: gradients and AdamW's two moments, as far as they are not there yet.
        stepping: what the optimizer needs while it steps.
        patch: one patch as it is read, where the host counts.
        buffers: chunks in the ring of read-ahead.
        host: what else the host holds.
        logits: of the largest image.
        finishing: scores, softmax and order of the largest image, once its last patch is there.
        images: whose logits are held at a time.
        predicted: the same in a prediction at the end of a run, when nothing is held for learning any more; 0 without.
        m, kept: patches of an image and of a batch that are kept.
        learn: whether there is a gradient step.
        gaps: what measured costs are multiplied with.
        staged: bytes of a patch in the device's own buffers, which chunks are copied to.
        pictures: bytes of pictures that are decoded whole, as many as are open at a time.
    """

    costs: Costs
    now: int
    training: int
    stepping: int
    patch: int
    buffers: int
    host: int
    logits: int
    finishing: int
    images: int
    m: int
    kept: int
    learn: bool
    gaps: float = 1.0
    staged: int = 0
    pictures: int = 0
    predicted: int = 0

    def select(self, chunk: int, images: int) -> int:
        """Bytes of the pass over all patches, while the logits of `images` images are held."""
        return images * self.logits + max(self.gap(self.costs.score(chunk)), self.finishing)

    def second(self, chunk: int, split: int | None) -> int:
        """The pass over the kept patches."""
        spans = parts(self.kept, split) if self.learn else [(0, min(chunk, self.kept))]
        longest = max(stop - start for start, stop in spans)
        embeddings = 2 * 4 * self.kept * self.costs.dim
        pixels = min(HELD_BYTES if self.patch else 0, self.patch * self.kept) + 2 * self.patch * longest
        cost = self.costs.learn if self.learn else self.costs.score
        if self.learn and split is None:
            return pixels + self.gap(cost(longest) + self.costs.pool(self.m))
        return pixels + embeddings + self.gap(max(cost(longest), self.costs.pool(self.m)))

    def gap(self, size: int) -> int:
        return round(self.gaps * size)

    def added(self, chunk: int, split: int | None) -> int:
        """The most that is added to what is taken now."""
        steps = [self.select(chunk, self.images), self.second(chunk, split)]
        if self.learn:
            steps.append(self.stepping)
        learning = self.training + max(steps)
        predicting = self.select(chunk, self.predicted) if self.predicted else 0
        read = self.host + self.pictures + (self.buffers * self.patch + self.staged) * chunk
        return read + max(learning, predicting)

    def peak(self, chunk: int, split: int | None) -> int:
        return self.now + self.added(chunk, split)

    def wanted(self, chunk: int, split: int | None) -> int:
        """The budget that these sizes ask for."""
        return self.now + math.ceil(self.added(chunk, split) * (1 + MARGIN))

    def best(self, budget: int, chunks: Sequence[int]) -> tuple[int, int | None] | None:
        """The best chunk, of `chunks`, and split within a budget; None where none fits."""
        fitting = [(chunk, split) for chunk in chunks for split in self.splits() if self.wanted(chunk, split) <= budget]
        return max(fitting, key=self._rank, default=None)

    def splits(self) -> list[int | None]:
        """All at once, or any power of two from 2 on that is less."""
        if not self.learn or self.kept <= 3:
            return [None]
        return [None, *powers(power_below(self.kept))[1:]]

    def _rank(self, sizes: tuple[int, int | None]) -> tuple[int, int, int]:
        """The larger of the smaller of both is better: neither pass shall starve for the other."""
        chunk, split = sizes
        learned = (split or self.kept) if self.learn else chunk
        return min(chunk, learned), chunk, learned


def powers(most: int) -> list[int]:
    """Return the powers of two up to `most`."""
    return [1 << power for power in range(most.bit_length())]


def power_below(number: int) -> int:
    """The largest power of two that is smaller."""
    return 1 << ((number - 1).bit_length() - 1)
