"""Files of stored features: rows of numbers, and where on the slide they are from.

HDF5 as CLAM, TRIDENT and `keyhole embed` write it, and tensors in `.pt`. Rows stay on the disk until asked for.
"""

from __future__ import annotations

import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import LOST, check_reachable, lost, one_line
from keyhole.patches.features.origin import UNKNOWN, Origin
from keyhole.util.threads import beat
from keyhole.util.wording import from_to

TORCH_SUFFIX = ".pt"
PIECE = 2**22
"""Bytes read at once."""
ALONE = 2**15
"""Numbers that torch converts on the thread that asks for it."""
LARGEST_COORDINATE = 2**31 - 1
ATTRIBUTES = (
    *("patch_size", "patch_size_level0", "patch_level", "downsample", "custom_downsample", "overlap", "level_dim"),
    *("level0_magnification", "target_magnification", "level0_width", "level0_height", "mpp", "stride", "edge"),
    "qupath_origin",
)
"""What a file may say of its patches, under the names of CLAM, TRIDENT and keyhole."""

Floats = NDArray[np.float32]
Coordinates = NDArray[np.int32]


class FeatureFile(ABC):
    """An open file of features. Safe to read from several threads.

    Attributes:
        path: the file.
        n, d: features, and numbers of each.
        coords: level-0 x, y (n, 2) of the patches' upper left corners; None where the file has none.
        coords_um: the same in microns, where the file has them in microns.
        attributes: those of ATTRIBUTES and STAMP that the file has.
        origin: which encoder made them, as far as the file says it.
    """

    path: Path
    n: int
    d: int
    coords: Coordinates | None
    coords_um: Floats | None = None
    attributes: Mapping[str, Any]
    origin: Origin = UNKNOWN

    def read(self, start: int, stop: int, out: Floats) -> None:
        """Rows `start` to `stop`, written into `out` (stop - start, d).

        Raises:
            ImageError: the file is damaged there, or holds what is no number.
        """
        step = max(1, PIECE // (4 * self.d))
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
        """Rows into `out`, in float32."""

    @abstractmethod
    def close(self) -> None: ...


def widen(rows: NDArray[Any], out: Floats) -> None:
    """Writes numbers (k, d) of any kind into `out` as float32.

    numpy converts float16 number by number, which takes three times as long as reading them. torch does not; where it
    is loaded, as in every process that computes, it converts. Few numbers at a time: of many it would start threads of
    its own in each reading thread.
    """
    torch, step = sys.modules.get("torch"), ALONE // max(1, out.shape[1])
    loaded = hasattr(torch, "vmap")  # its last name: else another thread is still importing it
    if rows.dtype != np.float16 or not loaded or step == 0:
        out[...] = rows
        return
    assert torch is not None
    narrow, wide = torch.from_numpy(rows), torch.from_numpy(out)
    for start in range(0, len(rows), step):
        wide[start : start + step].copy_(narrow[start : start + step])


def open_features(path: Path) -> FeatureFile:
    """Opens a file of features by its suffix: `.pt` by torch, every other as HDF5.

    Raises:
        ImageLost: no such file, or its disk or share does not answer.
        ImageError: not a regular file, empty, damaged, or not of the layout expected.
    """
    with feature_faults(path, "cannot be read"):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "not a regular file, expected features as .h5 or .pt.")
        if status.st_size == 0:
            raise ImageError(path, "the file is empty (0 bytes). Copy it again.")
    if path.suffix.lower() == TORCH_SUFFIX:
        from keyhole.patches.features.pt import TorchFeatures

        return TorchFeatures(path, status.st_size)
    from keyhole.patches.features.hdf5 import Hdf5Features

    return Hdf5Features(path)


def check_coords_shape(path: Path, shape: tuple[int, ...], n: int) -> None:
    """Before they are read: what a file declares decides how much memory that takes."""
    if shape != (n, 2):
        raise ImageError(path, f"coords are of shape {shape}, expected ({n}, 2): one x, y for each feature.")


def checked_coords(path: Path, coords: NDArray[Any], n: int) -> Coordinates:
    """Coordinates (n, 2) as whole numbers."""
    coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
    check_coords_shape(path, coords.shape, n)
    if coords.dtype.kind not in "iuf" or not -LARGEST_COORDINATE <= coords.min() <= coords.max() <= LARGEST_COORDINATE:
        raise ImageError(path, "coords are no pixels of a slide, expected level-0 x, y. Extract them again.")
    return np.rint(coords).astype(np.int32) if coords.dtype.kind == "f" else coords.astype(np.int32)


@contextmanager
def feature_faults(path: Path, what: str) -> Iterator[None]:
    """Whatever the libraries raise on a damaged file becomes an ImageError of one line."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LOST:
            raise lost(path, error) from error
        check_reachable(path, str(error))
        raise ImageError(path, f"{what} ({one_line(error)}). Copy the file again, or extract it anew.") from error
