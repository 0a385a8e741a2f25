"""Chunks of a zarr array, decoded one by one without zarr's event loop, which costs more than a chunk of 256 pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from keyhole.images.faults import FAULTS

if TYPE_CHECKING:
    import zarr

    from keyhole.images.zarr_chunks import ChunkRule

Decode = Callable[[bytes], NDArray[Any] | None]
"""An encoded chunk -> its values in the shape of a chunk; None for what is to be left to zarr."""


def chunk_decoder(array: zarr.Array[Any], rule: ChunkRule) -> Decode | None:
    """How the chunks of an array are decoded; None for shards and codecs that are left to zarr.

    Args:
        array: of uint8 or uint16.
        rule: its codec.
    """
    inflate = _inflate(rule.compressor)
    if inflate is None or rule.inner or not _is_plain(array, rule):
        return None
    dtype, shape = array.dtype.newbyteorder("<"), array.chunks
    size = math.prod(shape) * dtype.itemsize

    def decode(data: bytes) -> NDArray[Any] | None:
        try:
            values = np.frombuffer(inflate(data, size), dtype)
        except FAULTS:
            return None  # zarr says what is wrong
        return values.reshape(shape) if values.nbytes == size else None

    return decode


def _is_plain(array: zarr.Array[Any], rule: ChunkRule) -> bool:
    """Whether a decoded chunk is its values in C order, lowest byte first, and nothing else."""
    if array.metadata.zarr_format == 2:
        return array.metadata.order == "C" and array.dtype.byteorder in "|<="
    names = [str(codec.to_dict()["name"]) for codec in array.metadata.codecs]
    first = array.metadata.codecs[0].to_dict().get("configuration") or {}
    order = first.get("endian", "little") if isinstance(first, dict) else ""
    little = array.dtype.itemsize == 1 or str(getattr(order, "value", order)) == "little"
    return names == ["bytes", rule.compressor][: 1 + bool(rule.compressor)] and little


def _inflate(compressor: str) -> Callable[[bytes, int], bytes] | None:
    """Bytes of a chunk, at most so many: all are checked for that before."""
    import imagecodecs

    codecs: dict[str, Callable[[bytes, int], Any]] = {
        "": lambda data, size: data,
        "blosc": lambda data, size: imagecodecs.blosc_decode(data, numthreads=1, out=size),
        "zstd": lambda data, size: imagecodecs.zstd_decode(data, out=size),
        "gzip": lambda data, size: imagecodecs.gzip_decode(data, out=size),
        "zlib": lambda data, size: imagecodecs.zlib_decode(data, out=size),
    }
    return codecs.get(compressor)


def chunk_keys(array: zarr.Array[Any], axes: str, row: int, column: int) -> Sequence[str]:
    """Where in the store the chunks of one place lie, one behind the other along the channels."""
    split = {"c": range(math.ceil(array.shape[axes.index("c")] / array.chunks[axes.index("c")]))} if "c" in axes else {}
    keys = []
    for channel in split.get("c", range(1)):
        coordinates = {"y": row, "x": column, "c": channel}
        key = array.metadata.encode_chunk_key(tuple(coordinates.get(axis, 0) for axis in axes))
        keys.append(f"{array.path}/{key}" if array.path else key)
    return keys
