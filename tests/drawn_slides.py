"""Small pictures of slides with known tissue, pen and borders, drawn by what light does: dyes multiply, pens too."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
BLUER_HAEMATOXYLIN, BROWN = (0.74, 0.60, 0.30), (0.27, 0.57, 0.78)
STAINS = {"he": (EOSIN, HAEMATOXYLIN), "ihc": (BLUER_HAEMATOXYLIN, BROWN)}
"""Optical density in red, green and blue of what covers the tissue and of what lies in it in spots."""
PENS = {"blue": (35, 60, 190), "green": (20, 130, 70), "red": (215, 30, 50), "black": (28, 28, 34)}


@dataclass(frozen=True)
class Slide:
    """Pixels (h, w, 3) and, per pixel, what is drawn there; pen and black lie over tissue."""

    pixels: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    pen: NDArray[np.bool_]
    black: NDArray[np.bool_]


def draw_slide(
    stain: str = "he",
    seed: int = 0,
    width: int = 1600,
    height: int = 1200,
    glass: tuple[int, int, int] = (244, 241, 242),
    tissue: float = 1.0,
    pens: tuple[str, ...] = tuple(PENS),
    black: float = 0.0,
    density: float = 1.0,
    noise: float = 3.0,
    fall_off: float = 8.0,
) -> Slide:
    """A slide with three pieces of tissue.

    Args:
        stain: `he` or `ihc`.
        seed: of everything that is random.
        width, height: pixels.
        glass: its mean colour; see `noise` and `fall_off`.
        tissue: 1 for pieces over a quarter of the slide, 0 for none, above 8 for nothing but tissue.
        pens: strokes drawn beside the tissue and over its edge.
        black: share of the slide that the scanner left black, from the left, and a frame.
        density: of the stain.
        noise: deviation of each pixel.
        fall_off: grey values by which the light falls off to one side.
    """
    rng = np.random.default_rng(seed)
    light = np.linspace(0, -fall_off, width)[None, :, None] + np.array(glass, float)
    shape = (height, width)
    inside = _pieces(rng, shape, tissue)
    cover, spots = STAINS[stain]
    amount = density * (0.22 + 0.7 * _cloud(rng, shape, 40) * _cloud(rng, shape, 6))
    dots = density * 1.3 * (_cloud(rng, shape, 5) > 0.66) * _cloud(rng, shape, 120)
    od = amount[..., None] * np.array(cover) + dots[..., None] * np.array(spots)
    od *= _soft(inside, 1)[..., None]
    pixels = light * np.exp(-od)
    pen = np.zeros(shape, bool)
    for number, name in enumerate(pens):
        stroke = _stroke(rng, shape, number)
        ink = (0.85 + 0.15 * _cloud(rng, shape, 30)) * _soft(stroke, 2)
        thin = -np.log(np.array(PENS[name]) / 255)
        pixels = pixels * np.exp(-ink[..., None] * thin)
        pen |= _soft(stroke, 2) > 0.02
    pixels += rng.normal(0, noise, pixels.shape)
    dark = np.zeros(shape, bool)
    if black:
        dark[:, : round(black * width)] = True
        dark[:20] = dark[-20:] = dark[:, -20:] = True
        pixels[dark] = np.abs(rng.normal(6, 4, (int(dark.sum()), 3)))
    return Slide(_through_jpeg(pixels.clip(0, 255).astype(np.uint8)), inside & ~pen & ~dark, pen & ~dark, dark)


def _pieces(rng: np.random.Generator, shape: tuple[int, int], size: float) -> NDArray[np.bool_]:
    """Three blobs with ragged edges, the last one small."""
    y, x = np.mgrid[: shape[0], : shape[1]] / min(shape)
    ragged = 0.35 * (_cloud(rng, shape, 60) - 0.5)
    inside = np.zeros(shape, bool)
    for cx, cy, radius in ((0.75, 0.3, 0.24), (0.55, 0.75, 0.2), (1.15, 0.55, 0.045)):
        if size:
            inside |= np.hypot(x - cx, y - cy) < radius * np.sqrt(size) * (1 + ragged)
    return inside


def _stroke(rng: np.random.Generator, shape: tuple[int, int], number: int) -> NDArray[np.bool_]:
    """A wavy line as wide as a marker's, down the right half; the first runs over tissue."""
    picture = Image.new("L", (shape[1], shape[0]))
    left = (0.42, 0.8, 0.87, 0.94)[number] * shape[1]
    waves = left + 14 * np.sin(np.linspace(0, 9, 40) + rng.uniform(0, 6))
    line = list(zip(waves.tolist(), np.linspace(0.08, 0.92, 40) * shape[0], strict=True))
    ImageDraw.Draw(picture).line(line, fill=255, width=44, joint="curve")
    return np.asarray(picture) > 0


def _cloud(rng: np.random.Generator, shape: tuple[int, int], grain: int) -> NDArray[np.float64]:
    """Smooth noise between 0 and 1."""
    small = rng.integers(0, 256, (shape[0] // grain + 2, shape[1] // grain + 2), dtype=np.uint8)
    large = Image.fromarray(small).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(large) / 255


def _soft(mask: NDArray[np.bool_], radius: float) -> NDArray[np.float64]:
    return np.asarray(Image.fromarray(np.uint8(255 * mask)).filter(ImageFilter.GaussianBlur(radius))) / 255


def _through_jpeg(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=75)
    return np.asarray(Image.open(data))
