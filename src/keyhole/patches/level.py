"""Which level of an image is read for the resolution that was asked for."""

from __future__ import annotations

from keyhole.errors import ConfigError
from keyhole.images.image import Image

SAME_SCALE = 1e-3
"""Scales that differ by less than this share are one: no resampling for a 0.1 % wrong `mpp`."""


def reading_level(
    image: Image, mpp: float | None, level: int | None, image_mpp: float | None = None
) -> tuple[int, float]:
    """Return the level to read, and the level-0 pixels per output pixel.

    Args:
        image: to be read.
        mpp: microns per output pixel; excludes `level`.
        level: whose pixels are the output pixels; default 0.
        image_mpp: microns per level-0 pixel, instead of the image's own.

    Raises:
        ConfigError: the image does not have the level, or its microns per pixel are not known.
    """
    if mpp is None:
        level = 0 if level is None else level
        if not 0 <= level < len(image.levels):
            last = len(image.levels) - 1
            known = f"one of the image's levels 0 ... {last}" if last else "0, the image's only level"
            raise ConfigError(f"{image.path}: patch.level (={level}) must be {known}")
        return level, image.levels[level].downsample
    if level is not None:
        raise ConfigError(f"patch.level (={level}) and patch.mpp (={mpp:g}) exclude each other; give one of them")
    image_mpp = image.mpp if image_mpp is None else image_mpp
    if image_mpp is None:
        why = f"are not known ({image.mpp_note})" if image.mpp_note else "the file does not say"
        raise ConfigError(
            f"{image.path}: patch.mpp (={mpp:g}) needs the image's microns per pixel, which {why}. "
            "Give a column `mpp` in a CSV, or --mpp of keyhole predict; or train on pixels as they are: "
            "--patch.mpp none"
        )
    scale = mpp / image_mpp
    level = max(i for i, lv in enumerate(image.levels) if i == 0 or lv.downsample <= scale * (1 + SAME_SCALE))
    downsample = image.levels[level].downsample
    return level, downsample if abs(scale / downsample - 1) <= SAME_SCALE else scale
