"""Images -> the embeddings of all their patches, in host memory, one chunk behind the device.

    for told in Embedding(engine)(openers):
        ...                     # the Rows of an image in order, then its End; then the next image

Patches go the way that they go in a prediction: read ahead, staged, and encoded by the folded copy of the encoder under
the memory plan. The embeddings of a chunk are handed out after the next chunk has been launched, so that the device has
work while they are written. The host waits for nothing on the device but the chunk before.

Letters: k patches, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keyhole.engine.engine import Engine
from keyhole.engine.scoring import ChunkScorer, timed
from keyhole.engine.to_device import prefetched
from keyhole.errors import KeyholeError
from keyhole.loading import Batch, Opener
from keyhole.nn import CrossAttentionPool, IPSClassifier
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource
from keyhole.util.progress import say

TOGETHER = 16
"""Images that share chunks on a GPU, where a chunk of a few patches takes as long as a full one."""


@dataclass(frozen=True)
class Rows:
    """Embeddings of some patches of an image.

    Attributes:
        number: of the image in the order of the openers.
        source: its patches; may be closed already.
        index: of the patches, (k,).
    """

    number: int
    source: PatchSource
    index: Index
    _chunk: _OnHost
    _place: slice

    def embedding(self) -> NDArray[np.float32]:
        """Return the embeddings (k d); waits until the device has copied them. Valid until the next `Rows` come."""
        return self._chunk.array()[self._place]


@dataclass(frozen=True)
class End:
    """There are no more patches of an image.

    Attributes:
        number: of the image in the order of the openers.
        source: its patches, may be closed already; None where the image failed.
        failed: why it has no embeddings, or not all that can be read.
        unreadable: reason by index of the patches that have no embedding.
    """

    number: int
    source: PatchSource | None
    failed: KeyholeError | None
    unreadable: Mapping[int, str]


class Embedding:
    """Encodes all patches of images.

    Args:
        engine: of a model as `encoder_alone` makes it.
        together: images that share chunks. Default is `TOGETHER` on a GPU. On a CPU it is 1: there the last bits of an
            embedding depend on how many patches are encoded with it, and should not depend on the other images.
        whole: encode all rows of a chunk, also those not in use, so that there is one shape. Default on a GPU.
    """

    def __init__(self, engine: Engine, together: int | None = None, whole: bool | None = None) -> None:
        self.engine = engine
        on_cpu = engine.device.type == "cpu"
        self.together = together or (1 if on_cpu else TOGETHER)
        self.whole = not on_cpu if whole is None else whole
        self._results = _Results(engine.device)

    def __call__(self, openers: Sequence[Opener]) -> Iterator[Rows | End]:
        """What becomes of each image, in order.

        Raises:
            ConfigError: out of memory even with the smallest plan, or patches of different shapes.
        """
        waiting: list[Rows | End] = []
        for told in self._launched(openers):
            if isinstance(told[-1], Rows):  # another chunk has been launched
                yield from waiting
                waiting = []
            waiting += told
        yield from waiting

    def _launched(self, openers: Sequence[Opener]) -> Iterator[list[Rows | End]]:
        """What is to be told of each chunk that has been launched, and at the end of each batch."""
        engine, starts = self.engine, range(0, len(openers), self.together)
        batches = (openers[start : start + self.together] for start in starts)
        scorer = ChunkScorer(engine.encoders, engine.pace, engine.timer)
        for start, batch in zip(starts, engine.stream(batches, "mask", hold=0), strict=True):
            if start == 0:
                self._compile(batch, len(starts))
            current = 0
            for chunk, pixels in prefetched(timed(batch.chunks(), engine.timer), engine.stager, engine.pace):
                used = pixels if self.whole else pixels[: chunk.count]
                on_host = self._results.take(scorer.embeddings(used, chunk.count), len(pixels))
                told: list[Rows | End] = []
                for position, place in _runs(chunk.image):
                    told += [_end(batch, start, each) for each in range(current, position)]
                    source, current = batch.sources[position], position
                    assert source is not None, "a chunk holds patches of an image that failed"
                    told.append(Rows(start + position, source, chunk.index[place], on_host, place))
                yield told
            yield [_end(batch, start, each) for each in range(current, len(batch.names))]

    def _compile(self, batch: Batch, batches: int) -> None:
        """Compile the encoder where that pays back over all batches, if they are like the first."""
        source = next((source for source in batch.sources if source is not None), None)
        if source is None or self.engine.encoders.compiled:
            return
        choice = self.engine.choose_compile("auto", source.patch_shape, batches * sum(batch.lengths()))
        if choice.compile:
            say(f"encoder compiled: {choice.why}")


def encoder_alone(encoder: nn.Module, dim: int) -> IPSClassifier:
    """An encoder as a classifier of no task with the smallest pool, so that it is planned, compiled and run as one.

    Args:
        encoder: on its device; it is not copied.
        dim: d of its embeddings.
    """
    with torch.random.fork_rng(devices=[]):  # the pool's weights are of no use, and a caller's random state not ours
        pool = CrossAttentionPool(dim, heads=1, head_dim=1, hidden_dim=1)
    return IPSClassifier(encoder, pool, {}).eval().to(next(encoder.parameters()).device)


class _OnHost:
    """Embeddings of a chunk on their way to the host."""

    def __init__(self, embedding: Tensor, done: torch.cuda.Event | None) -> None:
        self._embedding, self._done = embedding, done

    def array(self) -> NDArray[np.float32]:
        """Return them (k d), once the copy is done."""
        if self._done is not None:
            self._done.synchronize()
        found: NDArray[np.float32] = self._embedding.numpy()
        return found


class _Results:
    """Copies embeddings to the host without waiting; on a GPU into two pinned buffers in turn."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []

    def take(self, parts: Sequence[Tensor], most: int) -> _OnHost:
        """Embeddings of a chunk.

        Args:
            parts: one after the other, each (k d).
            most: patches of the largest chunk.
        """
        if self.device.type != "cuda":
            return _OnHost(parts[0] if len(parts) == 1 else torch.cat(list(parts)), None)
        if not self._buffers:
            width = parts[0].shape[1]
            self._buffers = [torch.empty(most, width, dtype=torch.float32, pin_memory=True) for _ in range(2)]
        self._buffers.reverse()  # the other one is still to be read
        count = 0
        for part in parts:
            self._buffers[0][count : count + len(part)].copy_(part, non_blocking=True)
            count += len(part)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        return _OnHost(self._buffers[0][:count], done)


def _runs(image: Index) -> Iterator[tuple[int, slice]]:
    """The images of a chunk with their rows, in order."""
    cuts = [0, *(np.flatnonzero(np.diff(image)) + 1).tolist(), len(image)]
    for first, last in pairwise(cuts):
        yield int(image[first]), slice(first, last)


def _end(batch: Batch, start: int, position: int) -> End:
    """The end of an image of which all patches have been tried."""
    batch.settle(position)
    missing = dict(batch.unreadable.get(position, {}))
    return End(start + position, batch.sources[position], batch.failed.get(position), missing)
