"""One chunk of the pass without gradients: pixels on the device -> attention logits.

Letters: b image, k patches of a chunk, c channels, h w height and width (after logits: head, query t), d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.engine.encoders import Encoders
from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import CHUNK_PARTS, Plan
from keyhole.engine.random_patches import RandomPatches
from keyhole.loading import Chunk
from keyhole.nn.tensors import AsRead, on_device
from keyhole.util.timing import Timer

T = TypeVar("T")


class ChunkScorer:
    """Scores the chunks of one batch, inside `Encoders.inference`.

    On a CPU, patches of one colour (empty canvas, padding, glass) are encoded once for each colour and image, since
    what an image keeps must not depend, in its last bits, on other images. On a GPU all are encoded, since the host
    does not read its pixels. `color` is that of the batch; `drawn` gets the embeddings of all patches.
    """

    def __init__(
        self,
        encoders: Encoders,
        pace: Pace,
        timer: Timer,
        color: NDArray[np.float32] | None = None,
        drawn: RandomPatches | None = None,
    ) -> None:
        self.encoders, self.pace, self.timer, self.device = encoders, pace, timer, encoders.device
        self.color = None if color is None else on_device(color, self.device)
        self.drawn = drawn
        self._known: dict[tuple[int, bytes], Tensor] = {}

    def score(self, chunk: Chunk, pixels: Tensor, position: Tensor | None) -> Tensor:
        """Return the attention logits (count h t) of a chunk; `pixels` are all rows of its buffer, on the device."""
        image, blank = chunk.image, None
        if self.device.type == "cpu":
            pixels, blank = pixels[: chunk.count], blank_rows(chunk.pixels[: chunk.count])
        else:
            image = np.pad(image, (0, len(pixels) - len(image)))
        color = None if self.color is None else self.color[on_device(image, self.device)]

        def logits(embedding: Tensor, start: int) -> Tensor:
            with self.timer.part("scoring"):
                rows = slice(start, start + len(embedding))
                if self.drawn is not None:
                    self.drawn.take(chunk.image[rows], chunk.index[rows], embedding)
                where = None if position is None else position[rows]
                return self.encoders.logits(embedding, where)

        if blank is not None and blank.any():
            return logits(self._distinct(chunk, pixels, color, blank), 0)
        parts = self.encoded(pixels, chunk.count, color, logits)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def encoded(
        self,
        patches: Tensor | Callable[[int, int], Tensor | AsRead],
        count: int,
        color: Tensor | None = None,
        then: Callable[[Tensor, int], Tensor] | None = None,
    ) -> list[Tensor]:
        """Encode loose patches, as many at a time as the plan says.

        Args:
            patches: on the device, where more than `count` may be encoded; or start, stop -> those of `count`.
            count: the patches to return, from the first on.
            color: affine colour change of each patch.
            then: what to do with the embeddings (k d) of a part, of which the first is that of patch `start`.

        Returns:
            The embeddings of each part, or what `then` makes of them.
        """
        parts: list[Tensor] = []
        start = 0
        while start < count:

            def run(plan: Plan, start: int = start) -> Tensor:
                used = min(plan.chunk, count - start)
                stop = start + used
                if isinstance(patches, Tensor):
                    stop = min(start + rows_to_encode(used, plan.chunk, self.encoders), len(patches))
                part = patches[start:stop] if isinstance(patches, Tensor) else patches(start, stop)
                changes = None if color is None else color[start:stop]
                if self.device.type == "cpu" and isinstance(part, Tensor):
                    part, changes = filled_up(part, changes, plan.chunk)
                whole = rows_to_encode(stop - start, plan.chunk, self.encoders) == plan.chunk
                with self.timer.part("encoding"):
                    embedding = self.encoders.embed(part, changes, plan.chunk if whole else 0)[:used]
                return embedding if then is None else then(embedding, start)

            parts.append(self.pace.run("select", run))
            start += len(parts[-1])
        return parts

    def _distinct(self, chunk: Chunk, pixels: Tensor, color: Tensor | None, blank: NDArray[np.bool_]) -> Tensor:
        """Return the embeddings of a chunk some of whose patches are of one colour."""
        at = blank.nonzero()[0]
        color_of = chunk.pixels[at, 0, 0]
        key = np.concatenate([chunk.image[at, None].view(np.uint8), color_of.view(np.uint8)], axis=1)
        _, firsts, group = np.unique(key.view(f"V{key.shape[1]}")[:, 0], return_index=True, return_inverse=True)
        names = [(int(chunk.image[at[first]]), color_of[first].tobytes()) for first in firsts]
        new = {name: int(at[first]) for name, first in zip(names, firsts, strict=True) if name not in self._known}
        rows = np.sort(np.concatenate([(~blank).nonzero()[0], np.fromiter(new.values(), np.int64)]))
        where = torch.from_numpy(rows)
        parts = self.encoded(pixels[where], len(rows), None if color is None else color[where])
        found = torch.cat(parts) if parts else next(iter(self._known.values())).new_empty(0)
        self._known |= {name: found[int(np.searchsorted(rows, row))].clone() for name, row in new.items()}
        shared = torch.stack([self._known[name] for name in names])
        embedding = shared.new_empty(len(pixels), shared.shape[1])
        if parts:
            embedding[where] = found
        embedding[torch.from_numpy(at)] = shared[torch.from_numpy(group)]
        return embedding


def rows_to_encode(used: int, chunk: int, encoders: Encoders) -> int:
    """Return how many rows of a chunk are encoded, of which only the first are in use.

    On a CPU these are all rows, since the last bits of a patch's result must not depend on the number of others. On a
    GPU a compiled encoder takes the whole chunk if more than half is in use; fewer rows are faster uncompiled. Their
    number is rounded up, so that memory is used again.
    """
    if encoders.device.type == "cpu" or used >= chunk:
        return chunk
    step = max(1, chunk // CHUNK_PARTS)
    rows = min(chunk, -(-used // step) * step)
    return chunk if encoders.compiled and 2 * rows > chunk else rows


def filled_up(pixels: Tensor, color: Tensor | None, chunk: int) -> tuple[Tensor, Tensor | None]:
    """Repeat the last patch, so that chunks have few different numbers of rows; see `filled_rows`."""
    more = filled_rows(len(pixels), chunk) - len(pixels)
    if not more:
        return pixels, color
    whole = torch.cat([pixels, pixels[-1:].expand(more, *pixels.shape[1:])])
    return whole, None if color is None else torch.cat([color, color[-1:].expand(more, *color.shape[1:])])


def filled_rows(count: int, chunk: int) -> int:
    """Return the number of rows that a CPU encodes for so many patches: up to an eighth more, within a chunk.

    Every number of rows has blocks of its own sizes, whose gaps in the heap doubled the memory of a run in which it
    differed from batch to batch.

    >>> [filled_rows(count, 250) for count in (7, 16, 17, 100, 249)]
    [7, 16, 18, 104, 250]
    """
    step = 1 << max(0, (count // 8).bit_length() - 1)
    return max(count, min(chunk, -(-count // step) * step))


def blank_rows(pixels: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Return which of the patches (k h w c) have one colour everywhere; none of features (k f)."""
    if pixels.ndim < 4:
        return np.zeros(len(pixels), np.bool_)
    first = pixels[:, :1, :1]
    blank: NDArray[np.bool_] = (pixels[:, :1] == first).all(axis=(1, 2, 3))  # the first row rules out most others
    rows = blank.nonzero()[0]
    blank[rows] = (pixels[rows] == first[rows]).all(axis=(1, 2, 3))
    return blank


def timed(items: Iterable[T], timer: Timer) -> Iterator[T]:
    """Yield the items; the wait for each counts as reading."""
    iterator = iter(items)
    while True:
        with timer.part("reading"):
            item = next(iterator, None)
        if item is None:
            return
        yield item
