"""How the chunks of a zarr array are encoded, and whether one inflates to more than the array says, before it does.

zarr believes what a chunk says of itself: a file of some kilobytes may ask for gigabytes.
"""

from __future__ import annotations

import bz2
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keyhole.errors import ImageError

if TYPE_CHECKING:
    import zarr

MAX_INNER = 2**20
"""Chunks of one shard; its table of contents has 16 bytes for each."""
_UNCHECKED = 2**26
"""Bytes that a chunk may inflate to without a count beforehand."""
_SUMS = 16
"""Bytes of checksums that may be compressed with the pixels."""


@dataclass(frozen=True)
class ChunkRule:
    """How the chunks of one array are encoded, and the bytes that each decodes to.

    Attributes:
        compressor: name of the codec, "" for none.
        size: bytes that a chunk may decode to.
        inner: chunks of a shard; 0 without shards.
        index_bytes: of a shard's table of contents.
        index_first: whether the table is at the shard's beginning.
    """

    compressor: str
    size: int
    inner: int = 0
    index_bytes: int = 0
    index_first: bool = False

    def inner_chunks(self, shard: bytes) -> list[bytes]:
        """The encoded chunks of a whole shard, by its table of contents."""
        index = shard[: self.index_bytes] if self.index_first else shard[-self.index_bytes :]
        if len(index) < 16 * self.inner:
            return []  # zarr says that it is too short
        places = np.frombuffer(index, "<u8", 2 * self.inner).reshape(-1, 2)
        present = places[places[:, 0] != 2**64 - 1]
        return [shard[offset : offset + count] for offset, count in present.tolist()]


def inflates_beyond(data: bytes, compressor: str, size: int) -> bool:
    """Whether encoded bytes say, or turn out, to decode to more than `size`; never decodes more than that.

    Also of those of Blosc that were cut: its decoder would read on in whatever lies behind them in memory.
    """
    if compressor == "blosc":
        if len(data) < 16:
            return True
        decoded, encoded = struct.unpack_from("<I4xI", data, 4)
        return bool(decoded > size or encoded > len(data))
    if compressor == "lz4":
        return len(data) >= 4 and struct.unpack_from("<I", data)[0] > size
    if compressor in ("gzip", "zlib"):
        if len(data) * 1032 <= max(size, _UNCHECKED):  # the most that Deflate can do
            return False
        return _counted(lambda: zlib.decompressobj(wbits=47), data, size)  # 47: either kind of header
    if compressor == "bz2":
        return _counted(bz2.BZ2Decompressor, data, size)
    if compressor == "zstd":
        declared = _zstd_size(data)
        return declared > size if declared is not None else _zstd_beyond(data, size)
    return False


def _counted(stream: Callable[[], Any], data: bytes, size: int) -> bool:
    """By decoding a piece at a time, to the end of the last stream: several may follow each other."""
    total = 0
    while data:
        decoder = stream()
        while not decoder.eof:
            piece = decoder.decompress(data, 2**20)
            total += len(piece)
            if total > size:
                return True
            data = getattr(decoder, "unconsumed_tail", b"")  # bz2 keeps it to itself
            if not piece and not data:
                return False  # cut off
        data = decoder.unused_data
    return False


def _zstd_size(data: bytes) -> int | None:
    """What a Zstandard frame says that it holds; None where it does not, or is not all there is. RFC 8878, 3.1.1."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 5:
        return None
    flags = data[4]
    single = bool(flags & 0x20)
    width = (1 if single else 0, 2, 4, 8)[flags >> 6]
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    declared = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
    at += width
    last = False
    while not last and at + 3 <= len(data):
        block = int.from_bytes(data[at : at + 3], "little")
        last, kind = bool(block & 1), block >> 1 & 3
        at += 3 + (1 if kind == 1 else block >> 3)  # 1: one byte, repeated
    behind = len(data) - at - (4 if flags & 4 else 0)
    return declared if width and behind <= 4 else None  # 4: a checksum of the chunk


def _zstd_beyond(data: bytes, size: int) -> bool:
    """By decoding into a buffer of just that size. What cannot be decoded so is not to be decoded without it."""
    import imagecodecs

    try:
        imagecodecs.zstd_decode(data, out=bytearray(size))
    except imagecodecs.ZstdError:
        return True
    return False


def chunk_rule(array: zarr.Array[Any], refuse: Callable[[str], ImageError]) -> ChunkRule:
    """How an array's chunks are encoded.

    Raises:
        ImageError: made by `refuse`; a codec whose output cannot be bounded, or shards of an odd make.
    """
    size = math.prod(array.chunks) * array.dtype.itemsize + _SUMS
    if array.metadata.zarr_format == 2:
        if array.filters:
            raise refuse(f"chunks with the filter {_name(array.filters[0])}")
        return ChunkRule(_compressor([_name(codec) for codec in array.compressors], refuse), size)
    codecs: Sequence[Any] = array.metadata.codecs
    if array.shards is None:
        return ChunkRule(_compressor([_name(codec) for codec in codecs], refuse), size)
    inner = math.prod(math.ceil(s / c) for s, c in zip(array.shards, array.chunks, strict=True))
    index = [_name(codec) for codec in codecs[0].index_codecs] if len(codecs) == 1 else []
    if index not in (["bytes"], ["bytes", "crc32c"]) or inner > MAX_INNER:
        raise refuse("shards in another codec, or of more than a million chunks")
    return ChunkRule(
        _compressor([_name(codec) for codec in codecs[0].codecs], refuse),
        size,
        inner,
        16 * inner + 4 * (len(index) == 2),
        str(getattr(codecs[0].index_location, "value", codecs[0].index_location)) == "start",
    )


def _name(codec: Any) -> str:
    """What the metadata calls a codec."""
    if hasattr(codec, "codec_id"):
        return str(codec.codec_id)
    return str(codec.to_dict().get("name", type(codec).__name__))


def _compressor(names: list[str], refuse: Callable[[str], ImageError]) -> str:
    found = [name for name in names if name not in ("bytes", "transpose", "crc32c")]
    if len(found) > 1 or (found and found[0] not in ("blosc", "lz4", "gzip", "zlib", "bz2", "zstd")):
        raise refuse(f"chunks in the codec {' + '.join(found)}")
    return found[0] if found else ""
