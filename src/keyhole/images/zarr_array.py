"""Arrays of zarr v2 and v3 in a folder: their metadata, and their chunks, decoded on the calling thread.

The package `zarr` reads through an event loop, which takes longer than decoding a chunk of 256 pixels. No chunk is
decoded to more than the size that the metadata state: a file of some kilobytes may declare gigabytes.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

METADATA = ("zarr.json", ".zarray", ".zgroup")
"""Files of which a zarr folder has one."""
MAX_READ_BYTES = 2**29
"""Bytes of one encoded chunk."""
MAX_SHARD_CHUNKS = 2**20
"""Chunks of one shard; its index has 16 bytes for each."""
_MISSING = 2**64 - 1
"""Offset in a shard's index of a chunk that is not stored."""
_SUM = 4
"""Bytes of a CRC-32C."""


class ZarrGroup(NamedTuple):
    folder: Path
    attributes: dict[str, Any]


class ZarrArray:
    """An array in a folder of the store `root`, from its metadata of v3 or v2.

    Raises LookupError, TypeError or ValueError for damaged metadata, UnsupportedCodec for chunks that are not read.
    """

    def __init__(self, folder: Path, root: Path, metadata: dict[str, Any]) -> None:
        self._folder, self._root = folder, root
        self.attributes: dict[str, Any] = metadata["attributes"]
        self.shape = tuple(int(side) for side in metadata["shape"])
        self._fill = metadata.get("fill_value") or 0
        self._prefix = ""
        if metadata["zarr_format"] == 2:
            self.dtype = np.dtype(metadata["dtype"])
            self.dimension_names = self.attributes.get("_ARRAY_DIMENSIONS")
            stored, codecs = metadata["chunks"], _v2_codecs(metadata, len(self.shape), self.dtype)
            self._separator = str(metadata.get("dimension_separator") or ".")
        else:
            self.dtype = np.dtype(metadata["data_type"])
            self.dimension_names = metadata.get("dimension_names")
            stored, codecs = metadata["chunk_grid"]["configuration"]["chunk_shape"], metadata["codecs"]
            name, options = _named(metadata["chunk_key_encoding"])
            self._prefix = "c" if name == "default" else ""
            self._separator = str(options.get("separator", "/" if name == "default" else "."))
        self.chunks = tuple(int(side) for side in stored)
        self._in_shard: tuple[int, ...] | None = None  # chunks of a shard along each axis
        name, options = _named(codecs[0])
        if name == "sharding_indexed":
            shard, self.chunks = self.chunks, tuple(int(side) for side in options["chunk_shape"])
            self._in_shard = tuple(-(-whole // part) for whole, part in zip(shard, self.chunks, strict=True))
            names = [_named(codec)[0] for codec in options["index_codecs"]]
            plain = len(codecs) == 1 and names in (["bytes"], ["bytes", "crc32c"])
            if not plain or math.prod(self._in_shard) > MAX_SHARD_CHUNKS:
                raise UnsupportedCodec("shards in another codec, or of more than a million chunks")
            self._index_has_sum, self._index_first = len(names) == 2, options.get("index_location", "end") == "start"
            codecs = options["codecs"]
        if len(self.chunks) != len(self.shape) or min(self.chunks, default=0) < 1:
            raise ValueError(f"chunks of {self.chunks} for an array of {self.shape}")
        self._order, self._read_as, self._codecs = _checked_codecs(codecs, len(self.shape), self.dtype)

    def encoded(self, chunk: Sequence[int]) -> bytes | None:
        """Return the stored bytes of the chunk at this place along each axis; None if there are none.

        Raises FileNotFoundError if the whole store is gone, since only single chunks may be missing.
        """
        counts = self._in_shard or (1,) * len(chunk)
        place = [str(at // per) for at, per in zip(chunk, counts, strict=True)]
        name = f"{self._folder}/{self._separator.join([*self._prefix, *place])}"
        try:
            with open(name, "rb", buffering=0) as file:  # noqa: PTH123 - Path costs more than reading
                size = os.fstat(file.fileno()).st_size
                if self._in_shard is None:
                    return _read(file, 0, size)
                # A shard has an index, offset and bytes of each chunk, at its end or beginning.
                length = 16 * math.prod(counts) + _SUM * self._index_has_sum
                index = _read(file, 0 if self._index_first else size - length, length)
                places = np.frombuffer(_without_sum(index) if self._index_has_sum else index, "<u8").reshape(-1, 2)
                within = tuple(at % per for at, per in zip(chunk, counts, strict=True))
                offset, count = places[np.ravel_multi_index(within, counts)].tolist()
                return None if offset == count == _MISSING else _read(file, offset, count)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            if not any(os.path.lexists(self._root / name) for name in METADATA):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._root)) from error
            return None

    def decoded(self, data: bytes | None) -> NDArray[Any]:
        """Return the values of a chunk, in the shape of `chunks`; the fill value if there are no bytes."""
        if data is None:
            return np.full(self.chunks, self._fill, self.dtype)
        size = math.prod(self.chunks) * self._read_as.itemsize
        for place, codec in reversed([*enumerate(self._codecs)]):
            if codec == "crc32c":
                data = _without_sum(data)
                continue
            most = size + _SUM * self._codecs[:place].count("crc32c")
            try:
                data = _DECODERS[codec](data, most)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"a chunk that does not decode to its {most:,} bytes: {reason}") from error
        if len(data) != size:
            raise ValueError(f"a chunk of {len(data):,} bytes, expected {size:,}")
        values = np.frombuffer(data, self._read_as).reshape([self.chunks[axis] for axis in self._order])
        return values.transpose(np.argsort(self._order))


class UnsupportedCodec(Exception):  # noqa: N818 - the reader makes an ImageError of it
    """Raised for chunks in a codec that is not read."""


def open_node(folder: Path, root: Path) -> ZarrArray | ZarrGroup:
    """Open the array or group in a folder. Raises as `ZarrArray`, and LookupError if there is none."""
    for name in METADATA:
        if (folder / name).is_file():
            metadata = json.loads((folder / name).read_bytes())
            if metadata["zarr_format"] != (3 if name == "zarr.json" else 2):
                raise ValueError(f"zarr_format {metadata['zarr_format']} in {name}")
            is_array = metadata["node_type"] == "array" if name == "zarr.json" else name == ".zarray"
            if name != "zarr.json" and (beside := folder / ".zattrs").is_file():
                metadata["attributes"] = json.loads(beside.read_bytes())
            attributes = metadata.setdefault("attributes", {})
            if not isinstance(attributes, dict):
                raise TypeError("attributes that are not an object")
            return ZarrArray(folder, root, metadata) if is_array else ZarrGroup(folder, attributes)
    raise LookupError(f"no array or group {folder.name!r}")


def child(group: ZarrGroup, name: str, root: Path) -> ZarrArray | ZarrGroup:
    if ".." in name.split("/") or name.startswith("/"):
        raise ValueError(f"a path {name!r} that leaves the folder")
    return open_node(group.folder / name, root)


def _checked_codecs(
    codecs: Sequence[Any], ndim: int, dtype: np.dtype[Any]
) -> tuple[tuple[int, ...], np.dtype[Any], list[str]]:
    """Return how a chunk is encoded: the order of its axes, the type of its values, and the codecs in their order."""
    order, names, read_as = tuple(range(ndim)), list[str](), None
    for name, options in map(_named, codecs):
        if name == "transpose" and read_as is None:
            order = tuple(order[axis] for axis in options["order"])
        elif name == "bytes" and read_as is None:
            read_as = dtype.newbyteorder(">" if options.get("endian", "little") == "big" else "<")
        elif name in (*_DECODERS, "crc32c") and read_as is not None:
            names.append(name)
        else:
            raise UnsupportedCodec(f"chunks in the codec {name}")
    if read_as is None or sorted(order) != list(range(ndim)):
        raise ValueError("codecs without bytes, or a transpose of other axes")
    if len(packed := [name for name in names if name in _DECODERS]) > 1:
        raise UnsupportedCodec(f"chunks in the codec {' + '.join(packed)}")
    return order, read_as, names


def _v2_codecs(metadata: dict[str, Any], ndim: int, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    if metadata.get("filters"):
        raise UnsupportedCodec(f"chunks with the filter {metadata['filters'][0]['id']}")
    order = [{"name": "transpose", "configuration": {"order": range(ndim)[::-1]}}] if metadata["order"] == "F" else []
    as_bytes = {"name": "bytes", "configuration": {"endian": "big" if dtype.str.startswith(">") else "little"}}
    compressor = metadata["compressor"]
    return [*order, as_bytes, *([] if compressor is None else [{"name": compressor["id"]}])]


def _named(codec: Any) -> tuple[str, dict[str, Any]]:
    """Return name and configuration of a codec of v3, which may be a name alone."""
    if isinstance(codec, str):
        return codec, {}
    return str(codec["name"]), codec.get("configuration") or {}


def _read(file: BinaryIO, start: int, count: int) -> bytes:
    if start < 0 or count > MAX_READ_BYTES:
        raise ValueError(f"a chunk or an index of {count:,} bytes")
    file.seek(start)
    data = file.read(count) or b""
    if len(data) < count:
        raise ValueError("the file ends early")
    return data


def _without_sum(data: bytes) -> bytes:
    import google_crc32c

    if google_crc32c.value(data[:-_SUM]) != int.from_bytes(data[-_SUM:], "little"):
        raise ValueError("a wrong checksum")
    return data[:-_SUM]


def _blosc(data: bytes, most: int) -> bytes:
    """Decode Blosc after a check of its header, since the decoder reads beyond bytes that were cut."""
    import imagecodecs

    decoded, encoded = int.from_bytes(data[4:8], "little"), int.from_bytes(data[12:16], "little")
    if len(data) < 16 or decoded > most or encoded > len(data):
        raise ValueError("its header is damaged, or it was cut")
    return bytes(imagecodecs.blosc_decode(data, numthreads=1, out=most))


def _imagecodec(name: str, more: int = 0, **options: Any) -> Callable[[bytes, int], Any]:
    """Return a decoder of imagecodecs into memory of the expected size; it would cut a longer chunk without `more`."""

    def decode(data: bytes, most: int) -> Any:
        import imagecodecs

        return getattr(imagecodecs, f"{name}_decode")(data, out=most + more, **options)

    return decode


_DECODERS: dict[str, Callable[[bytes, int], Any]] = {
    **{name: _imagecodec(name) for name in ("zstd", "gzip", "zlib")},
    "blosc": _blosc,
    "lz4": _imagecodec("lz4", header=True),
    "bz2": _imagecodec("bz2", more=1),
}
