"""Write one HDF5 file of features for each slide, in the layout of CLAM and TRIDENT."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ConfigError, ImageError, KeyholeError, OutputError
from keyhole.patches.features.files import SETTINGS as SETTINGS
from keyhole.patches.features.source import open_features
from keyhole.patches.sources import FilePatches
from keyhole.util.files import atomic_file
from keyhole.util.version import VERSION

CHUNK_BYTES = 2**18
"""Bytes of a chunk: small enough to be read for a few rows, large enough for a short index."""
BYTES = "image_bytes"
"""Attribute for the size of the image's file."""


class FeatureWriter:
    """Append rows of features and their places to an open `h5py.File`; `check` raises if the disk is full."""

    def __init__(self, file: Any, dtype: str, check: Callable[[], None]) -> None:
        self.file, self.dtype, self.check = file, dtype, check
        self.n = 0

    def add(self, features: NDArray[np.float32], corners: NDArray[np.int64], name: str) -> None:
        """Append features (k, d) of patches with level-0 x, y (k, 2), all finite in `dtype`."""
        with np.errstate(over="ignore"):
            rows = features.astype(self.dtype)
        good = np.isfinite(rows).all(axis=1)
        if not good.all():
            x, y = corners[int(np.argmin(good))].tolist()
            finite = bool(np.isfinite(features).all())
            hint = "Store them as float32: --dtype float32." if finite else "The encoder or its weights are damaged."
            raise KeyholeError(f"{name}: the feature of the patch at {x},{y} is not finite in {self.dtype}. {hint}")
        if self.n == 0:
            for part, width, dtype in (("features", features.shape[1], self.dtype), ("coords", 2, "int64")):
                chunk = max(1, CHUNK_BYTES // (width * np.dtype(dtype).itemsize)), width
                self.file.create_dataset(part, (0, width), dtype, maxshape=(None, width), chunks=chunk)
        start, self.n = self.n, self.n + len(rows)
        for part, values in (("features", rows), ("coords", corners)):
            dataset = self.file[part]
            dataset.resize(self.n, axis=0)
            dataset[start:] = values
        self.check()

    def describe(self, source: FilePatches, about: Mapping[str, Any]) -> None:
        """Write the attributes of the patches under the names of CLAM and TRIDENT, and those of the origin, `about`.

        CLAM and TRIDENT have no `edge`, and no `stride`, which `overlap` cannot express if it exceeds the size.
        """
        grid, image = source.grid, source.image
        coords: dict[str, Any] = {
            "patch_size": grid.size,
            "patch_level": grid.level,
            "downsample": [grid.scale, grid.scale],
            "patch_size_level0": round(grid.size * grid.scale),
            "overlap": max(0, grid.size - grid.stride),
            "stride": grid.stride,
            "edge": grid.edge,
            "level0_width": image.size.width,
            "level0_height": image.size.height,
            "qupath_origin": image.qupath_origin,
            "name": Path(image.path).stem,
        }
        if image.mpp is not None:
            coords["mpp"] = image.mpp * grid.scale
        self.file["coords"].attrs.update(coords)
        self.file["features"].attrs.update({"keyhole": VERSION, "image": str(image.path), **about})


@contextmanager
def feature_writer(path: Path, dtype: str) -> Iterator[FeatureWriter]:
    """Open a writer whose file is read back and gets the name `path` when the block ends without an error."""
    import h5py

    def check(temporary: Path) -> None:
        try:
            open_features(temporary).close()
        except ImageError as error:
            raise OutputError(f"{path}: the disk returned other bytes ({error.problem}) Check the disk.") from error

    with atomic_file(path, check) as file:
        disk = _Disk(file)
        stored = h5py.File(disk, "w")
        try:
            yield FeatureWriter(stored, dtype, disk.check)
        finally:
            stored.close()
        disk.check()


class _Disk(io.FileIO):
    """A file for HDF5 in which writing never fails, since HDF5 does not survive that (2.0 ends the process later).

    Bytes that could not be written, as on a full disk, are read back from memory, and `check` raises the error.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file.fileno(), "r+", closefd=False)
        self._size = 0
        self._held: list[tuple[int, bytes]] = []
        self._error: BaseException | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        start, block = self.tell(), bytes(data)
        try:
            self.check()
            left = memoryview(block)
            while left:
                left = left[super().write(left) :]
        except BaseException as error:  # noqa: BLE001 - raised by `check`, when HDF5 has returned
            self._error = self._error or error
            self._held.append((start, block))
            self.seek(start + len(block))
        self._size = max(self._size, start + len(block))
        return len(block)

    def readinto(self, buffer: Any) -> int:
        view, place = memoryview(buffer).cast("B"), self.tell()
        super().readinto(view)
        for start, data in self._held:
            low, high = max(start, place), min(start + len(data), place + len(view))
            if low < high:
                view[low - place : high - place] = data[low - start : high - start]
        self.seek(place + len(view))
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(offset + self._size) if whence == os.SEEK_END else super().seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        self._size = self.tell() if size is None else size
        try:
            super().truncate(self._size)
        except OSError as error:
            self._error = self._error or error
        return self._size


def already_there(path: Path, settings: Mapping[str, Any], image_bytes: int) -> bool:
    """Return whether the file exists and was made with the same settings from the same image.

    Raises ConfigError, which names the difference, if it was made in another way.
    """
    import h5py

    if not path.exists():
        return False
    advice = "Choose another --out, or delete the file."
    try:
        open_features(path).close()
        with h5py.File(path, "r", locking=False) as file:
            attributes = dict(file["features"].attrs)
        known = json.loads(attributes[SETTINGS])
        before = int(attributes[BYTES])
    except ImageError as error:
        raise ConfigError(f"{error} It was there before this run. {advice}") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is there already, but not by `keyhole embed`. {advice}") from error
    now, known = json.loads(json.dumps(settings)), {"patch.edge": "background", **known}  # older files do not state it
    if differing := [name for name in dict.fromkeys([*now, *known]) if now.get(name) != known.get(name)]:
        name = differing[0]
        more = f" ({len(differing)} settings differ)" if len(differing) > 1 else ""
        raise ConfigError(f"{path}: made with {name} {known.get(name)}, now it is {now.get(name)}{more}. {advice}")
    if before != image_bytes:
        raise ConfigError(f"{path}: made when its image had {before} bytes, now it has {image_bytes}. {advice}")
    return True
