"""Augmentation, drawn from (seed, epoch, image) alone, so that both passes and a resumed run see the same pixels."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.config.settings import AugmentConfig
from keyhole.patches.sources import View

_LUMA = np.array([0.299, 0.587, 0.114])
# RGB -> YIQ, in which a change of hue is a rotation of the last two axes
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True)
class Draw:
    """The changes of one image in one epoch.

    Attributes:
        view: flips and quarter turns.
        offset: shift of the patch grid in output pixels, 0 or negative, so that the grid covers the whole image.
        color: (c c+1) affine change of the channels, or None.
    """

    view: View = field(default_factory=View)
    offset: tuple[int, int] = (0, 0)
    color: Tensor | None = None


def draw(config: AugmentConfig, seed: int, epoch: int, name: str, stride: int, channels: int) -> Draw:
    """Draw the changes of the image `name` in `epoch`."""
    rng = np.random.default_rng([seed, epoch, zlib.crc32(name.encode())])
    flips, turns = rng.integers(0, 2, 2), rng.integers(0, 4)
    shift = rng.integers(0, stride, 2)
    factors = rng.uniform(-1, 1, 4) * config.color
    view = View(
        flip_x=config.flip and bool(flips[0]),
        flip_y=config.flip and bool(flips[1]),
        turns=int(turns) if config.rotate else 0,
    )
    offset = (-int(shift[0]), -int(shift[1])) if config.shift else (0, 0)
    return Draw(view, offset, color_matrix(factors, channels) if config.color > 0 else None)


def color_matrix(factors: np.ndarray[tuple[int], np.dtype[np.float64]], channels: int) -> Tensor:
    """Return brightness, contrast, saturation and hue, in this order, as one affine map (c c+1) of pixels in 0 ... 1.

    `factors` (4,) are relative changes; hue turns by its factor times half a circle. Contrast is about mid-grey, not
    about a patch's mean, so that all patches of an image change alike. One channel has no saturation and hue.
    """
    brightness, contrast, saturation, hue = 1 + factors[0], 1 + factors[1], 1 + factors[2], factors[3] * math.pi
    matrix, bias = np.eye(channels) * brightness * contrast, np.full(channels, 0.5 * (1 - contrast))
    if channels == 3:
        saturate = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
        turn = np.array([[1, 0, 0], [0, math.cos(hue), -math.sin(hue)], [0, math.sin(hue), math.cos(hue)]])
        rotate = np.linalg.inv(_YIQ) @ turn @ _YIQ
        matrix, bias = rotate @ saturate @ matrix, rotate @ saturate @ bias
    return torch.from_numpy(np.concatenate([matrix, bias[:, None]], axis=1)).float()


def stack_colors(draws: list[Draw]) -> NDArray[np.float32] | None:
    """Return the colour changes (b c c+1) of a batch, or None without any."""
    colors = [each.color for each in draws if each.color is not None]
    return torch.stack(colors).numpy() if colors else None
