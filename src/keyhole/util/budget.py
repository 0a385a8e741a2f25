"""Amounts of memory as text, and which errors mean that memory ran out. Torch-free."""

from __future__ import annotations

import errno
import math
import re

# Messages for which torch has no class: of its CPU allocator, oneDNN and C++ libraries; of CUDA libraries that allocate
# by themselves; of torchvision, which passes on the text only, and nvJPEG's status as a number, 5
# (NVJPEG_STATUS_ALLOCATOR_FAILURE); and of compilers, which quote the others.
_WORDS = re.compile(
    r"DefaultCPUAllocator|could not create a memory object|bad_alloc"
    r"|CUDA out of memory|(CUDA error|Triton Error \[CUDA\]): out of memory"
    r"|(CUBLAS|CUSOLVER)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED"
    r"|CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED)"
    r"|Failed to [a-z ]*(nvjpeg|jpeg|buffer|batch|decod|image info)[a-z ]*: 5\b"
)
# Messages of cuDNN when no engine gets its work space, and of cuBLAS when it gets no memory for itself. Both say the
# same of a computation or a device that they do not support.
_DOUBTFUL = re.compile(
    r"[Uu]nable to find (an engine to execute this computation|a valid cuDNN algorithm)"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate"
)


def memory_text(size: int, up: bool = False) -> str:
    """Return `4.2 GB`, `800 MB` or `12 kB`; with `up` rounded up and written as in an option."""
    unit, name, digits = (10**9, "GB", 1) if size >= 995 * 10**6 else (10**6, "MB", 0)
    if size < 995 * 10**3:
        unit, name = 10**3, "kB"
    if up:
        steps = math.ceil(size / unit * 10**digits)
        return f"{steps / 10**digits:.{digits}f}{name}"
    return f"{size / unit:.{digits}f} {name}"


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the process ran out of memory, or may mean it: see `doubt`."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    text = str(error)
    # the first is oneDNN's message; of a shape that it does not support it says "... primitive descriptor ..."
    return isinstance(error, RuntimeError) and (
        text == "could not create a primitive" or _WORDS.search(text) is not None or bool(doubt(error))
    )


def doubt(error: BaseException) -> str:
    """Return the line that may mean out of memory, or else an error that smaller chunks do not fix; "" if none does."""
    text = str(error)
    if not isinstance(error, RuntimeError) or _WORDS.search(text) is not None:
        return ""
    return next((line.strip() for line in text.splitlines() if _DOUBTFUL.search(line)), "")


def explained(
    error: BaseException, said: str, advice: str, encoder: str = "--model.encoder", device: str = "--run.device"
) -> str:
    """Return a message for an out-of-memory error: `said` and `advice`, with its own text if in doubt.

    `encoder` and `device` are the names of those options; "" if a command has none.
    """
    own = doubt(error)
    if not own:
        return f"{said}: {advice}"
    other = f"try another {encoder}, or {device} cpu" if encoder else f"try {device} cpu"
    return f"{own} ({said}?). If memory is short, {advice}. If not, torch cannot compute this encoder here: {other}"
