"""Files of stored features: rows of numbers, and where on the slide they are from. Rows stay on the disk until read."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import LOST, check_reachable, lost, one_line
from keyhole.patches.features.origin import UNKNOWN, Origin
from keyhole.util.threads import beat
from keyhole.util.wording import from_to

MAX_READ_BYTES = 2**22
MAX_CONVERTED = 2**15
"""Numbers that torch converts on the calling thread, without threads of its own."""
MAX_COORDINATE = 2**31 - 1
ATTRIBUTES = (
    *("patch_size", "patch_size_level0", "patch_level", "downsample", "custom_downsample", "overlap", "level_dim"),
    *("level0_magnification", "target_magnification", "level0_width", "level0_height", "mpp", "stride", "edge"),
    "qupath_origin",
)
"""What a file may state about its patches, under the names of CLAM, TRIDENT and keyhole."""

Floats = NDArray[np.float32]
Coordinates = NDArray[np.int32]


class FeatureFile(ABC):
    """An open file of `n` features of `d` values. Safe to read from several threads.

    `coords` are level-0 x, y (n, 2) of the patches' upper left corners, `coords_um` the same in microns.
    """

    suffixes: ClassVar[tuple[str, ...]]
    path: Path
    n: int
    d: int
    coords: Coordinates | None
    coords_um: Floats | None = None
    attributes: Mapping[str, Any]
    origin: Origin = UNKNOWN

    def read(self, start: int, stop: int, out: Floats) -> None:
        """Write the rows `start` to `stop` into `out` (stop - start, d); ImageError if damaged, NaN or infinite."""
        step = max(1, MAX_READ_BYTES // (4 * self.d))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows = out[first - start : last - start]
            with feature_faults(self.path, f"features {from_to(str(first), str(last - 1))} cannot be read"):
                self._read(first, last, rows)
            beat()
            good = np.isfinite(rows).all(axis=1)
            if not good.all():
                raise ImageError(
                    self.path,
                    f"feature {first + int(np.argmin(good))} holds NaN or infinity. Extract the features of this "
                    "slide again, in float32.",
                )

    @abstractmethod
    def _read(self, start: int, stop: int, out: Floats) -> None:
        """Write rows into `out`, in float32."""

    @abstractmethod
    def close(self) -> None: ...


def widen(rows: NDArray[Any], out: Floats) -> None:
    """Write numbers (k, d) of any kind into `out` as float32.

    numpy converts float16 three times as slowly as the disk reads them; torch, where it is loaded, does not.
    """
    torch, step = sys.modules.get("torch"), MAX_CONVERTED // max(1, out.shape[1])
    loaded = hasattr(torch, "vmap")  # its last name; without it another thread is still importing torch
    if rows.dtype != np.float16 or not loaded or step == 0:
        out[...] = rows
        return
    assert torch is not None
    narrow, wide = torch.from_numpy(rows), torch.from_numpy(out)
    for start in range(0, len(rows), step):
        wide[start : start + step].copy_(narrow[start : start + step])


def check_coords_shape(path: Path, shape: tuple[int, ...], n: int) -> None:
    """Refuse coordinates of another shape before reading them, which could take any amount of memory."""
    if shape != (n, 2):
        raise ImageError(path, f"coords are of shape {shape}, expected ({n}, 2): one x, y for each feature.")


def checked_coords(path: Path, coords: NDArray[Any], n: int) -> Coordinates:
    """Coordinates (n, 2) as whole numbers."""
    coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
    check_coords_shape(path, coords.shape, n)
    if coords.dtype.kind not in "iuf" or not -MAX_COORDINATE <= coords.min() <= coords.max() <= MAX_COORDINATE:
        raise ImageError(path, "coords are not pixels of a slide, expected level-0 x, y. Extract them again.")
    return np.rint(coords).astype(np.int32) if coords.dtype.kind == "f" else coords.astype(np.int32)


@contextmanager
def feature_faults(path: Path, what: str) -> Iterator[None]:
    """Raise an ImageError of one line for whatever the libraries raise on a damaged file."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LOST:
            raise lost(path, error) from error
        check_reachable(path, str(error))
        raise ImageError(path, f"{what} ({one_line(error)}). Copy the file again, or extract it again.") from error
