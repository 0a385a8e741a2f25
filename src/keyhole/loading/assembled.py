"""What was read -> a chunk: without images that failed and patches that are unreadable, and knowing what is JPEG."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from keyhole.loading.chunks import Chunk, Coded
from keyhole.loading.readings import Planned, Reading
from keyhole.loading.ring import Array
from keyhole.patches.grid import Index

_NONE = np.empty(0, np.int64)


def assembled(planned: Planned, failed: Container[int], allocate: Callable[[], Array]) -> Chunk:
    """The chunk of readings that are done.

    Args:
        failed: positions of images that are left out.
        allocate: makes another buffer where a stuck thread may still write into that of `planned` one day.
    """
    kept = [reading for reading in planned.readings if reading.position not in failed]
    readable = [reading.readable() for reading in kept]
    index = np.concatenate([_NONE, *(reading.index[rows] for reading, rows in zip(kept, readable, strict=True))])
    counts = [int(rows.sum()) for rows in readable]
    image = np.repeat(np.array([reading.position for reading in kept], np.int64), counts)
    buffer = planned.buffer
    if len(index) < planned.rows or any(reading.spoiled for reading in kept):
        if not planned.finished():
            buffer = allocate()
        row = 0
        for reading, rows, count in zip(kept, readable, counts, strict=True):
            buffer[row : row + count] = reading.out[rows]
            row += count
        buffer[row:] = 0
    return Chunk(buffer, len(index), image, index, _encoded(kept, readable))


def _encoded(readings: Sequence[Reading], readable: Sequence[NDArray[np.bool_]]) -> dict[int, Coded]:
    """What of the `readable` patches of readings came encoded, by row of their chunk."""
    found: dict[int, Coded] = {}
    row = 0
    for reading, rows in zip(readings, readable, strict=True):
        patches = reading.index[rows]
        if coded := reading.task.value().coded:
            found |= {at: coded[patch] for at, patch in enumerate(patches.tolist(), row) if patch in coded}
        row += len(patches)
    return found


def encoded_rows(chunk: Chunk) -> Iterator[tuple[int, Index]]:
    """Positions of images of which patches came encoded, and the rows of these."""
    rows = np.array(sorted(chunk.encoded), np.int64)
    for position in np.unique(chunk.image[rows]).tolist():
        yield position, rows[chunk.image[rows] == position]


def fill_in(chunk: Chunk, pieces: Sequence[tuple[Index, Sequence[Reading]]], failed: Container[int]) -> None:
    """Put pixels in the place of what came encoded, and take out what could not be read.

    Args:
        pieces: rows of one image each, and the readings of their patches, done, in order.
        failed: positions of images that are left out, whether their rows came encoded or not.
    """
    good = np.array([position not in failed for position in chunk.image.tolist()], np.bool_)
    for rows, readings in pieces:
        if good[rows[0]]:
            chunk.pixels[rows] = np.concatenate([reading.out for reading in readings])
            good[rows] = np.concatenate([reading.readable() for reading in readings])
    count = int(good.sum())
    chunk.pixels[:count] = chunk.pixels[: chunk.count][good]
    chunk.pixels[count:] = 0
    chunk.count, chunk.image, chunk.index, chunk.encoded = count, chunk.image[good], chunk.index[good], {}
