"""Colours, the scale of attention, and text that fits its place, with Pillow and its built-in font."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, GREY, LINE, GROUND, WHITE = (28, 30, 33), (110, 115, 122), (224, 227, 231), (243, 244, 246), (255, 255, 255)
COLD_TO_HOT: tuple[Color, ...] = ((76, 110, 245), (0, 172, 205), (250, 204, 21), (249, 115, 22), (225, 20, 60))
"""Colours of attention, see `heat`; they are visible on tissue, on photographs and on grey."""
HOTTEST = 16
"""A patch gets the hottest colour from this many times its equal share."""


class Page:
    """A white page to draw on."""

    def __init__(self, width: int, height: int) -> None:
        self.picture = Picture.new("RGB", (width, height), WHITE)
        self.draw = ImageDraw.Draw(self.picture)

    def text(
        self,
        at: tuple[int, int],
        text: str,
        size: int,
        color: Color,
        width: int,
        *,
        keep_end: bool = False,
        align_right: bool = False,
    ) -> None:
        """Draw one line of at most `width` pixels, see `fitted`; `at` is its upper left or, aligned, right corner."""
        font = ImageFont.load_default(size)
        anchor = "ra" if align_right else "la"
        self.draw.text(at, fitted(printable(text), font, width, keep_end), fill=color, font=font, anchor=anchor)


def text_width(text: str, size: int) -> int:
    return round(ImageFont.load_default(size).getlength(text))


def printable(text: str) -> str:
    """Return the text with a replacement character for each that cannot be printed."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def fitted(text: str, font: Font, width: int, keep_end: bool) -> str:
    """Return the text; an ellipsis at the end, or in the middle (`keep_end`), replaces what exceeds `width`."""
    if font.getlength(text) <= width:
        return text
    # Bisection finds the longest that fits: more characters make a longer line.
    low, high = 0, min(len(text), 500)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(_cut(text, middle, keep_end)) <= width:
            low = middle
        else:
            high = middle - 1
    return _cut(text, low, keep_end)


def _cut(text: str, characters: int, keep_end: bool) -> str:
    end = characters // 2 if keep_end else 0
    return text[: characters - end].rstrip() + "\N{HORIZONTAL ELLIPSIS}" + (text[-end:] if end else "")


def percent(share: float) -> str:
    """Return a share in percent; "100 %" and "0 %" are exact."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if share < 1 else "100 %"


def as_picture(pixels: NDArray[np.uint8]) -> Picture.Image:
    """Return pixels (h, w, 1) or (h, w, 3) as an RGB picture."""
    return Picture.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def heat(weights: NDArray[np.float32], equal: float) -> NDArray[np.float32]:
    """Return how hot weights are, 0 to 1, relative to the weight of each if all were equal.

    A weight of at most `equal` is cold. Each doubling is one step, up to `HOTTEST` times `equal` or to a weight of 1.
    """
    most = min(float(HOTTEST), 1 / equal)
    if most <= 1:
        return np.zeros_like(weights, np.float32)
    times = np.clip(weights / equal, 1, most)
    hot: NDArray[np.float32] = (np.log2(times) / np.log2(most)).astype(np.float32)
    return hot


def heat_color(share: float) -> Color:
    """Return the colour of one value of `heat`."""
    place = min(max(share, 0.0), 1.0) * (len(COLD_TO_HOT) - 1)
    low = min(int(place), len(COLD_TO_HOT) - 2)
    pairs = zip(COLD_TO_HOT[low], COLD_TO_HOT[low + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in pairs)
    return red, green, blue


def score_picture(scores: NDArray[np.float32], zoom: int, equal: float) -> NDArray[np.uint8]:
    """Return scores (rows, columns) as pixels (rows zoom, columns zoom, 3) coloured by `heat`; grey where NaN."""
    shares = heat(np.nan_to_num(scores), equal)
    steps = np.array([heat_color(step / 255) for step in range(256)], np.uint8)
    colors: NDArray[np.uint8] = steps[np.rint(shares * 255).astype(np.int64).clip(0, 255)]
    colors[np.isnan(scores)] = LINE
    return colors.repeat(zoom, axis=0).repeat(zoom, axis=1)
