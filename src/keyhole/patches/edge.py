"""Edge rules: what happens to patches that reach over the border of an image.

A new rule is a subclass of `EdgeRule` in `EDGE_RULES`, and its name in `Edge` and in `config.PatchConfig`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.images.image import Image

Edge = Literal["drop", "shift", "reflect", "background"]
Index = NDArray[np.int64]


def edge_for(image: Image) -> Edge:
    """Return the rule that `auto` stands for: `background` for slides (several levels), else `shift`.

    The measurement is benchmarks/edge_2cpu_2026-11-26.md.
    """
    return "background" if len(image.levels) > 1 else "shift"


class EdgeRule:
    """`background`: patches that reach over the border show the background there.

    `inside`: patches lie wholly inside the image. `mirrors`: the image is mirrored outside.
    """

    inside = mirrors = False

    def starts(self, extent: int, size: int, stride: int, offset: int) -> Index:
        """Return where patches begin along one axis of `extent` >= `size` pixels, in rising order; at least one.

        If `offset` is negative, patches are at `offset` plus multiples of the stride.
        """
        last = extent - size
        if offset < 0 and (self.inside or self.mirrors):  # one patch over the upper border is enough
            offset = -(-offset % stride)
        first = offset + max(0, -((offset + size - 1) // stride)) * stride
        if first >= extent:  # the whole image lies between two patches
            first = last
        covering = -((first - last) // stride) + 1
        touching = -((first - extent) // stride)  # fewer than `covering` only where the stride exceeds the size
        return first + np.arange(max(1, min(covering, touching)), dtype=np.int64) * stride


class _Drop(EdgeRule):
    inside = True

    def starts(self, extent: int, size: int, stride: int, offset: int) -> Index:
        last = extent - size
        return np.arange(min(offset if offset >= 0 else offset % stride, last), last + 1, stride, dtype=np.int64)


class _Reflect(EdgeRule):
    mirrors = True


class _Shift(EdgeRule):
    inside = True

    def starts(self, extent: int, size: int, stride: int, offset: int) -> Index:
        # Several patches may be moved to the same place, such as where the image is no larger than a patch.
        return np.unique(super().starts(extent, size, stride, offset).clip(0, extent - size))


EDGE_RULES: dict[Edge, EdgeRule] = {
    "drop": _Drop(),
    "shift": _Shift(),
    "reflect": _Reflect(),
    "background": EdgeRule(),
}


def mirrored(start: int, size: int, extent: int) -> Index:
    """Return the pixels inside the image that a patch shows under `reflect`; the border pixel is not repeated."""
    pixels = np.abs(np.arange(start, start + size, dtype=np.int64))
    return np.where(pixels >= extent, 2 * (extent - 1) - pixels, pixels)
