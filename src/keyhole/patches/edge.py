"""What becomes of patches that reach over an image's border: where they lie along one axis, and what they show.

`drop` leaves them out, `shift` moves them inwards until they fit, `reflect` mirrors the image at its border, and
`background` fills what is outside.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.images.image import Image

Edge = Literal["drop", "shift", "reflect", "background"]
Index = NDArray[np.int64]


def edge_for(image: Image) -> Edge:
    """The rule that `auto` stands for: `background` for slides, whose border is glass, and `shift` for photographs.

    An image with more than one level counts as a slide. The measurement is benchmarks/edge_2cpu_2026-11-26.md.
    """
    return "background" if len(image.levels) > 1 else "shift"


def place_patches(extent: int, size: int, stride: int, offset: int, edge: Edge) -> Index:
    """Where patches begin along one axis, in rising order; at least one.

    Args:
        extent: pixels of the image along the axis, at least `size`.
        size: side of a patch.
        stride: step between patches.
        offset: where the first one begins, below `extent`. With a negative one, patches are at `offset` plus multiples
            of the stride, as far as they show some of the image; under `drop`, as far as they lie inside it.
        edge: the rule.
    """
    last = extent - size
    if edge == "drop":
        return np.arange(min(offset if offset >= 0 else offset % stride, last), last + 1, stride, dtype=np.int64)
    if edge != "background" and offset < 0:
        offset = -(-offset % stride)  # one patch over the upper border is enough
    unseen = max(0, -((offset + size - 1) // stride))
    first = offset + unseen * stride
    if first >= extent:  # the whole image lies between two patches
        first = last
    covering = -((first - last) // stride) + 1
    touching = -((first - extent) // stride)  # fewer than `covering` only where the stride exceeds the size
    starts = first + np.arange(max(1, min(covering, touching)), dtype=np.int64) * stride
    # Of patches that are moved to the same place, as where the image is no larger than a patch, there is one.
    return np.unique(inside(starts, extent, size)) if edge == "shift" else starts


def inside(starts: Index, extent: int, size: int) -> Index:
    """Each patch moved until it lies wholly inside the image."""
    return starts.clip(0, extent - size)


def mirrored(start: int, size: int, extent: int) -> Index:
    """The pixels inside the image that a patch shows under `reflect`; the border pixel itself is not repeated."""
    pixels = np.abs(np.arange(start, start + size, dtype=np.int64))
    return np.where(pixels >= extent, 2 * (extent - 1) - pixels, pixels)
