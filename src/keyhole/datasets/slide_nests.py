"""The nests of a positive slide: groups of three neighbouring nuclei that are drawn hollow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from keyhole.datasets.slide_tissue import EDGE, NUCLEI, REACH, Texture, Tissue
from keyhole.datasets.tiff_pyramid import TILE
from keyhole.errors import ConfigError
from keyhole.images.geometry import Box

NEST_SHARE, MAX_NEST_SHARE = 0.0009, 0.001  # shares of the tissue's pixels that nests cover
MAX_TRIES = 2000  # batches of 256 places that are tried; the largest slide needs about 500
GAP = 8  # free pixels between two nests


@dataclass(frozen=True, eq=False)
class Nests:
    """The nests of a slide, in level-0 pixels."""

    boxes: NDArray[np.int64]  # x, y, width, height (k, 4)
    nuclei: NDArray[np.float64]  # centres (k, 3, 2)
    pixels: NDArray[np.int64]  # number of pixels (k,) that differ from a slide without the nest

    @cached_property
    def by_tile(self) -> dict[tuple[int, int], list[int]]:
        """Indices of the nests by (column, row) of the tiles that they touch."""
        found: dict[tuple[int, int], list[int]] = {}
        for number, (x, y, width, height) in enumerate(self.boxes.tolist()):
            for row in range(y // TILE, (y + height - 1) // TILE + 1):
                for column in range(x // TILE, (x + width - 1) // TILE + 1):
                    found.setdefault((column, row), []).append(number)
        return found

    def mask(self, numbers: Sequence[int], box: Box) -> NDArray[np.bool_]:
        """Return the pixels (height, width) of a box that belong to a nucleus of these nests."""
        return _near_centres(self.nuclei[numbers], box)


NO_NESTS = Nests(np.empty((0, 4), np.int64), np.empty((0, 3, 2)), np.empty(0, np.int64))


def place_nests(rng: np.random.Generator, tissue: Tissue, texture: Texture, shift: tuple[int, int]) -> Nests:
    """Place nests at random sites of `texture`, deep in tissue, away from fat and each other, up to their share.

    `shift` is x and y of the slide's corner in the picture of the nuclei.
    """
    budget = NEST_SHARE * tissue.share * tissue.side**2
    found: list[tuple[Box, NDArray[np.float64], int]] = []
    used = 0
    taken: dict[tuple[int, int], list[Box]] = {}
    for _ in range(MAX_TRIES):
        for site in _candidates(rng, tissue, texture, shift):
            x, y = map(int, np.floor(site.min(axis=0)) - REACH)
            right, below = map(int, np.floor(site.max(axis=0)) + REACH + 1)
            box = Box(x, y, right - x, below - y)
            covered = int(_near_centres(site, box).sum())
            if used + covered > budget and found:
                boxes, nuclei, pixels = zip(*found, strict=True)
                return Nests(np.array(boxes, np.int64), np.stack(nuclei), np.array(pixels, np.int64))
            cells = {(cx // TILE, cy // TILE) for cx in (x - GAP, right + GAP) for cy in (y - GAP, below + GAP)}
            if any(_touch(box, other) for cell in cells for other in taken.get(cell, ())):
                continue
            for cell in cells:
                taken.setdefault(cell, []).append(box)
            found.append((box, site, covered))
            used += covered
    raise ConfigError(f"side, tissue: {tissue.side} px and {tissue.share:.0%} have no place for nests; ask for more.")


def _near_centres(nuclei: NDArray[np.float64], box: Box) -> NDArray[np.bool_]:
    """Return the pixels (height, width) of a box within `REACH` of a centre (..., 2)."""
    x, y = np.arange(box.x, box.x + box.width), np.arange(box.y, box.y + box.height)
    mask = np.zeros((box.height, box.width), bool)
    for cx, cy in nuclei.reshape(-1, 2):
        mask |= (x[None, :] - cx) ** 2 + (y[:, None] - cy) ** 2 < REACH**2
    return mask


def _candidates(
    rng: np.random.Generator, tissue: Tissue, texture: Texture, shift: tuple[int, int]
) -> NDArray[np.float64]:
    """Draw up to 256 sites (k, 3, 2) in level-0 pixels, deep in tissue."""
    periods = rng.integers(0, -(-tissue.side // NUCLEI) + 1, (256, 1, 2))
    sites = texture.sites[rng.integers(len(texture.sites), size=256)] + periods * NUCLEI - np.array(shift)
    x, y = sites.mean(axis=1).T
    within = (sites > 2 * REACH).all(axis=(1, 2)) & (sites < tissue.side - 2 * REACH).all(axis=(1, 2))
    sites, x, y = sites[within], x[within], y[within]
    deep = (tissue.at(tissue.inside, x, y) > 1.5 * EDGE) & (tissue.at(tissue.fat, x, y) < -1.5 * EDGE)
    return np.asarray(sites[deep])


def _touch(one: Box, other: Box) -> bool:
    beside = one.x + one.width + GAP <= other.x or other.x + other.width + GAP <= one.x
    above = one.y + one.height + GAP <= other.y or other.y + other.height + GAP <= one.y
    return not (beside or above)
