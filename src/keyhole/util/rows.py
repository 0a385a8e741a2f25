"""Checks indices of rows, and copies rows of an array into existing memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def checked_index(index: ArrayLike | slice, n: int, what: str = "patch") -> NDArray[np.int64]:
    """Return `index` as int64 (k,), or raise IndexError or ValueError if it is not of integers in 0 ... n - 1."""
    if isinstance(index, slice):
        return np.arange(*index.indices(n), dtype=np.int64)
    flat = np.asarray(index)
    if flat.ndim != 1 or (flat.size and flat.dtype.kind not in "iu"):
        raise ValueError(f"index must be a slice or one row of integers, not {flat.dtype} {flat.shape}")
    flat = flat.astype(np.int64)
    if flat.size and not (flat.min() >= 0 and flat.max() < n):
        raise IndexError(f"{what} index {flat.min()} ... {flat.max()} outside 0 ... {n - 1}")
    return flat


def take_rows(array: NDArray[Any], index: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Write the rows `array[index]` into `out` of the same type.

    `out[...] = array[index]` copies all rows twice, and so does `np.take(out=)` unless it does not check the index; so
    the index is checked here. Arrays that are not C-contiguous take the slow way.
    """
    plain = array.flags.c_contiguous and array.flags.aligned and out.flags.c_contiguous and out.dtype == array.dtype
    if plain and index.ndim == 1 and index.size and index.min() >= 0 and index.max() < len(array):
        np.take(array, index, axis=0, out=out, mode="clip")
    else:
        out[...] = array[index]
