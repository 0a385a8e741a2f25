"""`--memory` as text, and which errors mean that memory ran out. Torch-free."""

from __future__ import annotations

import errno
import math
import re

from keyhole.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# What torch says on the CPU, where it has no class of its own for it: its allocator, oneDNN's, a C++ library's, and
# those of CUDA's libraries that allocate for themselves.
_WORDS = (
    "DefaultCPUAllocator",
    "could not create a memory object",
    "bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def parse_memory(text: str, option: str = "--memory") -> int | None:
    """Bytes of `5GB`, `4GiB`, `800MB` or `1.5g`; None for `auto`. GB is 10^9 bytes, GiB 2^30.

    Raises:
        ConfigError: neither `auto` nor a positive number with a unit.
    """
    if text.strip().lower() == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?(b?)", text.strip(), re.IGNORECASE)
    # a bare number would be taken for GB by one and for bytes by another
    if match is None or not (match[2] or match[3]) or float(match[1]) == 0:
        raise ConfigError(f"{option} {text}: expected `auto` or a size with its unit, such as 5GB, 4GiB or 800MB")
    return math.floor(float(match[1]) * _UNITS[(match[2] or "").lower()])


def memory_text(size: int, up: bool = False) -> str:
    """Return `4.2 GB`, `800 MB` or `12 kB`; with `up` never less than `size`, and written as in an option."""
    unit, name, digits = (10**9, "GB", 1) if size >= 995 * 10**6 else (10**6, "MB", 0)
    if size < 995 * 10**3:
        unit, name = 10**3, "kB"
    if up:
        steps = math.ceil(size / unit * 10**digits)
        return f"{steps / 10**digits:.{digits}f}{name}"
    return f"{size / unit:.{digits}f} {name}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, of the device or of the process."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    text = str(error)
    # oneDNN has no other word for it here; what it says of a shape it cannot do is "... primitive descriptor ..."
    return isinstance(error, RuntimeError) and (
        text == "could not create a primitive" or any(words in text for words in _WORDS)
    )
