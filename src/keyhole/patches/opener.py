"""Openers of image files: they say how patches are made, so that a reading thread can open the file later."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import ConfigError
from keyhole.images.image import Image
from keyhole.images.scale import given_scale
from keyhole.patches.edge import Edge
from keyhole.patches.foreground.rules import FOREGROUND_RULES, Rule
from keyhole.patches.grid import Foreground, NoPatches, PatchGrid, reading_level
from keyhole.patches.image_cache import ImageCache
from keyhole.patches.sources import FilePatches, View


@dataclass(frozen=True)
class FileOpener:
    """Opens the patches of one image file when called; making an opener costs nothing.

    Attributes:
        path: the file.
        name: for messages; as the manifest writes it.
        size, stride, level, mpp, bits, foreground, min_foreground, edge: as in `config.PatchConfig`.
        mask: PNG or GeoJSON, for the foreground `mask`.
        channels: 1 or 3; None as in the file.
        view, offset: the geometric augmentation of this image in this epoch.
        cache: opens the file, or has it in memory.
        image_mpp: microns per level-0 pixel, instead of those of the file.

    >>> import PIL.Image
    >>> PIL.Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save("black.png")
    >>> source = FileOpener(Path("black.png"), "black.png", size=32)()
    >>> len(source), source.read([5]).shape, source.grid.boxes([5]).tolist()
    (6, (1, 32, 32, 3), [[64, 32, 32, 32]])
    """

    path: Path
    name: str
    size: int
    stride: int | None = None
    level: int | None = None
    mpp: float | None = None
    bits: int | None = None
    foreground: Rule = "all"
    min_foreground: float = 0.01
    mask: Path | None = None
    channels: int | None = None
    view: View = field(default_factory=View)
    offset: tuple[int, int] = (0, 0)
    cache: ImageCache = field(default_factory=ImageCache)
    image_mpp: float | None = None
    edge: Edge | Literal["auto"] = "background"

    def __post_init__(self) -> None:
        if self.image_mpp is not None:
            given_scale(self.image_mpp)

    def __call__(self) -> FilePatches:
        """Open the file and make the grid.

        Raises:
            ImageError: the file, or its mask, is broken.
            ConfigError: its size or resolution does not allow the patches, or the foreground leaves none.
        """
        image = self.cache.open(self.path, self._level, self.bits)
        stated = image.mpp
        try:
            source = FilePatches(image, self.grid(image), self.view, self.channels, self.name)
            source.file_mpp = stated
            return source
        except BaseException:
            image.close()
            raise

    @property
    def at_hand(self) -> bool:
        """Whether opening reads no file: the image and its mask, if it needs one, are in memory."""
        rule = FOREGROUND_RULES[self.foreground]
        made = not rule.has_mask or (self.path, self.foreground, self._mask_file) in self.cache.masks
        try:
            return made and self.cache.holds(self.path, self._level)
        except ConfigError:
            return False  # opening it says what is wrong

    @property
    def _places(self) -> tuple[object, ...]:
        """What the places of the patches depend on."""
        where = self.path, self._mask_file, self.size, self.stride, self.level, self.mpp, self.image_mpp, self.bits
        return *where, self.foreground, self.min_foreground, self.edge, self.offset

    def _level(self, image: Image) -> int:
        return reading_level(image, self.mpp, self.level, self.image_mpp)[0]

    @property
    def _mask_file(self) -> Path | None:
        return self.mask if FOREGROUND_RULES[self.foreground].from_file else None

    def grid(self, image: Image) -> PatchGrid:
        """Return the grid over the opened image, whose resolution becomes `image_mpp`.

        Grids with a mask over an image in memory are made once, unless they take a good part of its memory.
        """
        if self.image_mpp is not None:
            image.mpp = self.image_mpp
        known = self.cache.grids.get(self._places)
        if known is not None:
            return known
        grid = self._new_grid(image)
        masked = FOREGROUND_RULES[self.foreground].has_mask and self.offset == (0, 0)
        if masked and (held := image.in_memory(grid.level)) is not None and grid.nbytes <= held.nbytes / 16:
            self.cache.grids[self._places] = grid
        return grid

    def _new_grid(self, image: Image) -> PatchGrid:
        mask, rule = self.foreground_mask(), FOREGROUND_RULES[self.foreground]
        covered = None
        if mask is not None:
            name = f"foreground mask ({self.mask if rule.from_file else self.foreground})"
            if rule.from_file and not mask.any():
                raise NoPatches(
                    f"{self.path}: no patches: the {name} has nothing inside the image. Is it of this image, and in "
                    "its pixels at full resolution, not in microns?"
                )
            covered = Foreground(mask, self.min_foreground if rule.uses_share else 0.0, name)
        grid = partial(PatchGrid, image, self.size, self.stride, self.mpp, level=self.level, edge=self.edge)
        try:
            return grid(offset=self.offset, mask=covered)
        except NoPatches:
            if self.offset == (0, 0):
                raise
            # A speck of foreground may have the least share of a patch in one place of the grid and not in another.
            return grid(mask=covered)

    def foreground_mask(self) -> NDArray[np.bool_] | None:
        """Return the mask (rows, cols) of the patches in the grid; None if all are."""
        rule = FOREGROUND_RULES[self.foreground]
        if not rule.has_mask:
            return None
        if rule.from_file and self.mask is None:
            raise ConfigError(
                f"{self.path}: patch.foreground (=mask) needs a mask of this image. Give a column `mask` (PNG or "
                "GeoJSON), or a folder of masks with the images' names: --data.masks DIR, or --masks DIR of keyhole "
                "predict"
            )
        return self.cache.foreground(self.path, self.foreground, self._mask_file, self.bits)
