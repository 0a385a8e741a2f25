"""Errors of decoders on damaged files, as one line that names the file."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from keyhole.errors import ImageError, ImageLost
from keyhole.images.pixels import ValueTooLarge

FAULTS: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, Warning, struct.error, zlib.error),
)
"""What tifffile and Pillow raise on damaged files."""

_LOST_NAMES = (
    # The file is gone, the disk or share does not answer, or the error may pass: too many open files, interrupted call.
    *("ENOENT", "EIO", "ESTALE", "ENXIO", "ENODEV", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN"),
    *("ENETUNREACH", "ENETRESET", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "ESHUTDOWN", "EREMOTEIO", "ENOLINK"),
    *("ECOMM", "EPROTO", "ENOMEDIUM", "EAGAIN", "EBUSY", "EINTR", "EMFILE", "ENFILE", "EBADFD"),
)
LOST = frozenset(getattr(errno, name) for name in _LOST_NAMES if hasattr(errno, name))
"""Numbers of system errors after which the same read may work again later. All others are about the file itself."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return the message of `error` on one line of at most `limit` characters; its type if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def faults_of(path: Path, what: str) -> Iterator[None]:
    """Raise ImageError(path, "`what` (reason). Copy it again ...") for any error that a decoder raises inside.

    A system error that means that the file cannot be reached becomes ImageLost.
    """
    try:
        yield
    except ValueTooLarge as error:
        raise ImageError(path, f"{error}. Correct --patch.bits, or save it with 8 bits.") from error
    except FAULTS as error:
        raise_if_lost(path, error)
        raise ImageError(path, f"{what} ({one_line(error)}). Copy the file again, or export it again.") from error


def raise_if_lost(path: Path, error: Exception) -> None:
    """Raise ImageLost if an error of the system or of a library means that the file cannot be reached."""
    if isinstance(error, FileNotFoundError) and (error.errno in LOST or not os.path.lexists(path)):
        raise ImageLost(path, "no such file. Check the path.") from error
    if isinstance(error, OSError) and error.errno in LOST:
        why = error.strerror or one_line(error)
        raise ImageLost(path, f"cannot be reached ({why}). Is its disk or share there?") from error


@contextmanager
def passed_over(path: Path) -> Iterator[None]:
    """Ignore that a part of a file cannot be decoded, since reading it reports why; raise only ImageLost."""
    try:
        with faults_of(path, "damaged"):
            yield
    except ImageError as error:
        if isinstance(error, ImageLost):
            raise


def check_reachable(path: Path, problem: str) -> None:
    """Raise ImageLost if the file or folder is gone, or a library's text has the words of such a system error."""
    try:
        for number in LOST - {errno.ENOENT}:
            if os.strerror(number).lower() in problem.lower():
                raise OSError(number, os.strerror(number))
        if not path.is_dir():
            with path.open("rb", buffering=0) as file:
                file.read(1)
        else:
            os.scandir(path).close()
    except OSError as error:
        raise_if_lost(path, error)


def not_one_picture(path: Path, lengths: Mapping[str, int]) -> ImageError:
    """The error for several pictures in one file: `lengths` over 1 of the axes z (depth), t (time), c (channel)."""
    stated = ", ".join(f"{n} channels" if axis == "c" else f"{n} along {axis}" for axis, n in lengths.items())
    problem, other = f"a stack of pictures ({stated}); one", "Duplicate), or a projection of them"
    if set(lengths) == {"c"}:
        problem, other = f"{stated}; one or RGB", "Type > RGB Color merges the channels)"
    return ImageError(path, f"{problem} is read. Save one as a file of its own (in ImageJ: Image > {other}.")


def ends_early(path: Path, there: int, needed: int) -> ImageError:
    """Return the error for a file of `there` bytes whose structure needs at least `needed`."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    sizes = [(f"{there / scale:.1f}", f"{needed / scale:.1f} {unit}") for unit, scale in units if needed >= scale]
    sizes.append((str(there), f"{needed} bytes"))
    has, needs = next((has, needs) for has, needs in sizes if has != needs.split()[0])
    return ImageError(path, f"the file ends early ({has} of {needs} or more). Copy it again.")
