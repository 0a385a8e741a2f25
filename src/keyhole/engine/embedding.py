"""Images -> the embeddings of all their patches, in host memory, one chunk behind the device.

    for part in Embedding(engine)(openers):
        ...                     # the Rows of an image in order, then its End; then the next image

Patches are encoded as in a prediction. The embeddings of a chunk are yielded after the next chunk has been launched, so
that the device is busy while they are written.

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
    _chunk: tuple[Tensor, torch.cuda.Event | None]
    _place: slice

    def embedding(self) -> NDArray[np.float32]:
        """Return the embeddings (k d); waits until the device has copied them. Valid until the next `Rows` come."""
        embedding, copied = self._chunk
        if copied is not None:
            copied.synchronize()
        found: NDArray[np.float32] = embedding.numpy()
        return found[self._place]


@dataclass(frozen=True)
class End:
    """The end of an image: all its patches have been tried.

    Attributes:
        number: of the image in the order of the openers.
        source: its patches, may be closed already; None where the image failed.
        failed: why it failed; it then has no embeddings, or not all.
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
        together: images that share chunks; default is `TOGETHER` on a GPU and 1 on a CPU, where the last bits of an
            embedding depend on how many patches are encoded with it.
        whole: encode all rows of a chunk, also unused ones, so that there is one shape; default on a GPU.
    """

    def __init__(self, engine: Engine, together: int | None = None, whole: bool | None = None) -> None:
        self.engine = engine
        on_cpu = engine.device.type == "cpu"
        self.together = together or (1 if on_cpu else TOGETHER)
        self.whole = not on_cpu if whole is None else whole
        self._buffers: list[Tensor] = []

    def __call__(self, openers: Sequence[Opener]) -> Iterator[Rows | End]:
        """Yield the embeddings and the end of each image, in order.

        Raises:
            ConfigError: out of memory even with the smallest plan, or patches of different shapes.
        """
        waiting: list[Rows | End] = []
        for parts in self._launched(openers):
            if isinstance(parts[-1], Rows):  # another chunk has been launched
                yield from waiting
                waiting = []
            waiting += parts
        yield from waiting

    def _launched(self, openers: Sequence[Opener]) -> Iterator[list[Rows | End]]:
        """Yield the parts of each chunk that has been launched, and the ends at the end of each batch."""
        engine, starts = self.engine, range(0, len(openers), self.together)
        batches = (openers[start : start + self.together] for start in starts)
        scorer = ChunkScorer(engine.encoders, engine.pace, engine.timer)
        for start, batch in zip(starts, engine.stream(batches, "mask", hold=0), strict=True):
            if start == 0:
                self._compile(batch, len(starts))
            current = 0
            for chunk, pixels in prefetched(timed(batch.chunks(), engine.timer), engine.stager, engine.pace):
                used = pixels if self.whole else pixels[: chunk.count]
                on_host = self._to_host(scorer.encoded(used, chunk.count), len(pixels))
                parts: list[Rows | End] = []
                cuts = [0, *(np.flatnonzero(np.diff(chunk.image)) + 1).tolist(), len(chunk.image)]
                for place in (slice(*cut) for cut in pairwise(cuts)):
                    image = int(chunk.image[place.start])
                    parts += [_end(batch, start, each) for each in range(current, image)]
                    source, current = batch.sources[image], image
                    assert source is not None, "a chunk holds patches of an image that failed"
                    parts.append(Rows(start + image, source, chunk.index[place], on_host, place))
                yield parts
            yield [_end(batch, start, each) for each in range(current, len(batch.names))]
            engine.pace.after_pass()

    def _to_host(self, parts: Sequence[Tensor], largest: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """Copy the embeddings of a chunk, each (k d), without waiting; on a GPU into two pinned buffers in turn.

        `largest` is the number of patches of the largest chunk.
        """
        if self.engine.device.type != "cuda":
            return parts[0] if len(parts) == 1 else torch.cat(list(parts)), None
        if not self._buffers:
            width = parts[0].shape[1]
            self._buffers = [torch.empty(largest, width, dtype=torch.float32, pin_memory=True) for _ in range(2)]
        self._buffers.reverse()  # the other one is still to be read
        count = 0
        for part in parts:
            self._buffers[0][count : count + len(part)].copy_(part, non_blocking=True)
            count += len(part)
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self.engine.device))
        return self._buffers[0][:count], copied

    def _compile(self, batch: Batch, batches: int) -> None:
        """Compile the encoder if that pays over all batches, assuming that they are like the first."""
        source = next((source for source in batch.sources if source is not None), None)
        if source is None or self.engine.encoders.compiled:
            return
        choice = self.engine.choose_compile("auto", source.patch_shape, batches * sum(batch.lengths()))
        if choice.compile:
            say(f"encoder compiled: {choice.why}")


def encoder_alone(encoder: nn.Module, dim: int) -> IPSClassifier:
    """Return an encoder, not copied, of embeddings (k `dim`) as a classifier without tasks, with the smallest pool."""
    with torch.random.fork_rng(devices=[]):  # the pool's weights are not used
        pool = CrossAttentionPool(dim, heads=1, head_dim=1, hidden_dim=1)
    return IPSClassifier(encoder, pool, {}).eval().to(next(encoder.parameters()).device)


def _end(batch: Batch, start: int, image: int) -> End:
    batch.settle(image)
    return End(start + image, batch.sources[image], batch.failed.get(image), dict(batch.unreadable.get(image, {})))
