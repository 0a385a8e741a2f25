"""What decoders raise on damaged files, turned into one line that names the file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keyhole.errors import ImageError

FAULTS: tuple[type[Exception], ...] = (
    # tifffile and Pillow let nearly everything through on a damaged file; each of these was seen.
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)


def one_line(error: BaseException, limit: int = 160) -> str:
    """The message of `error` on one line, at most `limit` characters; its type where it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def faults_of(path: Path, what: str) -> Iterator[None]:
    """Raises ImageError(path, "`what` (reason). Copy it again ...") for whatever a decoder raises inside."""
    try:
        yield
    except FAULTS as error:
        raise ImageError(path, f"{what} ({one_line(error)}). Copy the file again, or export it anew.") from error


def ends_early(path: Path, there: int, needed: int) -> ImageError:
    """The error for a file of `there` bytes that says it has at least `needed`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if needed >= scale:
            sizes = f"{there / scale:.1f} of {needed / scale:.1f} {unit}"
            break
    else:
        sizes = f"{there} of {needed} bytes"
    return ImageError(path, f"the file ends early ({sizes}). Copy it again.")
