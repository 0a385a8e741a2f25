"""What a generated slide shows: periodic pictures of its texture, and coarse maps of its tissue and fat.

By the law of Beer and Lambert, exp(-(E e + H h)) of the light passes, where E and H are the amounts of eosin and
hematoxylin, and e and h what each absorbs of red, green and blue (Ruifrok and Johnston, 2001). Amounts add and light
multiplies, so the product of a picture of stroma and one of nuclei, with another period, shows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from keyhole.datasets.tiff_pyramid import TILE, Pixels

Values = NDArray[np.float32]
Number = TypeVar("Number", bound=np.generic)

STROMA, NUCLEI = 1024, 1280  # periods in pixels
COLUMNS, ROWS = 100, 116  # places for nuclei in a period: a triangular lattice of 12.8 by 11 px with jitter
JITTER = 1.4
RADIUS = (3.6, 4.9)  # half axes of nuclei in pixels
REACH = 6  # pixels around its centre that hold nearly all of a nucleus
_EOSIN = (0.07, 0.99, 0.11)
_HEMATOXYLIN = (0.65, 0.70, 0.29)
_CYTOPLASM = 0.05  # amount of hematoxylin outside of nuclei
_FULL = 2.5  # amount of a dye at the value 255
CELLS = 192  # cells along each side of a map
EDGE = 64  # pixels around an edge of tissue within which it is rough; further inside, everything is tissue
TISSUE = (0.3, 0.6)


@dataclass(frozen=True, eq=False)
class Texture:
    """The pictures of one slide; each repeats its first 256 rows and columns at the end, so that tiles do not wrap."""

    stroma: Pixels  # light that passes connective tissue (1280, 1280, 3)
    nuclei: Pixels  # share of the light that passes the nuclei (1536, 1536, 3); 255 is all
    hollow: Pixels  # like `nuclei`, with every nucleus hollow
    fat: Pixels  # like `stroma`: empty round cells with thin walls
    glass: Pixels  # a tile without tissue (256, 256, 3)
    rough: Values  # offset of the edge of tissue (1280, 1280), standard deviation 1
    sites: NDArray[np.float64]  # three neighbouring nuclei (k, 3, 2); may exceed the period


def make_texture(rng: np.random.Generator) -> Texture:
    """Draw the stains and nuclei of a slide; all slides share the patterns of stroma and fat."""
    light = rng.uniform(0.955, 0.96) * 255
    # What an amount of 1 of a dye absorbs of red, green and blue on this slide
    eosin, hematoxylin = (
        np.array(dye) * rng.uniform(0.99, 1.01, 3) * rng.uniform(0.985, 1.015) for dye in (_EOSIN, _HEMATOXYLIN)
    )
    filled, hollow, sites = _nuclei(rng, hematoxylin[1])
    through_eosin, through_hematoxylin = _table(eosin, light), _table(hematoxylin, 255)
    noise = np.random.default_rng(0).normal(0, 1.0, (TILE, TILE, 1))
    return Texture(
        stroma=_wrapped(through_eosin.take(_stroma(), axis=0)),
        nuclei=_wrapped(through_hematoxylin.take(filled, axis=0)),
        hollow=_wrapped(through_hematoxylin.take(hollow, axis=0)),
        fat=_wrapped(through_eosin.take(_fat(), axis=0)),
        glass=np.broadcast_to(np.round(light + noise), (TILE, TILE, 3)).astype(np.uint8),
        rough=_wrapped(_rough()),
        sites=sites,
    )


def _table(stain: NDArray[np.float64], light: float) -> Pixels:
    """Return the light (256, 3) that is left after each amount of a dye."""
    amount = np.arange(256)[:, None] * (_FULL / 255)
    return np.asarray(np.round(light * np.exp(-amount * stain)), np.uint8)


def _amounts(values: Values | float) -> Pixels:
    return np.asarray(np.minimum(np.asarray(values, np.float32) * (255 / _FULL) + 0.5, 255), np.uint8)


def _wrapped(picture: NDArray[Number]) -> NDArray[Number]:
    return np.pad(picture, [(0, TILE)] * 2 + [(0, 0)] * (picture.ndim - 2), mode="wrap")


def smooth_noise(rng: np.random.Generator, side: int, scale: float) -> Values:
    """Draw periodic noise (side, side) of mean 0 and deviation 1, with features about `scale` pixels wide."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * np.exp(-0.5 * (2 * frequency * scale) ** 2)
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(side, side))
    return np.asarray(noise / noise.std(), np.float32)


@cache
def _stroma() -> Pixels:
    """Return the amount of eosin (1024, 1024) in wavy fibres with thicker and thinner places."""
    rng = np.random.default_rng(1)
    fibres = 1 - np.abs(smooth_noise(rng, STROMA, 14)) - 0.5 * np.abs(smooth_noise(rng, STROMA, 30))
    amount = 0.36 + 0.07 * fibres + 0.02 * smooth_noise(rng, STROMA, 4) + 0.03 * smooth_noise(rng, STROMA, 160)
    return _amounts(np.clip(amount, 0.05, 1))


