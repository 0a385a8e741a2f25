"""The images of one step: their chunks, their kept patches, and which of them could not be read.

Everything here runs on the consumer's thread. The images are open before the consumer gets the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from keyhole.errors import ImageError, KeyholeError
from keyhole.loading.buffers import Array, PixelCache
from keyhole.loading.chunks import Chunk, FetchOnly, Opener
from keyhole.loading.reading import Planned, Reading
from keyhole.loading.stream import Slot, Stream
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource

MIN_TASK_PATCHES = 8
"""Patches of one task where many threads need tasks, and of kept patches, which share few tiles."""
COPIED_BYTES = 2**22
"""Bytes that a thread copies of an image in memory, or the consumer itself of its kept patches: handing over smaller
parts takes longer than copying them."""


class Batch:
    """The images of one step.

    Attributes:
        names: of all images.
        failed: the error by image; grows during `chunks` and `fetch`. The consumer has to drop patches of a failed
            image that came in earlier chunks.
        unreadable: under "mask", why patches of other images could not be read, by image and patch. Grows during
            `chunks` and `fetch`; an image that fails is removed.
        color: (b c c+1) float32 affine colour change of each image, in both passes; set by the consumer, or None.
        cache: the pixels of all streamed images, if they fit; else None.
        planned: chunks that are being read.
        complete: all chunks have been planned.
    """

    def __init__(self, stream: Stream, openers: Sequence[Opener]) -> None:
        self.names = [opener.name for opener in openers]
        self.failed: dict[int, KeyholeError] = {}
        self.unreadable: dict[int, dict[int, str]] = {}
        self.color: Array | None = None
        self.cache: PixelCache | None = None
        self.slots = [Slot(image, opener) for image, opener in enumerate(openers)]
        self.planned: deque[Planned] = deque()
        self.complete = False
        self.closed = False
        self._stream = stream

    @property
    def sources(self) -> list[PatchSource | None]:
        """The open source of each image, until the consumer asks for the next batch; None where an image failed.

        A file that was lost and is opened again has another source, with the same patches.
        """
        return [None if slot.handle is None else slot.handle.source for slot in self.slots]

    def lengths(self) -> list[int]:
        """Return how many patches of each image are streamed."""
        return [
            0 if slot.handle is None or isinstance(slot.opener, FetchOnly) else len(slot.handle.source)
            for slot in self.slots
        ]

    def chunks(self) -> Iterator[Chunk]:
        """Yield all patches of all images in order, once, without those that could not be read.

        An image of which no patch could be read counts as failed at the end.

        Raises:
            KeyholeError: an image failed and failures are raised.
        """
        stream = self._stream
        while True:
            stream.recycle(keep=1)
            with stream.threads.lock:
                stream.wait_for(lambda: bool(self.planned) or self.complete or self.closed)
                if stream.closed and not self.closed:  # some chunks may not have been planned
                    raise RuntimeError("the stream was closed while it was read from")
                if not self.planned:
                    break
                planned = self.planned.popleft()
            stream.waiting = not planned.finished()
            try:
                self._finish(planned.readings)
            finally:
                stream.waiting = False
            chunk = self._assembled(planned)
            stream.shown.append(chunk)
            stream.reader.read_patches += chunk.count
            stream.reader.encoded_patches += len(chunk.encoded)
            if chunk.count:
                yield chunk
        for image in sorted(self.unreadable):
            self.settle(image)

    def settle(self, image: int) -> None:
        """Count an image as failed if none of its patches could be read. All must have been tried."""
        if (missing := self.unreadable.get(image)) and len(missing) == (length := self.lengths()[image]):
            problem = f"none of its {length} patches can be read ({next(iter(missing.values()))})"
            self.fail(image, ImageError(self.names[image], problem))

    def fetch(self, indices: Sequence[ArrayLike | None], block: Array | None = None) -> list[Array | None]:
        """Return some patches of each image, from the cache or from the file, before what is read ahead.

        Args:
            indices: one (m,) of patches for each image, in any order, with repeats; ignored where an image failed.
            block: (sum of m, *patch_shape) of images that have not failed. The results are parts of it, image by image,
                unless a thread is stuck. Without it each image gets an array of its own.

        Returns:
            (m, *patch_shape) for each image, None where it failed. Rows of patches in `unreadable` are zeros.

        Raises:
            KeyholeError: an image failed and failures are raised.
        """
        if len(indices) != len(self.names):
            raise ValueError(f"{len(indices)} index arrays for {len(self.names)} images")
        if self.closed:
            raise RuntimeError("the batch is closed; fetch before the next batch")
        found, reread = self._fetched(indices, block)
        self._stream.reader.reread_patches += reread
        self._stream.reader.read_patches += sum(len(rows) for rows in found if rows is not None)
        return found

    def _fetched(
        self, indices: Sequence[ArrayLike | None], block: Array | None = None
    ) -> tuple[list[Array | None], int]:
        """Return what `fetch` returns, and how many of the patches were read from files."""
        out: list[Array | None] = [None] * len(indices)
        copied = 0
        parts: list[tuple[int, Index, list[Reading]]] = []  # image, rows that are not in the cache, their readings
        for slot, wanted in zip(self.slots, indices, strict=True):
            if slot.handle is None:
                continue
            index = np.asarray(wanted)
            index = index.astype(np.int64) if index.size else np.empty(0, np.int64)
            if block is None:
                rows = np.empty((len(index), *slot.handle.source.patch_shape), slot.handle.source.dtype)
            else:
                rows, block = block[: len(index)], block[len(index) :]
            out[slot.image] = rows
            cached = np.zeros(len(index), np.bool_)
            if self.cache is not None:
                cached = self.cache.take(slot.image, index, rows)
            absent = np.flatnonzero(~cached)
            into = np.empty((len(absent), *rows.shape[1:]), rows.dtype) if cached.any() else rows
            if slot.handle.source.in_memory and into.nbytes <= COPIED_BYTES:
                slot.handle.read(index[absent], into)
                if into is not rows:
                    rows[absent] = into
                copied += len(absent)
                continue
            runs = [slice(start, start + MIN_TASK_PATCHES) for start in range(0, len(absent), MIN_TASK_PATCHES)]
            tasks = [Reading(self._stream, slot, index[absent[run]], into[run], urgent=True) for run in runs]
            parts.append((slot.image, absent, tasks))
        readings = [reading for *_, part in parts for reading in part]
        self._finish(readings)
        for image, absent, part in parts:
            found = out[image]
            assert found is not None
            if len(absent) < len(found):
                for start, reading in zip(range(0, len(absent), MIN_TASK_PATCHES), part, strict=True):
                    found[absent[start : start + MIN_TASK_PATCHES]] = reading.out
            elif any(reading.spoiled for reading in part):
                out[image] = np.concatenate([reading.out for reading in part])
        for image in self.failed:
            out[image] = None
        return out, copied + sum(len(reading.index) for reading in readings)

    def close(self) -> None:
        """Close the sources and drop the chunks that are still being read."""
        stream = self._stream
        with stream.changing():
            self.closed = True
            written = self.complete and all(planned.finished() for planned in self.planned)
            while self.planned:
                planned = self.planned.popleft()
                stream.give_buffer(planned.buffer if planned.finished() else None)
            if self.cache is not None:
                stream.free_cache(self.cache, written)
                self.cache = None
        for slot in self.slots:
            if slot.handle is not None:
                stream.drop(slot.handle)

    def fail(self, image: int, error: BaseException) -> None:
        """Leave an image out, or raise."""
        if self._stream.on_error == "raise" or not isinstance(error, KeyholeError):
            raise error
        self.failed[image] = error
        self.unreadable.pop(image, None)
        if self.cache is not None:
            self.cache.drop(image)
        slot = self.slots[image]
        handle, slot.handle = slot.handle, None
        if handle is not None:
            self._stream.drop(handle)

    def _assembled(self, planned: Planned) -> Chunk:
        """Make the chunk of readings that are done, without failed images and unreadable patches."""
        readings = [reading for reading in planned.readings if reading.slot.image not in self.failed]
        readable = [~np.isin(reading.index, list(reading.task.value().unreadable)) for reading in readings]
        counts = [int(rows.sum()) for rows in readable]
        count, buffer = sum(counts), planned.buffer
        moved = count < planned.rows or any(reading.spoiled for reading in readings)
        if moved and not planned.finished():
            buffer = self._stream.reader.spare.take(buffer.shape, buffer.dtype)
        image, index = np.empty(count, np.int64), np.empty(count, np.int64)
        chunk = Chunk(buffer, count, image, index)
        start = 0
        for reading, rows, length in zip(readings, readable, counts, strict=True):
            part = slice(start, start + length)
            image[part], index[part] = reading.slot.image, reading.index[rows]
            if moved:
                buffer[part] = reading.out[rows]
            coded = reading.task.value().coded
            if coded:
                patches = enumerate(index[part].tolist(), start)
                chunk.encoded.update((row, coded[patch]) for row, patch in patches if patch in coded)
            if self.cache is not None:
                pixels = reading.index[~np.isin(reading.index, list(coded))] if coded else reading.index
                self.cache.confirm(reading.slot.image, pixels)
            start += length
        if moved:
            buffer[count:] = 0
        if chunk.encoded:
            chunk.decode = self._decode_on_host
        return chunk

    def _decode_on_host(self, chunk: Chunk) -> None:
        """Read as pixels the patches that came as JPEG streams, and remove those that cannot be read."""
        coded = np.isin(np.arange(chunk.count), list(chunk.encoded))
        parts = [coded & (chunk.image == image) for image in range(len(self.names))]
        found, _ = self._fetched([chunk.index[rows] for rows in parts])
        good = ~np.isin(chunk.image, list(self.failed))
        for image, (rows, pixels) in enumerate(zip(parts, found, strict=True)):
            if pixels is not None:
                chunk.pixels[: chunk.count][rows] = pixels
                good &= ~(rows & np.isin(chunk.index, list(self.unreadable.get(image, {}))))
        reader, count = self._stream.reader, int(good.sum())
        reader.read_patches -= chunk.count - count
        reader.encoded_patches -= len(chunk.encoded)
        chunk.pixels[:count] = chunk.pixels[: chunk.count][good]
        chunk.pixels[count:] = 0
        chunk.count, chunk.image, chunk.index, chunk.encoded = count, chunk.image[good], chunk.index[good], {}

    def _finish(self, readings: Sequence[Reading]) -> None:
        """Wait until all patches are read; tasks of an image that has failed may go on."""
        with self._stream.reader.waiting():
            for reading in readings:
                image = reading.slot.image
                if image in self.failed:
                    continue
                error = reading.complete()
                if self._stream.closed:
                    break
                if error is not None:
                    self.fail(image, error)
                elif missing := reading.task.value().unreadable:
                    self.unreadable.setdefault(image, {}).update(missing)
        if readings and self._stream.closed:
            raise RuntimeError("the reader was closed while it was read from")
