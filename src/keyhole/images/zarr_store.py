"""A folder of zarr chunks for reading: no chunk inflates beyond its size, a folder that is gone is not an empty one."""

from __future__ import annotations

import asyncio
import errno
import os
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from keyhole.images.ome_zarr import METADATA
from keyhole.images.zarr_chunks import ChunkRule, inflates_beyond

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

MAX_BYTES = 2**29
"""Bytes read from one file at once: a chunk, or a shard that is wanted whole."""


class CheckedStore(LocalStore):
    """A zarr folder, read-only.

    Attributes:
        rules: by the path of an array, how its chunks are encoded; those are checked before zarr decodes them.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_only=True)
        self.rules: dict[str, ChunkRule] = {}

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        data = await _READERS.run(lambda: self.read(key, byte_range))
        return None if data is None else (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    def read(self, key: str, byte_range: ByteRequest | None = None) -> bytes | None:
        """Bytes of a file, None where there is none.

        Raises:
            ValueError: a chunk that is too large.
            OSError: not readable; ENOENT only where the zarr folder itself is gone.
        """
        try:
            with (self.root / key).open("rb", buffering=0) as file:
                start, stop = _span(byte_range, os.fstat(file.fileno()).st_size)
                if stop - start > MAX_BYTES:
                    raise ValueError(f"{key} is to give {stop - start:,} bytes at once")
                file.seek(start)
                data = file.read(max(0, stop - start))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            if not any(os.path.lexists(self.root / name) for name in METADATA):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.root)) from error
            return None
        folder, _, name = key.rpartition("/")
        rule = None if name in (*METADATA, ".zattrs", ".zmetadata") else self._rule(folder)
        if rule is not None:
            _check(key, rule, data, byte_range)
        return data

    def _rule(self, folder: str) -> ChunkRule | None:
        """The rule of the array that a chunk in `folder` belongs to: chunks may lie deeper than their array."""
        while folder not in self.rules:
            if not folder:
                return None
            folder = folder.rpartition("/")[0]
        return self.rules[folder]


def _check(key: str, rule: ChunkRule, data: bytes, byte_range: ByteRequest | None) -> None:
    if rule.inner and byte_range is None:
        chunks = rule.inner_chunks(data)
    elif rule.inner and _is_index(byte_range, rule):
        chunks = []
    else:
        chunks = [data]
    for chunk in chunks:
        if inflates_beyond(chunk, rule.compressor, rule.size):
            raise ValueError(f"{key} is damaged, or inflates to more than its {rule.size:,} bytes")


def _is_index(byte_range: ByteRequest | None, rule: ChunkRule) -> bool:
    """Whether a shard's table of contents is read, not a chunk."""
    return byte_range == RangeByteRequest(0, rule.index_bytes) if rule.index_first else _is_suffix(byte_range)


def _is_suffix(byte_range: ByteRequest | None) -> bool:
    return isinstance(byte_range, SuffixByteRequest)


def _span(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    """First byte and the one behind the last, inside the file."""
    if isinstance(byte_range, RangeByteRequest):
        return min(byte_range.start, size), min(byte_range.end, size)
    if isinstance(byte_range, OffsetByteRequest):
        return min(byte_range.offset, size), size
    if isinstance(byte_range, SuffixByteRequest):
        return max(0, size - byte_range.suffix), size
    return 0, size


class _Readers:
    """Daemon threads that read files for zarr's event loop. asyncio's own would hold up the end of the process for as
    long as a share stalls."""

    MOST = 32

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Future[Any], Callable[[], Any]]]
        self._todo = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._busy = 0

    async def run(self, function: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            self._busy += 1
            more = self._busy > self._threads < self.MOST
            self._threads += more
        if more:
            threading.Thread(target=self._work, name="keyhole-zarr", daemon=True).start()
        self._todo.put((loop, future, function))
        return await future

    def _work(self) -> None:
        while True:
            loop, future, function = self._todo.get()
            try:
                settle = _settled(future, function(), None)
            except BaseException as error:  # noqa: BLE001 - raised again in who waits for it
                settle = _settled(future, None, error)
            with self._lock:
                self._busy -= 1
            with suppress(RuntimeError):  # the loop is closed: the process ends
                loop.call_soon_threadsafe(settle)


def _settled(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> Callable[[], None]:
    """What the event loop does when a read has ended; who waited may have given up."""

    def settle() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    return settle


_READERS = _Readers()
