"""Stored features in HDF5: datasets `features` (n, d) or (1, n, d) and `coords` (n, 2), as CLAM and TRIDENT write them.

STAMP calls the first `feats`, and writes `coords` in microns. HDF5 returns zeros for rows that were never written; here
they are an error. Only one thread of a process at a time can be inside HDF5, so threads that stream rows stored without
a filter read them from their places in the file, 1.5 to 3 times as fast.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from keyhole.errors import ImageError
from keyhole.patches.features.files import (
    ATTRIBUTES,
    NAMES,
    STAMP,
    FeatureFile,
    Floats,
    check_coords_shape,
    checked_coords,
    feature_faults,
    origin_of,
    widen,
)
from keyhole.util.threads import end_reading_first
from keyhole.util.wording import listed

MAX_ROW_BYTES = 2**26
"""Decoded bytes of the compressed chunks that hold one row, since a read decodes and keeps all of them."""
MIN_STREAMED_ROWS = 16
"""Consecutive rows in one read from which finding the places of all rows pays."""
INDEX_CACHE_BYTES = 2**20
"""Bytes per open file for HDF5's index, which is long if every row is a chunk of its own."""
MAX_PLACES = 2**22
"""Chunks whose places are kept, 8 bytes each."""


class Hdf5Features(FeatureFile):
    suffixes: ClassVar[tuple[str, ...]] = (".h5", ".hdf5")

    def __init__(self, path: Path) -> None:
        import h5py

        end_reading_first()
        self.path = path
        self._lock, self._closed = threading.Lock(), False
        with feature_faults(path, "not an HDF5 file, or damaged"):
            # Without locks, which many network shares refuse; nothing is written.
            self._file = h5py.File(path, "r", locking=False, rdcc_nbytes=0)
        try:
            with feature_faults(path, "damaged"):
                config = self._file.id.get_mdc_config()
                config.set_initial_size, config.initial_size = True, min(config.initial_size, INDEX_CACHE_BYTES)
                config.min_size = min(config.min_size, INDEX_CACHE_BYTES)
                config.max_size = INDEX_CACHE_BYTES
                self._file.id.set_mdc_config(config)
                name = "feats" if "features" not in self._file and "feats" in self._file else "features"
                features = self._dataset(name, "f")
                *lead, self.n, self.d = features.shape
                self._lead = tuple(slice(0, 1) for _ in lead)
                self._features = features
                self._places: StoredRows | Literal[False] | None = None  # None until they are needed
                self.coords, self.coords_um, stated = None, None, self._file.attrs
                if "coords" in self._file and name == "features":
                    self.coords = checked_coords(path, self._stored_coords(), self.n)
                elif "coords" in self._file and ("tile_size_um" in stated or stated.get("unit") in ("um", b"um")):
                    # Before version 2, STAMP wrote pixels of a resolution that it does not state.
                    self.coords_um = np.asarray(self._stored_coords(), np.float32)
                    if not np.isfinite(self.coords_um).all():
                        raise ImageError(path, "coords hold NaN or infinity, expected microns. Extract them again.")
                self.attributes = self._attributes((*ATTRIBUTES, *STAMP))
                self.origin = origin_of(self._attributes((*NAMES, *STAMP)))
        except BaseException:
            self._file.close()
            raise

    def _dataset(self, name: str, kind: str) -> Any:
        """Return the dataset `name` of numbers of a `kind`, opened with a cache for the chunks of one row."""
        import h5py

        if isinstance(self._file.get(name, getlink=True), h5py.ExternalLink):
            raise ImageError(self.path, f"`{name}` is a link to another file. Copy the features into this one.")
        found = self._file.get(name)
        if not isinstance(found, h5py.Dataset):
            there = listed((repr(key)[:40] for key in self._file), 8) or "nothing"
            what = "expected features (n, d) and coords (n, 2)"
            raise ImageError(self.path, f"no dataset `{name}`, {what}; there is {there}.")
        shape, dtype = found.shape, found.dtype
        if shape is None or not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)) or not shape[-1]:
            raise ImageError(self.path, f"`{name}` is of shape {shape}, expected (n, width) or (1, n, width).")
        if dtype.kind not in kind:
            numbers = "floating-point numbers" if kind == "f" else "numbers"
            raise ImageError(self.path, f"`{name}` is of type {dtype}, expected {numbers}.")
        if shape[-2] == 0:
            raise ImageError(self.path, f"`{name}` has no rows: no patch of this slide has a feature.")
        _check_stored(self.path, name, found)
        if found.chunks is None:
            return found
        *_, rows, width = found.chunks
        chunk, row = rows * width * dtype.itemsize, rows * -(-shape[-1] // width) * width * dtype.itemsize
        filtered = found.id.get_create_plist().get_nfilters() > 0
        if filtered and row > MAX_ROW_BYTES:
            most = f"{row / 1e6:.0f} MB have to be decoded for one row, at most {MAX_ROW_BYTES / 1e6:.0f} MB are"
            advice = "Store it again in chunks of fewer rows, for example by h5repack."
            raise ImageError(self.path, f"`{name}` is compressed in chunks of which {most}. {advice}")
        del found  # while it is open, HDF5 would go on with its cache
        access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
        # By the third number the least used goes first; at 1.0 (HDF5 2.0) the limit is not kept.
        access.set_chunk_cache(521, row + chunk if filtered else 0, 0.0)
        return h5py.Dataset(h5py.h5d.open(self._file.id, name.encode(), access))

    def _stored_coords(self) -> Any:
        dataset = self._dataset("coords", "iuf")
        check_coords_shape(self.path, dataset.shape[-2:], self.n)
        return dataset[0] if dataset.ndim == 3 else dataset[()]

    def _attributes(self, names: Sequence[str]) -> dict[str, Any]:
        """Return these attributes of `coords`, else of `features`, else of the file. Others may be unreadable."""
        read = self.coords is not None or self.coords_um is not None
        places = [self._file, self._features, *([self._file["coords"]] if read else [])]
        return {name: place.attrs[name] for place in places for name in names if name in place.attrs}

    def _read(self, start: int, stop: int, out: Floats) -> None:
        with self._lock:
            if self._closed:  # asking h5py would wait for its lock
                raise RuntimeError(f"{self.path} is closed")
            if self._places is None and stop - start >= MIN_STREAMED_ROWS:
                self._places = StoredRows.of(self._file, self._features) or False
            places = self._places
            if not places:
                rows = self._features[(*self._lead, slice(start, stop))]
        if places:
            places.read(start, stop, out)
        else:
            widen(rows[0] if self._lead else rows, out)

    def close(self) -> None:
        with self._lock:
            self._closed, self._places = True, False
            self._file.close()


def _check_stored(path: Path, name: str, dataset: Any) -> None:
    """Refuse a dataset that was not written completely, since HDF5 would return zeros for the rest."""
    if dataset.is_virtual or dataset.external:
        raise ImageError(path, f"`{name}` is in other files. Copy the features into this one.")
    plan = dataset.id.get_create_plist()
    if dataset.chunks is not None and plan.get_nfilters():
        there = dataset.id.get_num_chunks()
        wanted = int(np.prod([-(-side // chunk) for side, chunk in zip(dataset.shape, dataset.chunks, strict=True)]))
        unit = "compressed chunks"
    else:
        there, wanted, unit = dataset.id.get_storage_size(), dataset.size * dataset.dtype.itemsize, "bytes"
    if there < wanted:
        problem = f"`{name}` of shape {dataset.shape} is not all there: {there} of {wanted} {unit}."
        raise ImageError(path, f"{problem} The file was not completed; extract the features of this slide again.")


class StoredRows:
    """The rows of one open dataset, each of which is contiguous in the file. Thread-safe."""

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
        dataset.id.chunk_iter(lambda chunk: places.__setitem__(chunk.chunk_offset[axis] // rows, chunk.byte_offset))
        if places.min() < 0:
            raise ValueError("some of its rows are not in the file")

    @classmethod
    def of(cls, file: Any, dataset: Any) -> StoredRows | None:
        """Find the places of the rows of an open dataset; None if only HDF5 can read them."""
        chunks, plain = dataset.chunks, hasattr(os, "preadv") and sys.byteorder == "little"
        plain = plain and dataset.dtype.str in ("<f2", "<f4", "<f8") and file.driver == "sec2"
        plain = plain and file.userblock_size == 0 and dataset.id.get_create_plist().get_nfilters() == 0
        if chunks is None:
            plain = plain and dataset.id.get_offset() is not None
        else:
            plain = plain and chunks[-1] == dataset.shape[-1] and hasattr(dataset.id, "chunk_iter")
            plain = plain and dataset.shape[-2] <= MAX_PLACES * chunks[-2]
        return cls(file.id.get_vfd_handle(), dataset) if plain else None

    def read(self, start: int, stop: int, out: Floats) -> None:
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
        """Yield runs of rows that are consecutive in the file too: first byte, first row, the row after the last."""
        chunks = np.arange(start // self._rows, (stop - 1) // self._rows + 1)
        places = self._places[chunks]
        cuts = np.flatnonzero(np.diff(places) != self._rows * self._row) + 1
        for low, high in zip([0, *cuts.tolist()], [*cuts.tolist(), len(chunks)], strict=True):
            begin = int(chunks[low]) * self._rows
            first, last = max(start, begin), min(stop, int(chunks[high - 1] + 1) * self._rows)
            yield int(places[low]) + (first - begin) * self._row, first, last
