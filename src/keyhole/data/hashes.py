"""Size and SHA-256 of the files of a data set: most damage decodes without an error, so that only a hash shows it."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from keyhole.data.item import Item
from keyhole.errors import DataError, ImageError, StalledRead
from keyhole.images.image import folder_suffixes
from keyhole.util.files import file_size
from keyhole.util.threads import ReadingThreads, beat

READ_BYTES = 8 << 20  # bytes that are read at a time; each read restarts the stall limit
OTHER_CONTENT = "other content of the same size"


@dataclass(frozen=True)
class FileHash:
    """Size and SHA-256 of a file, or of the names and contents of all files of an image that is a folder."""

    sha256: str
    bytes: int


def hash_files(
    items: Sequence[Item], threads: int | None = None, stall: float = 120.0, skip_unreadable: bool = False
) -> dict[str, FileHash]:
    """Read the files of `items` once, several at a time, and hash them."""
    reading = ReadingThreads(threads, stall)
    try:
        tasks = {item.name: reading.submit(str(item.source), partial(_hash, item.source)) for item in items}
        hashes: dict[str, FileHash] = {}
        for name, task in tasks.items():
            reading.wait(task)
            try:
                hashes[name] = task.value()
            except ImageError as error:
                if isinstance(error, StalledRead) or not skip_unreadable:
                    raise
        return hashes
    finally:
        reading.close()


def changed_files(
    items: Sequence[Item], recorded: Mapping[str, FileHash], threads: int | None = None, stall: float = 120.0
) -> dict[str, str]:
    """Compare files with their recorded size and, where one was recorded, with their SHA-256.

    Files without a record are not compared, nor files that are missing or unreadable, which opening reports.
    """
    changed: dict[str, str] = {}
    same_size = []
    for item in items:
        before = recorded.get(item.name)
        if before is None or not item.source.exists():
            continue
        if (size := file_size(item.source)) != before.bytes:
            changed[item.name] = f"has {size} bytes, {before.bytes} when the run began"
        elif before.sha256:
            same_size.append(item)
    for name, now in hash_files(same_size, threads, stall, skip_unreadable=True).items():
        if now.sha256 != recorded[name].sha256:
            changed[name] = OTHER_CONTENT
    return changed


def stored_hashes(manifest: Path) -> dict[str, FileHash]:
    """Return size and hash of each file as a run's manifest has them; SHA-256 is empty where only the size is known."""
    try:
        with manifest.open(newline="", encoding="utf-8", errors="backslashreplace") as file:
            return {
                row["name"]: FileHash(row.get("sha256") or "", int(row["bytes"]))
                for row in csv.DictReader(file)
                if row.get("bytes")
            }
    except (OSError, csv.Error, KeyError, ValueError) as error:
        raise DataError(f"{manifest}: damaged ({error}). Restore it from a copy of the run.") from error


def _hash(path: Path) -> FileHash:
    try:
        digest, size = hashlib.sha256(), 0
        if path.is_dir() and path.suffix.lower() in folder_suffixes():
            for inside in sorted(Path(place) / name for place, _, names in os.walk(path) for name in names):
                inner = hashlib.sha256()
                size += _feed(inner, inside)
                digest.update(os.fsencode(inside.relative_to(path).as_posix()) + b"\0" + inner.digest())
        elif path.is_file():
            size = _feed(digest, path)
        else:
            raise ImageError(path, "not a regular file, so it has no hash.")
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror or error}).") from error
    return FileHash(digest.hexdigest(), size)


def _feed(digest: hashlib._Hash, path: Path) -> int:
    size = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            size += len(piece)
            beat()
    return size
