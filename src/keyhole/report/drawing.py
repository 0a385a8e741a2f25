"""Colours, scales, frames, scale bars, and text that fits its place, with Pillow.

Two quantities have two palettes, both of monotone lightness, so that readers with any colour vision can order them:
`SCORE_COLORS` for the score of every patch, and `ATTENTION_COLORS` for the attention weight of a kept patch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont

INK, GREY, LINE, GROUND, WHITE = (28, 30, 33), (96, 101, 108), (224, 227, 231), (243, 244, 246), (255, 255, 255)
RIGHT, WRONG, NEUTRAL = (0, 99, 163), (200, 70, 0), (60, 64, 70)
"""Colours of predicted labels: blue and vermilion are different in any colour vision."""


def _colors(stops: str) -> tuple[Color, ...]:
    return tuple((stop[0], stop[1], stop[2]) for stop in map(bytes.fromhex, stops.split()))


SCORE_COLORS = _colors("440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725")
"""Viridis, by Smith, van der Walt and Firing."""
ATTENTION_COLORS = _colors("fdd49e fdbb84 fc8d59 e34a33 b30000 7f0000")
"""Near white to dark red, as in the OrRd of ColorBrewer; neither occurs in viridis."""
HOTTEST = 16
"""A kept patch gets the hottest colour from this many times its equal share of the attention."""


@functools.cache
def font(size: int, bold: bool = False) -> Font:
    """Return DejaVu Sans, which comes with matplotlib: Pillow's own font lacks µ, x and accents."""
    found = find_spec("matplotlib")  # imports nothing
    assert found is not None
    assert found.submodule_search_locations is not None
    folder = Path(next(iter(found.submodule_search_locations))) / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


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
        align: str = "l",
    ) -> None:
        """Draw one line of at most `width` pixels, see `fitted`; `at` is its upper left, middle or right (l, m, r)."""
        chosen = font(size)
        self.draw.text(
            at, fitted(printable(text), chosen, width, keep_end), fill=color, font=chosen, anchor=f"{align}a"
        )

    def patch(self, at: tuple[int, int], side: int, pixels: NDArray[np.uint8] | None, color: Color) -> None:
        """Draw the pixels (s, s, c) of a patch in a frame of `side` pixels; grey ground if there are none."""
        x, y = at
        self.draw.rectangle([x, y, x + side - 1, y + side - 1], fill=color, outline=GREY)
        self.draw.rectangle([x + 4, y + 4, x + side - 5, y + side - 5], fill=GROUND)
        if pixels is not None:
            inner = (side - 8, side - 8)
            self.picture.paste(as_picture(pixels).resize(inner, Picture.Resampling.BICUBIC), (x + 4, y + 4))

    def scale(self, at: tuple[int, int], most: float, um_per_pixel: float, u: float) -> None:
        """Draw a scale bar of at most `most` pixels with its length beside it."""
        bar = ScaleBar.within(most, um_per_pixel)
        (x, y), end = at, at[0] + round(bar.pixels)
        self.draw.rectangle([x, y + round(5 * u), end - 1, y + round(9 * u)], fill=INK)
        self.text((end + round(8 * u), y), length(bar.um), round(13 * u), INK, round(120 * u))

    def ramp(self, at: tuple[int, int], size: tuple[int, int], colors: Sequence[Color]) -> None:
        """Draw the colours of a palette from left to right."""
        strip = Picture.fromarray(palette(colors)[None]).resize(size, Picture.Resampling.BILINEAR)
        self.picture.paste(strip, at)
        self.draw.rectangle([*at, at[0] + size[0] - 1, at[1] + size[1] - 1], outline=GREY)


def text_width(text: str, size: int) -> int:
    return round(font(size).getlength(text))


def printable(text: str) -> str:
    """Return the text with a replacement character for each that cannot be printed."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def fitted(text: str, font: Font | ImageFont.ImageFont, width: int, keep_end: bool) -> str:
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


def wrapped(text: str, size: int, width: int, between: str = " ") -> list[str]:
    """Return the text in lines of at most `width` pixels, broken at spaces or at another separator.

    >>> wrapped("39 patches of 256 px, 16 kept, a model", 10, 180, ", ")
    ['39 patches of 256 px, 16 kept', 'a model']
    """
    lines: list[str] = []
    line = ""
    for word in filter(None, text.split(between)):
        longer = f"{line}{between}{word}" if line else word
        if line and text_width(longer, size) > width:
            lines, longer = [*lines, line], word
        line = longer
    return [*lines, line]


def percent(share: float) -> str:
    """Return a share in percent; "100 %" and "0 %" are exact."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if share < 1 else "100 %"


def times(ratio: float) -> str:
    """Return how many times an equal share something is, such as "0.31 x", "4.5 x" or "1,024 x"."""
    return f"{ratio:.2g} x" if ratio < 10 else f"{ratio:,.0f} x"


def length(um: float) -> str:
    """Return a length in words.

    >>> length(50), length(2000), length(12500.0)
    ('50 µm', '2 mm', '12.5 mm')
    """
    return f"{um:.3g} µm" if um < 1000 else f"{um / 1000:.3g} mm" if um < 1e6 else f"{um / 1000:,.0f} mm"


class ScaleBar(NamedTuple):
    """A bar of a round length, 1, 2 or 5 times a power of ten.

    Attributes:
        um: length in microns.
        pixels: length on the picture.
    """

    um: float
    pixels: float

    @staticmethod
    def within(pixels: float, um_per_pixel: float) -> ScaleBar:
        """Return the longest bar of at most `pixels`.

        >>> ScaleBar.within(200, 0.5)
        ScaleBar(um=100.0, pixels=200.0)
        """
        most = pixels * um_per_pixel * (1 + 1e-9)
        power = 10.0 ** np.floor(np.log10(most))
        um = float(next(step * power for step in (5, 2, 1) if step * power <= most))
        return ScaleBar(um, um / um_per_pixel)


