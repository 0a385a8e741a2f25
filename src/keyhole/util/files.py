"""Writes files whole or not at all: to a temporary file beside the target, then fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from keyhole.errors import DataError, OutputError
from keyhole.util.platform import lock_file, sync_folder
from keyhole.util.wording import distinct

MAX_NAME_LENGTH = 120
"""Characters of a file name made from a user's text; the end of a path says more than its beginning."""


def writable_folder(path: str | Path) -> Path:
    """Create `path` with its parents, and check that a file can be written in it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write here ({error.strerror or error}). Choose another folder or free it."
        ) from error
    return path


def check_creatable(path: Path) -> None:
    """Check that `path` and the folders above it can be created, without creating any."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(
            f"{path}: cannot be created, {parent} is not a folder that can be written. Choose another --out."
        )


def write_atomic(path: str | Path, data: str | bytes) -> Path:
    """Write `data` to `path`; after a crash the file has either its old or its new content."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
"""Names of unfinished files and folders; the group is the final name."""


@contextlib.contextmanager
def atomic_file(path: str | Path, check: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that gets the name `path` only when it is complete, on disk, and has passed `check`."""
    path = Path(path)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            with contextlib.suppress(OSError):  # not every file system has locks
                lock_file(file.fileno())
            yield file  # type: ignore[misc]
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
        temporary = None
        sync_folder(path.parent)
    except BrokenPipeError:
        raise  # from a pipe that the body prints to
    except OSError as error:
        raise OutputError(
            f"{path}: could not be written ({error.strerror or error}); what was there before is unchanged. "
            "Free space or choose another place."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folders: Iterable[Path], names: re.Pattern[str]) -> None:
    """Remove the unfinished files with these final names that killed processes left."""
    for path in (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())):
        found = TEMPORARY.fullmatch(path.name)
        if found is not None and names.fullmatch(found[1]) and path.is_file() and is_abandoned(path):
            path.unlink(missing_ok=True)


def is_abandoned(path: Path) -> bool:
    """Return whether no process is writing this temporary file any more; False if that is unknown."""
    try:
        with path.open("rb") as file:
            return lock_file(file.fileno()) is True
    except OSError:
        return False


def umask() -> int:
    """Return the process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; symbolic links are followed."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    return path.stat().st_size


def file_names(texts: Sequence[str], fallback: str) -> list[str]:
    """Return a file name without suffix for each text of a user, such as the name of a column or the path of an image.

    The names are safe on every file system, and unique even where upper and lower case do not differ.

    >>> file_names(["grade", "Grade", "ER/PR status", ".."], "task")
    ['grade', 'Grade-2', 'ER_PR_status', 'task']
    """
    plain = (re.sub("[^A-Za-z0-9.-]", "_", text).strip("._")[-MAX_NAME_LENGTH:] or fallback for text in texts)
    return distinct(plain, "{}-{}", str.lower)


def relative_path(path: Path, folder: Path) -> str:
    """Return a path as a CSV in `folder` names it; it is absolute where it is on another drive.

    Raises:
        DataError: the name of a folder is not valid text.

    >>> relative_path(Path("scans/a.png"), Path("tables"))
    '../scans/a.png'
    """
    try:
        found = os.path.relpath(path, folder)
    except ValueError:  # on another drive
        found = str(path.absolute())
    if found.encode(errors="replace") != encoded(found):
        what = "the name of a folder is not valid text, so that no CSV can hold it"
        raise DataError(f"{str(path)!a}: {what}. Rename it, or link to it by another name.")
    return found


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    r"""Return rows as the text of a CSV.

    >>> csv_text([("image", "label"), ("a,b.png", 1)])
    'image,label\n"a,b.png",1\n'
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def encoded(text: str) -> bytes:
    """Return the text in UTF-8; bytes of a file name that are not valid text become escapes."""
    return text.encode("utf-8", "backslashreplace")
