"""Size and SHA-256 of what images are read from: most damage decodes without an error, and only this tells."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keyhole.data.item import Item
from keyhole.errors import ImageError, StalledRead
from keyhole.images.image import folder_suffixes
from keyhole.util.files import file_size

PIECE = 8 << 20
"""Bytes read at a time: the unit in which a read may stall."""


OTHER_CONTENT = "other content of the same size"


@dataclass(frozen=True)
class FileHash:
    """What a file held when it was used; of an image that is a folder, what its files held and were called."""

    sha256: str
    bytes: int


def hash_files(
    items: Sequence[Item],
    threads: int | None = None,
    stall: float = 120.0,
    progress: Callable[[int], None] | None = None,
    failed: Callable[[Item, Exception], None] | None = None,
) -> dict[str, FileHash]:
    """Reads the files of `items` once, several at a time, in daemon threads that cannot hold up the end of the process.

    Args:
        items: whose files to read.
        threads: files at a time; default one per core, at most 16.
        stall: seconds without a byte from any file after which the read counts as stalled.
        progress: called with the number of files done.
        failed: told each file that is gone or cannot be read; without it the first is raised.

    Returns:
        the hash of each file by the item's name.

    Raises:
        ImageError: a file that is gone or cannot be read, where `failed` is not given.
        StalledRead: nothing came within `stall` seconds.
    """
    todo: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
    # None: another piece was read, so that the wait below starts anew.
    events: queue.SimpleQueue[tuple[Item, FileHash | Exception] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while (item := todo.get()) is not None and not stop.is_set():
            try:
                found: FileHash | Exception = _hash(item.source, lambda: events.put(None))
            except Exception as error:  # noqa: BLE001 - raised again below
                found = error
            events.put((item, found))

    count = min(len(items), threads or min(16, os.cpu_count() or 1))
    for item in [*items, *[None] * count]:
        todo.put(item)
    for number in range(count):
        threading.Thread(target=work, name=f"keyhole-hash-{number}", daemon=True).start()
    hashes: dict[str, FileHash] = {}
    done: set[str] = set()
    try:
        while len(done) < len(items):
            try:
                event = events.get(timeout=stall)
            except queue.Empty:
                open_item = next(item for item in items if item.name not in done)
                raise StalledRead(open_item.source, f"no data for {stall:g} s; is the disk or share there?") from None
            if event is None:
                continue
            item, found = event
            done.add(item.name)
            if not isinstance(found, Exception):
                hashes[item.name] = found
            elif failed is None:
                raise found
            else:
                failed(item, found)
            if progress is not None:
                progress(len(done))
    finally:
        stop.set()
    return hashes


def changed_files(
    items: Sequence[Item],
    recorded: Mapping[str, FileHash],
    threads: int | None = None,
    stall: float = 120.0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """What is different about the files of `items`: by size, and by SHA-256 where one was recorded.

    Files that are gone or cannot be read are not compared: who opens them says so.

    Args:
        items: whose files to compare; each is read to its end.
        recorded: what they held, by the item's name; an item without a record is not compared.
        threads, stall, progress: as in `hash_files`.

    Returns:
        the difference in words, by the item's name; of those that are the same, nothing.

    Raises:
        StalledRead: as `hash_files`.
    """
    changed: dict[str, str] = {}
    todo = []
    for item in items:
        before = recorded.get(item.name)
        if before is None or not item.source.exists():
            continue
        if (size := file_size(item.source)) != before.bytes:
            changed[item.name] = f"has {size} bytes, {before.bytes} when the run began"
        elif before.sha256:
            todo.append(item)
    for name, now in hash_files(todo, threads, stall, progress, failed=lambda *_: None).items():
        if now.sha256 != recorded[name].sha256:
            changed[name] = OTHER_CONTENT
    return changed


def _hash(path: Path, piece_read: Callable[[], None]) -> FileHash:
    try:
        if path.is_dir() and path.suffix.lower() in folder_suffixes():
            return _hash_folder(path, piece_read)
        if not path.is_file():
            raise ImageError(path, "not a regular file, so it has no hash.")
        digest = hashlib.sha256()
        size = _feed(digest, path, piece_read)
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror or error}).") from error
    return FileHash(digest.hexdigest(), size)


def _hash_folder(folder: Path, piece_read: Callable[[], None]) -> FileHash:
    """Hash the sorted names in the folder, each with the hash of its file, and add up the bytes of all files."""
    digest, size = hashlib.sha256(), 0
    for path in sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names):
        inner = hashlib.sha256()
        size += _feed(inner, path, piece_read)
        digest.update(os.fsencode(path.relative_to(folder).as_posix()) + b"\0" + inner.digest())
    return FileHash(digest.hexdigest(), size)


def _feed(digest: hashlib._Hash, path: Path, piece_read: Callable[[], None]) -> int:
    """The bytes of a file into `digest`; their number."""
    size = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            size += len(piece)
            piece_read()
    return size
