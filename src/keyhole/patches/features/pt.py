"""Stored features in a `.pt` file: a tensor (n, d), or a dict with the tensors `features` and `coords`."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from keyhole.errors import ImageError
from keyhole.patches.features.files import (
    ATTRIBUTES,
    FeatureFile,
    Floats,
    Origin,
    checked_coords,
    feature_faults,
    origin_of,
    widen,
)
from keyhole.util.wording import listed

MAX_PICKLE_BYTES = 2**26
"""Bytes of the description of the tensors."""


class TorchFeatures(FeatureFile):
    """Features in a `.pt` file, of which only tensors are unpickled.

    Rows are read from their place in the file: a memory map would end the process if the file is cut short. Files of
    torch before 1.6 have no such place and are kept in memory.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".pt",)

    def __init__(self, path: Path) -> None:
        import torch

        self.path, size = path, path.stat().st_size
        self._lock = threading.Lock()
        self._file: Any = None
        with feature_faults(path, "cannot be read as tensors"):
            records = _records(path, size)
            mapped: dict[str, Any] = {} if records is None else {"mmap": True}
            held = torch.load(path, map_location="cpu", weights_only=True, **mapped)
        features, coords, self.attributes = _tensors(path, held)
        self.origin = origin_of(held) if isinstance(held, Mapping) else Origin()
        self.n, self.d = features.shape
        self._stride = features.stride(0) if self.n > 1 else self.d
        needed = ((self.n - 1) * self._stride + self.d) * features.element_size()
        if needed > min(size, features.untyped_storage().nbytes()):
            raise ImageError(path, f"declares features of {needed:,} bytes, the file has {size:,}. Copy it again.")
        self._kind = str(features.dtype).removeprefix("torch.")
        self._dtype = np.dtype(np.uint16 if self._kind == "bfloat16" else self._kind)
        self.coords = None if coords is None else checked_coords(path, coords.numpy().copy(), self.n)
        self._tensor = None if records is not None else features
        if records is not None:
            with feature_faults(path, "cannot be read"):
                first = features.storage_offset() * features.element_size()
                self._start = _place(path, records, features.untyped_storage()) + first
                self._file = path.open("rb")

    def _read(self, start: int, stop: int, out: Floats) -> None:
        if self._tensor is not None:
            out[...] = self._tensor[start:stop].float().numpy()
            return
        item, stride = self._dtype.itemsize, self._stride
        flat = np.zeros((stop - start) * stride, self._dtype)
        wanted = flat[: (stop - start - 1) * stride + self.d]
        with self._lock:
            self._file.seek(self._start + start * stride * item)
            there = self._file.readinto(wanted.view(np.uint8).data)
        if there < wanted.nbytes:
            raise EOFError("the file ends early")
        rows = flat.reshape(-1, stride)[:, : self.d]
        widen((rows.astype(np.uint32) << 16).view(np.float32) if self._kind == "bfloat16" else rows, out)

    def close(self) -> None:
        with self._lock:
            self._tensor = None
            if self._file is not None:
                self._file.close()


def _records(path: Path, size: int) -> list[zipfile.ZipInfo] | None:
    """Return the records of storages in a `.pt` file; None for files of torch before 1.6, which are no archives."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    for record in records:
        packed = record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size
        if packed or record.header_offset + record.file_size > size:
            raise ImageError(path, f"its part {record.filename} is compressed or cut short. Save it by torch.save.")
        if record.filename.endswith(".pkl") and record.file_size > MAX_PICKLE_BYTES:
            raise ImageError(path, "holds far more than tensors of features and coords. Save these alone.")
    return [record for record in records if "/data/" in record.filename]


def _place(path: Path, records: list[zipfile.ZipInfo], storage: Any) -> int:
    """Return the first byte of a storage in the file."""
    import torch

    head = torch.tensor([], dtype=torch.uint8).set_(storage)[:4096].numpy().tobytes()
    with path.open("rb") as file:
        for record in records:
            if record.file_size == storage.nbytes():
                file.seek(record.header_offset + 26)  # two lengths end the fixed part of a record's header
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                start = record.header_offset + 30 + name + extra
                file.seek(start)
                if file.read(len(head)) == head:
                    return start
    raise ImageError(path, "the features are not where the file says. Save it again by torch.save.")


def _tensors(path: Path, held: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the tensors features (n, d) and coords (n, 2) or None, and the numbers beside them."""
    import torch

    found = held if isinstance(held, Mapping) else {"features": held}
    features, coords = found.get("features"), found.get("coords")
    if not isinstance(features, torch.Tensor) or not (coords is None or isinstance(coords, torch.Tensor)):
        names = listed((repr(name)[:40] for name in found), 8) or "nothing"
        what = f"a dict of {names}" if found is held else type(held).__name__
        raise ImageError(path, f"holds {what}, expected a tensor (n, d), or a dict of tensors features and coords.")
    features = features.detach()
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]
    if features.ndim != 2 or not features.shape[1]:
        raise ImageError(path, f"the features are of shape {tuple(features.shape)}, expected (n, width).")
    if features.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ImageError(path, f"the features are of type {features.dtype}, expected floating-point numbers.")
    if len(features) == 0:
        raise ImageError(path, "the features have no rows: no patch of this slide has a feature.")
    rows, step = features.stride() if features.layout == torch.strided else (0, 0)
    if (features.shape[1] > 1 and step != 1) or (len(features) > 1 and rows < features.shape[1]):
        raise ImageError(path, "the features do not lie row by row. Save features.contiguous() by torch.save.")
    numbers = {name: found[name] for name in ATTRIBUTES if isinstance(found.get(name), int | float)}
    return features, None if coords is None else coords.detach(), numbers
