"""Sets what a GPU does with float32: multiply it as it is, or round it to TF32 before.

TF32 keeps 10 of the 23 bits of the inputs of a convolution or a matrix product. Results differ by a thousandth, and it
is many times as fast. By default torch uses it for convolutions but not for matrix products. The settings hold for the
whole process, so keyhole changes them around its own computations only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def tf32(use: bool) -> Iterator[None]:
    """Round float32 to TF32 in convolutions and matrix products inside, or never; then restore the settings.

    Torch has an older interface for this, which exists everywhere and which its compiler reads, and that of torch 2.9.
    The older one raises where only the newer one can express what a caller has set; then the newer one is used.
    """
    wanted = use, "high" if use else "highest"
    try:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        before = None
    if before == wanted:
        yield
        return
    # Of the newer interface, if there is one: convolutions and products of a GPU, and products of a CPU.
    backends: Any = torch.backends
    newer = hasattr(backends.cudnn, "conv")
    places = [backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.matmul] if newer else []
    precisions = [place.fp32_precision for place in places]
    try:
        if before is None:
            _set(None, places[:2], ["tf32" if use else "ieee"] * 2)
        else:
            _set(wanted, [], [])
        yield
    finally:
        _set(before, places, precisions)


def _set(older: tuple[bool, str] | None, places: list[Any], precisions: list[str]) -> None:
    """Set what differs, in the older interface and in places of the newer one."""
    if older is not None:
        if torch.backends.cudnn.allow_tf32 != older[0]:
            torch.backends.cudnn.allow_tf32 = older[0]
        if torch.get_float32_matmul_precision() != older[1]:
            torch.set_float32_matmul_precision(older[1])
    for place, precision in zip(places, precisions, strict=True):
        if place.fp32_precision != precision:
            place.fp32_precision = precision
