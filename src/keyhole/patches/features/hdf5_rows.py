"""Rows of a dataset in HDF5, read from their places in the file by any number of threads at once.

HDF5 lets one thread of a process in at a time, which holds all of them to some 200,000 rows of 2,048 numbers a second.
What is stored as it is, without a filter, need not go through it: HDF5 says where each chunk lies.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from keyhole.patches.features.files import Floats, widen

LARGEST_TABLE = 2**22
"""Chunks whose places are kept, 8 bytes each."""


class StoredRows:
    """The rows of one dataset (n, d) or (1, n, d), of which each lies in the file without a gap.

    Args:
        handle: a descriptor of the file, which is duplicated and closed with this object.
        dataset: open.

    Raises:
        ValueError: some of them are not in the file.
    """

    def __init__(self, handle: int, dataset: Any) -> None:
        self._handle, self._dtype = os.dup(handle), dataset.dtype
        weakref.finalize(self, os.close, self._handle).atexit = False
        *lead, n, self._d = dataset.shape
        self._row = self._d * self._dtype.itemsize
        self._rows = n if dataset.chunks is None else dataset.chunks[-2]  # of a chunk
        if dataset.chunks is None:
            self._places = np.array([dataset.id.get_offset()], np.int64)
            return
        places = self._places = np.full(-(-n // self._rows), -1, np.int64)
        axis, rows = len(lead), self._rows

        def note(chunk: Any) -> None:
            places[chunk.chunk_offset[axis] // rows] = chunk.byte_offset

        dataset.id.chunk_iter(note)
        if places.min() < 0:
            raise ValueError("some of its rows are not in the file")

    def read(self, start: int, stop: int, out: Floats) -> None:
        """Rows `start` to `stop` into `out`.

        Raises:
            EOFError: the file ends before them.
            OSError: the disk or network share does not give them.
        """
        plain = self._dtype == np.float32 and out.flags.c_contiguous
        rows = out if plain else np.empty((stop - start, self._d), self._dtype)
        for place, first, last in self._runs(start, stop):
            part = rows[first - start : last - start].reshape(-1).view(np.uint8).data
            while part:
                count = os.preadv(self._handle, [part], place)
                if count == 0:
                    raise EOFError("the file ends early")
                part, place = part[count:], place + count
        if not plain:
            widen(rows, out)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where rows lie that follow each other in the file too: first byte, first row, the row behind the last."""
        chunks = np.arange(start // self._rows, (stop - 1) // self._rows + 1)
        places = self._places[chunks]
        cuts = np.flatnonzero(np.diff(places) != self._rows * self._row) + 1
        for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), len(chunks)], strict=True):
            begin = int(chunks[low]) * self._rows
            first, last = max(start, begin), min(stop, int(chunks[high - 1] + 1) * self._rows)
            yield int(places[low]) + (first - begin) * self._row, first, last


def stored_rows(file: Any, dataset: Any) -> StoredRows | None:
    """The places of a dataset's rows; None where HDF5 has to be asked for each.

    Args:
        file: open `h5py.File`.
        dataset: its open dataset (n, d) or (1, n, d), with rows.
    """
    plan, dtype = dataset.id.get_create_plist(), dataset.dtype
    chunks = dataset.chunks
    plain = (
        hasattr(os, "preadv")
        and sys.byteorder == "little"
        and dtype.str in ("<f2", "<f4", "<f8")
        and plan.get_nfilters() == 0
        and file.driver == "sec2"
        and file.userblock_size == 0
    )
    if chunks is None:
        plain = plain and dataset.id.get_offset() is not None
    else:
        plain = plain and chunks[-1] == dataset.shape[-1] and hasattr(dataset.id, "chunk_iter")
        plain = plain and dataset.shape[-2] <= LARGEST_TABLE * chunks[-2]
    return StoredRows(file.id.get_vfd_handle(), dataset) if plain else None
