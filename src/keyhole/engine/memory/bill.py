"""Adds up the bytes of every part of a run for given sizes of chunk and split, and finds the best that fit.

Letters: b image, m kept, d width, n patches of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keyhole.engine.memory.probe import PassBytes, Workload
from keyhole.engine.split import parts

MAX_HELD_BYTES = 2**28
"""Bytes of kept pixels of a batch that stay in host memory; beyond that they are read again, a part at a time."""
MARGIN = 0.1
"""Share of a plan's bytes that it leaves free, since predictions are not exact."""
BUFFERS, DECODED, TURNED = 2, 3, 1
"""Copies of a chunk as read on a GPU: two buffers; if it decodes JPEG, the decoder's output, the same in one tensor and
that of the previous chunk; one more if decoded patches are turned."""
STAGED_FEATURES = 3
"""The same for stored features: two buffers, of half the size for float16, which then has two copies in float32."""
SORTING_BYTES = 32
"""Bytes of a patch, in addition to its logits, while an image is ranked."""


@dataclass(frozen=True)
class Bill:
    """Bytes of a run."""

    work: Workload  # what is planned for
    costs: PassBytes  # of the two passes, measured
    cpu: bool  # computed on a CPU, whose memory then counts
    now: int  # taken before the first step
    training: int  # gradients and AdamW's two moments, unless they are there already
    stepping: int  # what the optimizer needs while it steps
    scores: int  # numbers that a patch has in the logits, heads x queries
    tiles: int = 0  # decoded tiles that are kept for later patches
    gaps: float = 1.0  # factor on measured costs, for gaps in malloc's heap

    @property
    def kept(self) -> int:
        return self.work.batch_size * self.work.kept

    @property
    def host(self) -> int:
        return self.work.host_buffers + self.tiles if self.cpu else 0

    def read(self, chunk: int) -> int:
        """Return the bytes of chunks as read: the ring of read-ahead on a CPU, buffers and copies on a GPU."""
        work = self.work
        if self.cpu:
            copies = work.ahead + 2
        elif not work.pixels:
            copies = STAGED_FEATURES
        else:
            copies = BUFFERS + (DECODED + (TURNED if work.turned else 0) if work.jpeg else 0)
        return copies * work.patch_bytes * chunk

    def select(self, chunk: int, images: int) -> int:
        """Return the bytes of the pass over all patches, which holds the logits of `images` images."""
        logits = 4 * self.scores * self.work.largest_bag
        ordering = logits + SORTING_BYTES * self.work.largest_bag
        return images * logits + max(self._gap(self.costs.score(chunk)), ordering)

    def learn(self, chunk: int, split: int | None) -> int:
        learn, costs, patch = self.work.learn, self.costs, self.work.patch_bytes if self.cpu else 0
        spans = parts(self.kept, split) if learn else [(0, min(chunk, self.kept))]
        longest = max(stop - start for start, stop in spans)
        embeddings = 2 * 4 * self.kept * costs.dim
        pixels = min(MAX_HELD_BYTES if patch else 0, patch * self.kept) + 2 * patch * longest
        encoding, pooling = (costs.learn if learn else costs.score)(longest), costs.pool(self.work.kept)
        if learn and split is None:
            return pixels + self._gap(encoding + pooling)
        return pixels + embeddings + self._gap(max(encoding, pooling))

    def added(self, chunk: int, split: int | None) -> int:
        work = self.work
        drawn = 4 * self.kept * self.costs.dim if work.learn else 0  # embeddings of random patches, in validation
        steps = [drawn + self.select(chunk, 1 if work.learn else work.batch_size), self.learn(chunk, split)]
        if work.learn:
            steps.append(self.stepping)
        predicting = self.select(chunk, work.batch_size) if work.predicts else 0
        pictures = work.open_pictures if self.cpu else 0
        return self.host + pictures + self.read(chunk) + max(self.training + max(steps), predicting)

    def peak(self, chunk: int, split: int | None) -> int:
        return self.now + self.added(chunk, split)

    def wanted(self, chunk: int, split: int | None) -> int:
        """Return the budget that these sizes need."""
        return self.now + math.ceil(self.added(chunk, split) * (1 + MARGIN))

    def best(self, budget: int, chunks: Sequence[int]) -> tuple[int, int | None] | None:
        """Return the best chunk, of `chunks`, and split within a budget; None where none fits."""
        fitting = [(chunk, split) for chunk in chunks for split in self.splits() if self.wanted(chunk, split) <= budget]

        def rank(sizes: tuple[int, int | None]) -> tuple[int, int, int]:
            chunk, split = sizes
            learned = (split or self.kept) if self.work.learn else chunk
            return min(chunk, learned), chunk, learned  # neither pass gets little so that the other gets much

        return max(fitting, key=rank, default=None)

    def splits(self) -> list[int | None]:
        """Return all sizes of a split: None for all patches at once, and the powers of two from 2 on."""
        if not self.work.learn or self.kept <= 3:
            return [None]
        return [None, *powers(power_below(self.kept))[1:]]

    def _gap(self, size: int) -> int:
        return round(self.gaps * size)


def powers(most: int) -> list[int]:
    """Return the powers of two up to `most`."""
    return [1 << power for power in range(most.bit_length())]


def power_below(number: int) -> int:
    """Return the largest power of two that is smaller than `number`."""
    return 1 << ((number - 1).bit_length() - 1)
