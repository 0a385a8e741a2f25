"""Amounts of memory as text, and which errors mean that memory ran out. Torch-free."""

from __future__ import annotations

import errno
import math
import re

# What is said where torch has no class of its own for it: by its allocator on the CPU, oneDNN and C++ libraries; by
# CUDA's libraries that allocate for themselves; by torchvision, which passes on no more than the text of an error, and
# of nvJPEG's the number of its status, 5 (NVJPEG_STATUS_ALLOCATOR_FAILURE); and by compilers, which quote it all.
_WORDS = re.compile(
    r"DefaultCPUAllocator|could not create a memory object|bad_alloc"
    r"|CUDA out of memory|(CUDA error|Triton Error \[CUDA\]): out of memory"
    r"|(CUBLAS|CUSOLVER)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED"
    r"|CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED)"
    r"|Failed to [a-z ]*(nvjpeg|jpeg|buffer|batch|decod|image info)[a-z ]*: 5\b"
)
# What cuDNN says where no engine could have its work space, and cuBLAS where it has no room for itself. Both say the
# same of a computation or a device that they cannot do at all.
_DOUBTFUL = re.compile(
    r"[Uu]nable to find (an engine to execute this computation|a valid cuDNN algorithm)"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate"
)


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
    """Whether an error means that memory ran out, of the device or of the process, or may mean it: see `doubt`."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    text = str(error)
    # oneDNN has no other word for it here; what it says of a shape it cannot do is "... primitive descriptor ..."
    return isinstance(error, RuntimeError) and (
        text == "could not create a primitive" or _WORDS.search(text) is not None or bool(doubt(error))
    )


def doubt(error: BaseException) -> str:
    """The line that may mean that memory ran out, or something that less work at a time does not mend; else ""."""
    text = str(error)
    if not isinstance(error, RuntimeError) or _WORDS.search(text) is not None:
        return ""
    return next((line.strip() for line in text.splitlines() if _DOUBTFUL.search(line)), "")


def explained(
    error: BaseException, said: str, advice: str, encoder: str = "--model.encoder", device: str = "--run.device"
) -> str:
    """Return a message for an error of which `out_of_memory` is true: `said` and `advice`; its own text if in doubt.

    `encoder` and `device` are the options that name those; "" if there is none.
    """
    own = doubt(error)
    if not own:
        return f"{said}: {advice}"
    other = f"try another {encoder}, or {device} cpu" if encoder else f"try {device} cpu"
    return f"{own} ({said}?). If memory is short, {advice}. If not, torch cannot compute this encoder here: {other}"
