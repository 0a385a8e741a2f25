"""Where a generated slide has tissue, fat and nests: coarse maps of the whole slide, the same size for any slide.

A map holds, at 193 x 193 nodes, roughly the number of pixels that a place lies inside an edge; negative is outside.
Values between the nodes are interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keyhole.datasets.slide_texture import NUCLEI, REACH, Texture, smooth_noise
from keyhole.datasets.tiff_pyramid import TILE
from keyhole.errors import ConfigError
from keyhole.images.geometry import Box

Values = NDArray[np.float32]

CELLS = 192
"""Cells along each side of a map."""
EDGE = 64
"""Pixels around an edge of tissue within which it is rough; further inside, everything is tissue."""
TISSUE = (0.3, 0.6)
NEST_SHARE, MAX_NEST_SHARE = 0.0009, 0.001
"""Shares of the tissue's pixels that nests take up."""
MAX_TRIES = 2000
"""Batches of 256 places that are tried; the largest slide needs about 500."""
GAP = 8
"""Free pixels between two nests."""


@dataclass(frozen=True, eq=False)
class Tissue:
    """The maps of one slide, each (193, 193) from its upper left to its lower right corner."""

    side: int
    inside: Values
    fat: Values
    stain: Values  # strength, 0 ... 1
    share: float  # of the slide, that is tissue

    def nodes(self, map_: Values, column: int, row: int) -> Values:
        """Return the values of a map around a tile."""
        rows, columns = (
            slice(int(start * TILE * CELLS / self.side), int((start + 1) * TILE * CELLS / self.side) + 2)
            for start in (row, column)
        )
        return map_[rows, columns]

    def at(self, map_: Values, x: NDArray[np.float64], y: NDArray[np.float64]) -> Values:
        """Return the values of a map (k,) at level-0 pixels x and y (k,)."""
        i, u = self._places(y)
        j, v = self._places(x)
        upper = map_[i, j] * (1 - v) + map_[i, j + 1] * v
        lower = map_[i + 1, j] * (1 - v) + map_[i + 1, j + 1] * v
        return np.asarray(upper * (1 - u) + lower * u, np.float32)

    def over_tile(self, map_: Values, column: int, row: int) -> Values:
        """Return the values of a map (256, 256) at the pixels of a tile."""
        pixel = np.arange(TILE)
        i, u = self._places(row * TILE + pixel)
        j, v = self._places(column * TILE + pixel)
        rows = map_[i] * (1 - u)[:, None] + map_[i + 1] * u[:, None]
        return np.asarray(rows[:, j] * (1 - v) + rows[:, j + 1] * v, np.float32)

    def _places(self, pixel: NDArray[np.float64] | NDArray[np.int64]) -> tuple[NDArray[np.intp], Values]:
        place = np.minimum(pixel * (CELLS / self.side), CELLS - 1e-3)
        node = place.astype(np.intp)
        return node, (place - node).astype(np.float32)


def make_tissue(rng: np.random.Generator, side: int, tissue: float | None = None) -> Tissue:
    """Draw blobs of tissue on glass, with tears and fat; a share `tissue` of 1 is a slide without glass and fat."""
    share = rng.uniform(*TISSUE) if tissue is None else tissue
    stain = np.clip(0.94 + 0.04 * _noise(rng, 14), 0.8, 1.0)
    if share >= 1:
        far = np.full((CELLS + 1, CELLS + 1), 4.0 * EDGE, np.float32)
        return Tissue(side, far, -far, stain, 1.0)
    at = np.linspace(0, 1, CELLS + 1, dtype=np.float32)
    x, y = at[None, :], at[:, None]
    height = 0.35 * _noise(rng, 22) + 0.12 * _noise(rng, 7)
    for _ in range(rng.integers(3, 6)):
        cx, cy = rng.uniform(0.2, 0.8, 2)
        wide, high = rng.uniform(0.12, 0.26, 2)
        height += 1.6 * np.exp(-0.5 * (((x - cx) / wide) ** 2 + ((y - cy) / high) ** 2)).astype(np.float32)
    border = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) - 0.02
    level = np.sort(height[border > 0])[::-1][int(share * height.size)]
    # `height` falls by about 6 over the slide, which turns a difference in it into pixels.
    inside = np.minimum((height - level) / 6, border)
    tear = np.abs(_noise(rng, 30)) / 8 - 0.005 * np.clip(_noise(rng, 24) - 0.5, 0, 1)
    inside = np.minimum(inside, np.where(tear < 0, tear, np.inf)).astype(np.float32) * side
    fat = np.asarray((_noise(rng, 16) - 1.2) / 10 * side, np.float32)
    return Tissue(side, inside, fat, stain, float((inside > 0).mean()))


def _noise(rng: np.random.Generator, scale: float) -> Values:
    return smooth_noise(rng, 2 * CELLS, scale)[: CELLS + 1, : CELLS + 1]


@dataclass(frozen=True, eq=False)
class Nests:
    """The nests of a slide, in level-0 pixels."""

    boxes: NDArray[np.int64]  # x, y, width, height (k, 4)
    nuclei: NDArray[np.float64]  # centres (k, 3, 2)
    pixels: NDArray[np.int64]  # number of pixels (k,) that differ from a slide without the nest

    def by_tile(self) -> dict[tuple[int, int], list[int]]:
        """Return the indices of the nests by (column, row) of the tiles that they touch."""
        found: dict[tuple[int, int], list[int]] = {}
        for number, (x, y, width, height) in enumerate(self.boxes.tolist()):
            for row in range(y // TILE, (y + height - 1) // TILE + 1):
                for column in range(x // TILE, (x + width - 1) // TILE + 1):
                    found.setdefault((column, row), []).append(number)
        return found


def no_nests() -> Nests:
    return Nests(np.empty((0, 4), np.int64), np.empty((0, 3, 2)), np.empty(0, np.int64))


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
            covered = int(nest_mask(site, box).sum())
            if used + covered > budget and found:
                boxes, nuclei, pixels = zip(*found, strict=True)
                return Nests(np.array(boxes, np.int64), np.stack(nuclei), np.array(pixels, np.int64))
            cells = {(cx // TILE, cy // TILE) for cx in (x - GAP, right + GAP) for cy in (y - GAP, below + GAP)}
            if any(_near(box, other) for cell in cells for other in taken.get(cell, ())):
                continue
            for cell in cells:
                taken.setdefault(cell, []).append(box)
            found.append((box, site, covered))
            used += covered
    raise ConfigError(f"side, tissue: {tissue.side} px and {tissue.share:.0%} have no place for nests; ask for more.")


def nest_mask(nuclei: NDArray[np.float64], box: Box) -> NDArray[np.bool_]:
    """Return the pixels (height, width) of a box that belong to a nucleus; `nuclei` are their centres (..., 2)."""
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


def _near(one: Box, other: Box) -> bool:
    beside = one.x + one.width + GAP <= other.x or other.x + other.width + GAP <= one.x
    above = one.y + one.height + GAP <= other.y or other.y + other.height + GAP <= one.y
    return not (beside or above)