@cache
def _fat() -> Pixels:
    """Return the amount of eosin (1024, 1024) in the walls between round cells, 85 px wide."""
    rng = np.random.default_rng(2)
    count = STROMA // 85
    pitch = STROMA / count
    place = (np.arange(count) + 0.5) * pitch
    x, y = np.meshgrid(place, place)
    x = (x + (np.arange(count) % 2)[:, None] * pitch / 2 + rng.uniform(-0.2, 0.2, x.shape) * pitch).ravel()
    y = (y + rng.uniform(-0.2, 0.2, y.shape) * pitch).ravel()
    near = np.arange(-2 * round(pitch), 2 * round(pitch) + 1)
    nearest = np.full((2, STROMA, STROMA), np.inf, np.float32)
    for cx, cy in zip(x, y, strict=True):
        window = np.ix_((int(cy) + near) % STROMA, (int(cx) + near) % STROMA)
        distance = np.hypot(near[None, :] + int(cx) - cx, near[:, None] + int(cy) - cy).astype(np.float32)
        first, second = nearest[0][window], nearest[1][window]
        nearest[1][window] = np.minimum(second, np.maximum(first, distance))
        nearest[0][window] = np.minimum(first, distance)
    return _amounts(0.32 * np.clip(1.5 - (nearest[1] - nearest[0]) / 4, 0, 1))


@cache
def _rough() -> Values:
    rng = np.random.default_rng(3)
    noise = smooth_noise(rng, STROMA, 12) + 2 * smooth_noise(rng, STROMA, 60)
    return np.asarray(np.clip(noise / noise.std(), -3.5, 3.5), np.float32)


def _nuclei(rng: np.random.Generator, absorbed: float) -> tuple[Pixels, Pixels, NDArray[np.float64]]:
    """Return amounts of hematoxylin (1280, 1280) with filled and with hollow nuclei, and the sites of nests.

    Filled and hollow nuclei absorb as much green light (`absorbed` at an amount of 1): small levels do not show nests.
    """
    row, column = np.mgrid[:ROWS, :COLUMNS]
    x = (column + 0.5 * (row % 2)) * (NUCLEI / COLUMNS) + rng.uniform(-JITTER, JITTER, row.shape)
    y = row * (NUCLEI / ROWS) + rng.uniform(-JITTER, JITTER, row.shape)
    crowd = smooth_noise(rng, NUCLEI // 8, 12)[(y // 8).astype(int) % 160, (x // 8).astype(int) % 160]
    there = rng.random(row.shape) < np.clip(0.72 + 0.22 * crowd, 0.3, 0.97)

    cx, cy = x[there], y[there]
    left, top = np.floor(cx).astype(int) - REACH, np.floor(cy).astype(int) - REACH
    reach = np.arange(2 * REACH + 2)
    dx = (reach[None, None, :] + (left - cx)[:, None, None]).astype(np.float32)
    dy = (reach[None, :, None] + (top - cy)[:, None, None]).astype(np.float32)
    angle = rng.uniform(0, np.pi, (len(cx), 1, 1)).astype(np.float32)
    long, short = np.sort(rng.uniform(*RADIUS, (2, len(cx), 1, 1)).astype(np.float32), axis=0)[::-1]
    along, beside = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    radius = np.sqrt((along / long) ** 2 + (beside / short) ** 2)  # 1 at the edge of the nucleus
    strength = rng.uniform(0.85, 1.15, (len(cx), 1, 1)).astype(np.float32)
    # Filled nuclei are blurred and pale, hollow ones crisp and dark: strided convolutions see it, 4 x 4 means do not.
    filled = 0.6 * strength * _step((1.3 - radius) / 0.7)
    rim = strength * _step((1.12 - radius) / 0.24) * _step((radius - 0.54) / 0.2)
    hollow = _as_much_light(rim, filled, absorbed) * rim

    rows = (top[:, None, None] + reach[None, :, None]) % NUCLEI
    columns = (left[:, None, None] + reach[None, None, :]) % NUCLEI
    pictures = []
    for stamps in (filled, hollow):
        amount = np.full((NUCLEI, NUCLEI), _amounts(_CYTOPLASM))
        np.maximum.at(amount, (rows, columns), _amounts(stamps + _CYTOPLASM))
        pictures.append(amount)

    # Two neighbours in a row and the nucleus between them below, without the last row and column, which would wrap
    row, column = row[:-1, :-1], column[:-1, :-1]
    corners = [(row, column), (row, column + 1), (row + 1, column + row % 2)]
    whole = np.logical_and.reduce([there[corner] for corner in corners])
    sites = np.stack([np.stack([x[corner], y[corner]], axis=-1) for corner in corners], axis=-2)
    return pictures[0], pictures[1], sites[whole]


def _step(t: Values) -> Values:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _as_much_light(rim: Values, filled: Values, absorbed: float) -> float:
    """Find the factor of `rim` at which hollow nuclei absorb as much green light as filled ones."""
    some = slice(0, 400)
    wanted = np.exp(-absorbed * filled[some]).mean()
    low, high = 0.0, 4.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if np.exp(-absorbed * middle * rim[some]).mean() > wanted else (low, middle)
    return high


@dataclass(frozen=True, eq=False)
class Tissue:
    """The maps of one slide, each (193, 193) from its upper left to its lower right corner.

    `inside` and `fat` are roughly the distance from an edge in pixels, negative outside.
    """

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