def as_picture(pixels: NDArray[np.uint8]) -> Picture.Image:
    """Return pixels (h, w, 1) or (h, w, 3) as an RGB picture."""
    return Picture.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def heat(shares: NDArray[np.float32], equal: float, top: float = HOTTEST) -> NDArray[np.float32]:
    """Return how hot shares are, 0 to 1, relative to the share of each if all were equal.

    A share of at most `equal` is cold. Each doubling is one step, up to `top` times `equal` or to a share of 1.
    """
    most = min(float(top), 1 / equal)
    if most <= 1:
        return np.zeros_like(shares, np.float32)
    ratio = np.clip(shares / equal, 1, most)
    hot: NDArray[np.float32] = (np.log2(ratio) / np.log2(most)).astype(np.float32)
    return hot


@functools.cache
def palette(colors: Sequence[Color]) -> NDArray[np.uint8]:
    """Return 256 colours (256, 3) between the stops."""
    place = np.linspace(0, len(colors) - 1, 256)
    channels = [np.interp(place, np.arange(len(colors)), channel) for channel in zip(*colors, strict=True)]
    out: NDArray[np.uint8] = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    return out


def color_at(colors: Sequence[Color], share: float) -> Color:
    """Return the colour of one value of `heat`."""
    red, green, blue = palette(colors)[round(min(max(share, 0.0), 1.0) * 255)].tolist()
    return red, green, blue


class Frames:
    """Draws frames around kept patches, whose colour and width tell their attention.

    A dark and a white line around each keep it visible on any ground. A box that is too small to be seen gets a frame
    of `least` pixels around its middle; one that the border would hide is moved onto it.
    """

    def __init__(self, picture: Picture.Image, least: int = 3, width: int = 2) -> None:
        self.draw, self.size, self.least, self.width = ImageDraw.Draw(picture), picture.size, least, width

    def add(self, boxes: NDArray[np.floating[Any]], hot: NDArray[np.float32]) -> NDArray[np.int64]:
        """Draw frames at boxes (k, 4) in pixels of the picture, hotter ones on top; return left, top, right, bottom."""
        placed = [self._place(*box) for box in boxes.tolist()]
        for i in np.argsort(hot, kind="stable"):
            (left, top, right, bottom), share = placed[i], float(hot[i])
            line = self.width + round(share * self.width / 2)
            for beyond, color in ((2, INK), (1, WHITE)):
                edges = [left - beyond, top - beyond, right + beyond, bottom + beyond]
                self.draw.rectangle(edges, outline=color)
            self.draw.rectangle([left, top, right, bottom], outline=color_at(ATTENTION_COLORS, share), width=line)
        return np.array(placed, np.int64).reshape(-1, 4)

    def number(self, boxes: NDArray[np.int64], first: Sequence[int], size: int) -> None:
        """Write 1, 2, ... for the `first` of all frames, left, top, right, bottom (k, 4): inside one that is large,
        else beside it with a line to it. A number for which there is no free place near by is left out."""
        taken = boxes + np.array([-3, -3, 3, 3])
        for rank, i in enumerate(first, start=1):
            plate = np.array([text_width(str(rank), size), size]) + size // 2
            wide, high = plate.tolist()
            left, top, right, bottom = boxes[i].tolist()
            x, y = left + 2 * self.width, top + 2 * self.width
            if right - left < 4 * wide or bottom - top < 4 * high:
                middle = np.array([(left + right) / 2, (top + bottom) / 2])
                reach = (np.array([right - left, bottom - top]) + plate) / 2 + 4
                steps = np.array([(1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)])
                tries = (steps[None] * (reach + np.arange(0, 6 * size, size // 2)[:, None])[:, None]).reshape(-1, 2)
                corners = np.rint(middle + tries - plate / 2).astype(np.int64)
                free = (corners >= 0).all(axis=1) & (corners + plate <= self.size).all(axis=1)
                apart = (corners[:, None] + plate < taken[None, :, :2]) | (corners[:, None] > taken[None, :, 2:])
                free &= apart.any(axis=2).all(axis=1)
                if not free.any():
                    continue
                x, y = corners[free.argmax()].tolist()
                begin = corners[free.argmax()] + plate / 2
                end = np.clip(begin, boxes[i, :2], boxes[i, 2:])
                self.draw.line([*begin.tolist(), *end.tolist()], fill=INK, width=max(1, size // 9))
                taken = np.concatenate([taken, [[x, y, x + wide, y + high]]])
            self.draw.rectangle([x, y, x + wide, y + high], fill=WHITE, outline=INK)
            self.draw.text((x + wide / 2, y + high / 2), str(rank), fill=INK, font=font(size), anchor="mm")

    def _place(self, x: float, y: float, width: float, height: float) -> tuple[int, int, int, int]:
        grow_x, grow_y = (max(0.0, self.least - side) / 2 for side in (width, height))
        left, top = min(max(x - grow_x, 0), self.size[0] - 2), min(max(y - grow_y, 0), self.size[1] - 2)
        right = max(min(x + width + grow_x, self.size[0]) - 1, left + 1)
        bottom = max(min(y + height + grow_y, self.size[1]) - 1, top + 1)
        return round(left), round(top), round(right), round(bottom)
