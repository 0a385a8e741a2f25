"""Stored features in HDF5: datasets `features` (n, d) or (1, n, d) and `coords` (n, 2), as CLAM and TRIDENT write them.

STAMP calls the first `feats`, and writes `coords` in microns.

HDF5 reads what was never written as zeros, and by default keeps up to 33 MB for each open file; both are seen to here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keyhole.errors import ImageError
from keyhole.patches.features.files import (
    ATTRIBUTES,
    Coordinates,
    FeatureFile,
    Floats,
    check_coords_shape,
    checked_coords,
    feature_faults,
    widen,
)
from keyhole.patches.features.hdf5_rows import StoredRows, stored_rows
from keyhole.patches.features.origin import NAMES, STAMP, origin_of
from keyhole.util.threads import end_reading_first
from keyhole.util.wording import listed

LARGEST_CHUNKS = 2**26
"""Bytes of the compressed chunks that one row lies in, decoded: what a file decides that a read takes, and keeps."""
LONG_RUN = 16
"""Consecutive rows in one read from which finding the places of all rows pays: streaming a file reads such runs."""
INDEX_CACHE = 2**20
"""Bytes per open file for HDF5's index, which is long where every row is a chunk of its own."""


class Hdf5Features(FeatureFile):
    """Features in HDF5. Rows that a writer has declared but not written are an error, not zeros.

    HDF5 lets one thread in at a time, in the whole process; rows that are stored as they are do not go through it.
    """

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
                config.set_initial_size, config.initial_size = True, min(config.initial_size, INDEX_CACHE)
                config.min_size = min(config.min_size, INDEX_CACHE)
                config.max_size = INDEX_CACHE
                self._file.id.set_mdc_config(config)
                name = "feats" if "features" not in self._file and "feats" in self._file else "features"
                features = self._dataset(name, "f")
                *lead, self.n, self.d = features.shape
                self._lead = tuple(slice(0, 1) for _ in lead)
                self._features = features
                self._places: StoredRows | Literal[False] | None = None  # not asked for yet
                self.coords = self._coords() if "coords" in self._file and name == "features" else None
                self.coords_um = self._coords_um() if "coords" in self._file and name == "feats" else None
                self.attributes = self._attributes((*ATTRIBUTES, *STAMP))
                self.origin = origin_of(self._attributes((*NAMES, *STAMP)))
        except BaseException:
            self._file.close()
            raise

    def _dataset(self, name: str, kind: str) -> Any:
        """The dataset `name` of numbers of a `kind`, opened with a cache for the chunks of one row."""
        import h5py

        if isinstance(self._file.get(name, getlink=True), h5py.ExternalLink):
            raise ImageError(self.path, f"`{name}` is a link to another file. Copy the features into this one.")
        found = self._file.get(name)
        if not isinstance(found, h5py.Dataset):
            there = listed((repr(key)[:40] for key in self._file), 8) or "nothing"
            raise ImageError(
                self.path, f"no dataset `{name}`, expected features (n, d) and coords (n, 2); there is {there}."
            )
        shape, dtype = found.shape, found.dtype
        if shape is None or not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)) or not shape[-1]:
            raise ImageError(self.path, f"`{name}` is of shape {shape}, expected (n, width) or (1, n, width).")
        if dtype.kind not in kind:
            raise ImageError(self.path, f"`{name}` is of type {dtype}, expected {_KINDS[kind]}.")
        if shape[-2] == 0:
            raise ImageError(self.path, f"`{name}` has no rows: no patch of this slide has a feature.")
        _check_stored(self.path, name, found)
        if found.chunks is None:
            return found
        *_, rows, width = found.chunks
        chunk, row = rows * width * dtype.itemsize, rows * -(-shape[-1] // width) * width * dtype.itemsize
        filtered = found.id.get_create_plist().get_nfilters() > 0
        if filtered and row > LARGEST_CHUNKS:
            raise ImageError(
                self.path,
                f"`{name}` is compressed in chunks of which {row / 1e6:.0f} MB have to be decoded for one row, at most "
                f"{LARGEST_CHUNKS / 1e6:.0f} MB are. Store it anew in chunks of fewer rows, for example by h5repack.",
            )
        del found  # while it is open, HDF5 would go on with its cache
        access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
        # By the third number the least used goes first; at 1.0 (HDF5 2.0) the limit is not kept.
        access.set_chunk_cache(521, row + chunk if filtered else 0, 0.0)
        return h5py.Dataset(h5py.h5d.open(self._file.id, name.encode(), access))

    def _coords(self) -> Coordinates:
        dataset = self._dataset("coords", "iuf")
        check_coords_shape(self.path, dataset.shape[-2:], self.n)
        rows = dataset[0] if dataset.ndim == 3 else dataset[()]
        return checked_coords(self.path, rows, self.n)

    def _coords_um(self) -> Floats | None:
        """STAMP's coordinates in microns; None where the file does not say that they are."""
        stated = self._file.attrs
        if "tile_size_um" not in stated and ("unit" not in stated or stated["unit"] not in ("um", b"um")):
            return None  # before version 2 they were in pixels of a resolution that the file does not say
        dataset = self._dataset("coords", "iuf")
        check_coords_shape(self.path, dataset.shape[-2:], self.n)
        rows = np.asarray(dataset[0] if dataset.ndim == 3 else dataset[()], np.float32)
        if not np.isfinite(rows).all():
            raise ImageError(self.path, "coords hold NaN or infinity, expected microns. Extract them again.")
        return rows

    def _attributes(self, names: Sequence[str]) -> dict[str, Any]:
        """Return these attributes of `coords`, else of `features`, else of the file. Others may be unreadable."""
        read = self.coords is not None or self.coords_um is not None
        places = [self._file, self._features, *([self._file["coords"]] if read else [])]
        return {name: place.attrs[name] for place in places for name in names if name in place.attrs}

    def _read(self, start: int, stop: int, out: Floats) -> None:
        with self._lock:
            if self._closed:  # asking h5py would wait for its lock
                raise RuntimeError(f"{self.path} is closed")
            if self._places is None and stop - start >= LONG_RUN:
                self._places = stored_rows(self._file, self._features) or False
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


_KINDS = {"f": "floating-point numbers", "iuf": "numbers"}


def _check_stored(path: Path, name: str, dataset: Any) -> None:
    """HDF5 reads what was never written as zeros; a writer that was stopped leaves such files."""
    if dataset.is_virtual or dataset.external:
        raise ImageError(path, f"`{name}` lies in other files. Copy the features into this one.")
    plan = dataset.id.get_create_plist()
    if dataset.chunks is not None and plan.get_nfilters():
        there = dataset.id.get_num_chunks()
        wanted = int(np.prod([-(-side // chunk) for side, chunk in zip(dataset.shape, dataset.chunks, strict=True)]))
        unit = "compressed chunks"
    else:
        there, wanted, unit = dataset.id.get_storage_size(), dataset.size * dataset.dtype.itemsize, "bytes"
    if there < wanted:
        raise ImageError(
            path,
            f"`{name}` of shape {dataset.shape} is not all there: {there} of {wanted} {unit}. Its writer was stopped, "
            "or the file is not whole; extract the features of this slide again.",
        )
