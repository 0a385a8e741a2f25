"""The input and output of a stream: openers of images and chunks of patches; and how chunks are cut."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from keyhole.loading.buffers import Array, Copied
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource, View

MIN_CHUNKS_ALONE = 16
"""Chunks from which on an image shares none with others, so that its results do not depend on theirs in any bit."""


class Opener(Protocol):
    """Opens the patch source of one image when called. `name` is for messages.

    It may have an attribute `at_hand`, which is true if opening reads no file.
    """

    @property
    def name(self) -> str: ...

    def __call__(self) -> PatchSource: ...


def at_hand(opener: Opener) -> bool:
    """Return whether opening an image reads no file."""
    return bool(getattr(opener, "at_hand", False))


@dataclass(frozen=True)
class FetchOnly:
    """Opens an image for `Batch.fetch`, whose patches `Batch.chunks` does not yield."""

    opener: Opener

    @property
    def name(self) -> str:
        return self.opener.name

    @property
    def at_hand(self) -> bool:
        return at_hand(self.opener)

    def __call__(self) -> PatchSource:
        return self.opener()


@dataclass(frozen=True)
class Shuffled:
    """Opens an image whose patches come in a random order: the same order for equal seeds and as many patches."""

    opener: Opener
    seed: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.opener.name

    @property
    def at_hand(self) -> bool:
        return at_hand(self.opener)

    def __call__(self) -> PatchSource:
        return self.opener()

    def order(self, count: int) -> Index:
        """Return the indices of `count` patches in the order in which they come."""
        return np.random.default_rng([*self.seed, count]).permutation(count)


@dataclass(frozen=True)
class Delivery:
    """Lets patches come as JPEG streams instead of pixels, for a device that decodes the kinds `colors`.

    A thread takes them as streams while the consumer waits for pixels, which differs from run to run; or `always`.
    """

    colors: Container[str]
    always: bool = False


class Coded(NamedTuple):
    """A patch as a JPEG stream, and how it has to be turned after decoding."""

    data: bytes
    view: View


@dataclass
class Chunk:
    """Patches of the images of one batch, packed to one constant size.

    Attributes:
        pixels: (chunk, *patch_shape); rows from `count` on are zeros. Valid until the consumer asks for the next chunk;
            overwritten after it asks for the one after that, and after `copied` has returned.
        count: rows in use; fewer than the size in the last chunk of a batch and where something was unreadable.
        image: index of the image in the batch, int64 (count,).
        index: index of the patch in the image, int64 (count,).
        encoded: JPEG streams by row, where `Delivery` asks for them; `pixels` of these rows are undefined.
        copied: set by a consumer that copies the pixels to a device; returns when that is done, called on another
            thread.
        decode: reads the rows of `encoded` as pixels; None where there are none.
    """

    pixels: Array
    count: int
    image: Index
    index: Index
    encoded: dict[int, Coded] = field(default_factory=dict)
    copied: Copied | None = None
    decode: Callable[[Chunk], None] | None = None

    def decode_on_host(self) -> None:
        """Read the rows of `encoded` as pixels from their files, with retries.

        Rows that turn out to be unreadable, and all of images that fail, are removed from this chunk.
        """
        if self.encoded and self.decode is not None:
            self.decode(self)

    def part(self, start: int, stop: int) -> Chunk:
        """Return rows `start` to `stop` as a chunk that shares the memory."""
        used = slice(start, max(start, min(stop, self.count)))
        encoded = {row - start: coded for row, coded in self.encoded.items() if start <= row < stop}
        count = used.stop - used.start
        return Chunk(self.pixels[start:stop], count, self.image[used], self.index[used], encoded, None, self.decode)


class Segment(NamedTuple):
    """Consecutive patches of one image in a chunk."""

    image: int
    start: int
    stop: int


def is_alone(length: int, chunk: int) -> bool:
    """Return whether an image of `length` patches shares no chunk with another image."""
    return length >= MIN_CHUNKS_ALONE * chunk


def pack(lengths: Sequence[int], chunk: int) -> Iterator[list[Segment]]:
    """Cut the patches of images, one image after the other, into chunks."""
    segments: list[Segment] = []
    room = 0
    for image, length in enumerate(lengths):
        if segments and (is_alone(length, chunk) or is_alone(lengths[segments[-1].image], chunk)):
            room = 0
        start = 0
        while start < length:
            if room == 0:
                if segments:
                    yield segments
                segments, room = [], chunk
            stop = min(start + room, length)
            segments.append(Segment(image, start, stop))
            start, room = stop, room - (stop - start)
    if segments:
        yield segments
