"""What reading ahead is asked for and gives: openers, chunks, and how chunks are cut."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from keyhole.loading.ring import Array, Copied
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource, View


class Opener(Protocol):
    """A patch source that is yet to be opened."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def __call__(self) -> PatchSource: ...


@dataclass(frozen=True)
class FetchOnly:
    """An opener of an image of which the wanted patches are known: it is opened, but its patches are not streamed.

    `Batch.fetch` reads from it as from any other, and `Batch.chunks` does not show it.
    """

    opener: Opener
    fetch_only: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.opener.name

    def __call__(self) -> PatchSource:
        return self.opener()


@dataclass(frozen=True)
class Delivery:
    """Which patches come as the bytes of a JPEG instead of pixels, for a device that decodes them.

    Attributes:
        colors: kinds of JPEG that the device decodes, of "grey", "rgb" and "ycbcr"; see `FilePatches.encoded`. Empty,
            and then false, where none comes encoded.
        always: all that can be; else only those that a thread gets to while the consumer waits for pixels, of whichever
            chunk. So host threads decode what they can in time and the device the rest: tiles that nobody decodes fill
            the ring at once, the consumer does not wait any more, and the threads decode again.
            Which patches these are differs from run to run, and decoders differ in the last bit.
    """

    colors: Container[str]
    always: bool = False


class Coded(NamedTuple):
    """A patch as JPEG, and how it is to be turned when it has been decoded."""

    data: bytes
    view: View


@dataclass
class Chunk:
    """Patches of the images of one batch, packed to one constant size.

    Attributes:
        pixels: (chunk, *patch_shape); rows from `count` on are zeros. Valid until the next chunk is asked for; not
            overwritten before the one after that is, and not before `copied` has returned.
        count: rows in use; less than the size in the last chunk of a batch and where patches or images were
            unreadable.
        image: position in the batch, int64 (count,).
        index: patch index in that image's source, int64 (count,).
        encoded: rows whose pixels mean nothing because they came as JPEG; empty unless `Delivery` asks for it.
        copied: put here by who copies the pixels to a device: returns when that is done. Called on another thread.
        again: reads the rows of `encoded` as pixels; None where there are none.
    """

    pixels: Array
    count: int
    image: Index
    index: Index
    encoded: dict[int, Coded] = field(default_factory=dict)
    copied: Copied | None = None
    again: Callable[[Chunk], None] | None = None

    def decode_on_host(self) -> None:
        """Read the rows of `encoded` from their files instead, with all that belongs to reading.

        Rows that turn out to be unreadable go, and all of images that fail: `count`, `image` and `index` change.

        Raises:
            KeyholeError: an image failed and failures are raised.
        """
        if self.encoded and self.again is not None:
            self.again(self)

    def part(self, start: int, stop: int) -> Chunk:
        """Rows `start` to `stop` of the buffer, which stays the same memory, as a chunk of its own."""
        used = slice(start, max(start, min(stop, self.count)))
        encoded = {row - start: coded for row, coded in self.encoded.items() if start <= row < stop}
        count = used.stop - used.start
        return Chunk(self.pixels[start:stop], count, self.image[used], self.index[used], encoded, None, self.again)


ALONE = 16
"""Chunks from which an image shares none with others: it costs at most a 16th more, and makes its chunks, and with them
the last bits of what is computed, independent of the other images of the batch."""


def is_alone(length: int, chunk: int) -> bool:
    """Whether an image of so many patches shares no chunk with another."""
    return length >= ALONE * chunk


def pack(lengths: Sequence[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts sequences of patches, one after the other, into chunks: lists of (which, start, stop)."""
    segments: list[tuple[int, int, int]] = []
    room = chunk
    for position, length in enumerate(lengths):
        start = 0
        if segments and (is_alone(length, chunk) or is_alone(lengths[segments[-1][0]], chunk)):
            yield segments
            segments, room = [], chunk
        while start < length:
            count = min(room, length - start)
            segments.append((position, start, start + count))
            start, room = start + count, room - count
            if room == 0:
                yield segments
                segments, room = [], chunk
    if segments:
        yield segments
