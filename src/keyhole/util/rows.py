"""Rows of an array, copied once, into memory that exists already."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def take_rows(array: NDArray[Any], index: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Write the rows `array[index]` into `out`.

    `out[...] = array[index]` makes all rows in other memory first, and so does `np.take(out=)` unless its mode is not
    to check the index; so the index is checked here. Arrays that lie in memory in another order go the slow way.

    Args:
        array: (n, ...).
        index: (k,); negative ones count from the end.
        out: (k, ...) of the array's type.

    Raises:
        IndexError: a row that the array does not have.
    """
    plain = array.flags.c_contiguous and array.flags.aligned and out.flags.c_contiguous and out.dtype == array.dtype
    if plain and index.ndim == 1 and index.size and index.min() >= 0 and index.max() < len(array):
        np.take(array, index, axis=0, out=out, mode="clip")
    else:
        out[...] = array[index]
