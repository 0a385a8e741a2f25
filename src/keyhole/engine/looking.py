"""One chunk of the first pass: pixels on the device -> attention logits, patches of one colour encoded only once.

Letters: b image, k patches of a chunk, c channels, h w height and width (after logits: head, query t), d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import Plan
from keyhole.loading import Chunk
from keyhole.nn import IPSClassifier
from keyhole.util.timing import NO_SHARES, Shares

T = TypeVar("T")

SIZES = 8
"""Numbers of rows in which a chunk that is not full is encoded on a GPU."""


class Looker:
    """Scores the chunks of one batch with the weights of now.

    On a CPU, patches of which all pixels are equal (empty canvas, padding, glass without noise) are encoded once for
    each colour and image: what the encoder makes of them is the same. Not once for a batch: what an image keeps must
    not depend, in its last bits, on which others were looked at before it. On a GPU, where the host should not look at
    pixels, all are encoded, and chunks keep one size, but for the last of a batch; see `rows_to_encode`.

    Args:
        model: inside `IPSClassifier.looking`.
        color: (b c c+1) colour change per image, or None.
        pace: how many patches are encoded at once.
        shares: counts the time.

    Attributes:
        repeated: patches that were not encoded, since an equal one had been.
    """

    def __init__(self, model: IPSClassifier, color: Tensor | None, pace: Pace, shares: Shares = NO_SHARES) -> None:
        self.model, self.pace, self.shares = model, pace, shares
        self.device = next(model.parameters()).device
        self.color = None if color is None else on_device(color.numpy(), self.device)
        self.repeated = 0
        self._known: dict[tuple[int, bytes], Tensor] = {}

    def score(self, chunk: Chunk, pixels: Tensor, position: Tensor | None) -> Tensor:
        """Attention logits (count h t) of a chunk.

        Args:
            chunk: as it came from the reader.
            pixels: all rows of its buffer, on the device.
            position: of its patches (count,) or (count, 2), where the model has a position code.
        """
        if self.device.type != "cpu":
            return self._scored(pixels, self._colors(_padded(chunk.image, len(pixels))), position, chunk.count)
        pixels = pixels[: chunk.count]
        blank = blank_rows(chunk.pixels[: chunk.count])
        if not blank.any():
            return self._scored(pixels, self._colors(chunk.image), position, chunk.count)
        embedding = self._distinct(chunk, pixels, blank)
        with self.shares.part("scoring"):
            return self.model.score_embedding(embedding, position)

    def embeddings(self, pixels: Tensor, count: int) -> list[Tensor]:
        """Embeddings of loose patches one after the other, each (k d), `count` in all: a tensor for each go.

        Args:
            pixels: on the device; rows from `count` on are encoded with the others and left out of what is returned.
            count: rows in use.
        """

        def look(go: slice, rows: int) -> Tensor:
            with self.shares.part("encoding"):
                return self._look(pixels, None, go)[:rows]

        return list(self._goes(pixels, look, count))

    def _distinct(self, chunk: Chunk, pixels: Tensor, blank: NDArray[np.bool_]) -> Tensor:
        """Embeddings of a chunk some of whose patches are of one colour."""
        keys = {int(row): (int(chunk.image[row]), chunk.pixels[row, 0, 0].tobytes()) for row in blank.nonzero()[0]}
        first = {key: row for row, key in reversed(keys.items()) if key not in self._known}
        rows = np.sort(np.concatenate([(~blank).nonzero()[0], np.fromiter(first.values(), np.int64)]))
        self.repeated += len(pixels) - len(rows)
        found = [self._embedded(pixels[torch.from_numpy(rows)], self._colors(chunk.image[rows]))] if len(rows) else []
        place = {int(row): at for at, row in enumerate(rows)}
        self._known |= {key: found[0][place[row]].clone() for key, row in first.items()}
        some = found[0] if found else next(iter(self._known.values()))[None]
        embedding = some.new_empty(len(pixels), some.shape[1])
        if found:
            embedding[torch.from_numpy(rows)] = found[0]
        for row, key in keys.items():
            embedding[row] = self._known[key]
        return embedding

    def _embedded(self, pixels: Tensor, color: Tensor | None) -> Tensor:
        with self.shares.part("encoding"):
            return torch.cat(list(self._goes(pixels, lambda go, _: self._look(pixels, color, go))))

    def _scored(self, pixels: Tensor, color: Tensor | None, position: Tensor | None, count: int) -> Tensor:
        def score(go: slice, rows: int) -> Tensor:
            with self.shares.part("encoding"):
                embedding = self._look(pixels, color, go)
            with self.shares.part("scoring"):
                return self.model.score_embedding(embedding[:rows], _cut(position, slice(go.start, go.start + rows)))

        parts = list(self._goes(pixels, score, count))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _look(self, pixels: Tensor, color: Tensor | None, go: slice) -> Tensor:
        chunk = self.pace.plan.chunk
        rows = rows_to_encode(go.stop - go.start, chunk, self.model)
        return self.model.look(pixels[go], _cut(color, go), chunk if rows == chunk else 0)

    def _goes(self, pixels: Tensor, work: Callable[[slice, int], Tensor], count: int | None = None) -> Iterator[Tensor]:
        """`work` over the pixels, as many at a time as the plan says; of the last `count` rows only are in use."""
        start, count = 0, len(pixels) if count is None else count
        while start < count:

            def run(plan: Plan, start: int = start) -> Tensor:
                rows = min(plan.chunk, count - start)
                stop = min(start + rows_to_encode(rows, plan.chunk, self.model), len(pixels))
                return work(slice(start, stop), rows)

            part = self.pace.run("select", run)
            yield part
            start += len(part)

    def _colors(self, image: NDArray[np.int64]) -> Tensor | None:
        return None if self.color is None else self.color[on_device(image, self.device)]


def rows_to_encode(used: int, chunk: int, model: IPSClassifier) -> int:
    """Rows of a chunk to encode of which only the first are in use.

    On a CPU always all: what comes of a patch must not depend, in its last bits, on how many others there are. On a GPU
    a compiled encoder takes the whole chunk, for which it was compiled, if more than half is in use. Fewer cost less
    uncompiled: that takes about half as long again for each. A second size would take longer to compile than it saves
    in most runs. Numbers of rows are a few, so that memory is used again.
    """
    if next(model.parameters()).device.type == "cpu" or used >= chunk:
        return chunk
    step = max(1, chunk // SIZES)
    rows = min(chunk, -(-used // step) * step)
    return chunk if model.compiled and 2 * rows > chunk else rows


def blank_rows(pixels: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Which of the patches (k h w c) have one colour everywhere; none of features (k f)."""
    if pixels.ndim < 4:
        return np.zeros(len(pixels), np.bool_)
    first = pixels[:, :1, :1]
    blank: NDArray[np.bool_] = (pixels[:, :1] == first).all(axis=(1, 2, 3))  # most show it in their first row
    rows = blank.nonzero()[0]
    blank[rows] = (pixels[rows] == first[rows]).all(axis=(1, 2, 3))
    return blank


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of a small array of the host, which does not wait for what the device is at."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def timed(chunks: Iterable[T], shares: Shares) -> Iterator[T]:
    """Counts as reading what a consumer waits for the next."""
    iterator = iter(chunks)
    while True:
        with shares.part("reading"):
            chunk = next(iterator, None)
        if chunk is None:
            return
        yield chunk


def _cut(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _padded(image: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    return np.pad(image, (0, rows - len(image)))
