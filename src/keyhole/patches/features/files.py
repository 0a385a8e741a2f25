"""Files of stored features: rows of numbers, which stay on the disk until they are read, and their coordinates."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ImageError
from keyhole.images.faults import check_reachable, one_line, raise_if_lost
from keyhole.patches.features.grid import number
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

SETTINGS = "keyhole_settings"
"""Attribute of the dataset `features` in which `keyhole embed` writes its settings, as JSON."""
NAMES = ("encoder", "extractor", "weights_sha256", SETTINGS, "patch_size", "target_magnification")
"""Attributes that state the origin, under the names of keyhole, TRIDENT and STAMP."""
STAMP = ("stamp_version", "tile_size_um", "tile_size_px", "tile_size", "unit")
"""Attributes that STAMP writes on the file."""

Floats = NDArray[np.float32]
Coordinates = NDArray[np.int32]


@dataclass(frozen=True)
class Origin:
    """Where features come from: the encoder, SHA-256 of its weights, the patches in words; None if not stated."""

    encoder: str | None = None
    weights: str | None = None
    patches: str | None = None

    @property
    def known(self) -> bool:
        return self.encoder is not None or self.weights is not None

    def describe(self) -> str:
        name = self.encoder or "an encoder"
        return name if self.weights is None else f"{name} with weights {self.weights[:8]}"

    def excludes(self, other: Origin) -> bool:
        """Return whether features of the two cannot be compared, because their weights or encoders differ."""
        if self.weights is not None and other.weights is not None:
            return self.weights != other.weights
        return self.encoder is not None and other.encoder is not None and self.encoder != other.encoder

    def doubt(self, learned: Origin) -> str:
        """Return why predictions on these features are doubtful for a model that learned from `learned`, or ""."""
        if not self.known:
            known = f"; the others, or the model, are of {learned.describe()}" if learned.known else ""
            return f"features do not say which encoder made them{known}. Make sure that it is one for all of them"
        if not learned.known:
            return f"features are of {self.describe()}; those that the model learned from did not say their encoder"
        if self.patches is not None and learned.patches is not None and self.patches != learned.patches:
            return f"features are of patches of {self.patches}; the others, or the model, are of {learned.patches}"
        return ""


UNKNOWN = Origin()


def origin_of(attributes: Mapping[str, Any]) -> Origin:
    """Return the origin that the attributes NAMES and STAMP of a file state; values of other types are ignored."""
    encoder = _text(attributes.get("encoder")) or _text(attributes.get("extractor"))
    return Origin(encoder, _text(attributes.get("weights_sha256")), _patches(attributes))


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str) and value else None


def _patches(attributes: Mapping[str, Any]) -> str | None:
    text = _text(attributes.get(SETTINGS))
    if text is not None:
        try:
            return patches_in_words(json.loads(text))
        except (ValueError, AttributeError):
            return None
    pixels, microns = number(attributes, "tile_size_px"), number(attributes, "tile_size_um")
    if microns is not None:
        return f"{microns:g} microns" if pixels is None else f"{pixels:g} px, {microns:g} microns"
    size, power = number(attributes, "patch_size"), number(attributes, "target_magnification")
    return None if size is None or power is None else f"{size:g} px at {power:g}x"


def patches_in_words(settings: Mapping[str, Any]) -> str | None:
    """Describe settings `patch.size` and others with which patches are cut; None without a size."""
    size, stride = settings.get("patch.size"), settings.get("patch.stride")
    if size is None:
        return None
    mpp, foreground, edge = (settings.get(f"patch.{name}") for name in ("mpp", "foreground", "edge"))
    words = [
        f"{size} px",
        f"stride {stride}" if stride not in (None, size) else "",
        f"level {settings.get('patch.level') or 0}" if mpp is None else f"{mpp:g} microns per pixel",
        f"foreground {foreground}" if foreground not in (None, "all") else "",
        f"edge {edge}" if edge not in (None, "background") else "",  # older files always have the background
    ]
    return ", ".join(filter(None, words))


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
                problem = f"feature {first + int(np.argmin(good))} holds NaN or infinity."
                raise ImageError(self.path, f"{problem} Extract the features of this slide again, in float32.")

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
    """Refuse coordinates of another shape before they are read, since they could take any amount of memory."""
    if shape != (n, 2):
        raise ImageError(path, f"coords are of shape {shape}, expected ({n}, 2): one x, y for each feature.")


def checked_coords(path: Path, coords: NDArray[Any], n: int) -> Coordinates:
    """Return coordinates (n, 2) as whole numbers."""
    coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
    check_coords_shape(path, coords.shape, n)
    if coords.dtype.kind not in "iuf" or not -MAX_COORDINATE <= coords.min() <= coords.max() <= MAX_COORDINATE:
        raise ImageError(path, "coords are not pixels of a slide, expected level-0 x, y. Extract them again.")
    return np.rint(coords).astype(np.int32) if coords.dtype.kind == "f" else coords.astype(np.int32)


@contextmanager
def feature_faults(path: Path, what: str) -> Iterator[None]:
    """Raise an ImageError of one line for any error of the libraries on a damaged file."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise_if_lost(path, error)
        check_reachable(path, str(error))
        raise ImageError(path, f"{what} ({one_line(error)}). Copy the file again, or extract it again.") from error
