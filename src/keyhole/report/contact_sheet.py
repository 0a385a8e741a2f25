"""A PNG that shows, image by image, what a model said and the patches that it rests on.

One row per image: the image with the kept patches outlined, what was said, and the best of the kept patches enlarged.
Drawn with Pillow and its built-in font.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from keyhole.files import write_atomic
from keyhole.prediction import Prediction
from keyhole.tasks import SEPARATOR, Task

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, GREY, LINE, GROUND, WHITE = (28, 30, 33), (110, 115, 122), (224, 227, 231), (243, 244, 246), (255, 255, 255)
RIGHT, WRONG, NEUTRAL = (22, 128, 61), (200, 30, 38), (37, 84, 176)
COLD_TO_HOT: tuple[Color, ...] = ((76, 110, 245), (0, 172, 205), (250, 204, 21), (249, 115, 22), (225, 20, 60))
"""Colours of attention from none to the most in the image; they stand out on tissue, on photographs and on grey."""

MARGIN, GAP = 32, 28
IMAGE_SIDE, TEXT_WIDTH = 340, 260
PATCH_SIDE, PATCH_GAP, CAPTION, PER_LINE, PATCHES = 142, 10, 23, 4, 8
ROW, HEAD = 2 * (PATCH_SIDE + CAPTION) + PATCH_GAP, 92
PATCHES_LEFT = MARGIN + IMAGE_SIDE + GAP + TEXT_WIDTH + GAP
WIDTH = PATCHES_LEFT + PER_LINE * PATCH_SIDE + (PER_LINE - 1) * PATCH_GAP + MARGIN


@dataclass(frozen=True, eq=False)
class SheetEntry:
    """One row of the sheet.

    Attributes:
        prediction: what was said.
        truth: the known label of the task shown, as written in the CSV; None or empty where unknown.
        thumbnail: (h, w, c) uint8 of the whole image, c = 1 or 3; some 480 pixels or more on the long side look best.
            Where there is no image, its `score_picture`.
        downsample: level-0 pixels per pixel of the thumbnail.
        patches: (k, s, s, c) uint8, pixels of the first k kept patches in their order; none where there is no image.
    """

    prediction: Prediction
    truth: str | None
    thumbnail: NDArray[np.uint8]
    downsample: float
    patches: NDArray[np.uint8]


def contact_sheet(
    entries: Sequence[SheetEntry],
    path: str | Path,
    title: str = "Predictions and what they rest on",
    task: str | None = None,
) -> Path:
    """Writes the sheet.

    Args:
        entries: at least one, all of a model with the same tasks.
        path: the PNG.
        title: a line at the top; cut short where it is too long.
        task: whose label, truth and attention are shown; default is the first.

    Raises:
        OutputError: it cannot be written.
    """
    if not entries:
        raise ValueError("a contact sheet needs at least one entry")
    sheet = Picture.new("RGB", (WIDTH, HEAD + len(entries) * (ROW + 2 * GAP) + MARGIN // 2), WHITE)
    draw = ImageDraw.Draw(sheet)
    _draw_head(draw, title)
    for i, entry in enumerate(entries):
        tasks = {known.name: known for known in entry.prediction.tasks}
        top = HEAD + i * (ROW + 2 * GAP) + GAP
        draw.line([(MARGIN, top - GAP), (WIDTH - MARGIN - 1, top - GAP)], fill=LINE)
        _draw_entry(sheet, draw, entry, entry.prediction.tasks[0] if task is None else tasks[task], top)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return write_atomic(path, data.getvalue())


def score_picture(scores: NDArray[np.float32], zoom: int) -> NDArray[np.uint8]:
    """Scores (rows, columns) as a picture (rows zoom, columns zoom, 3), relative to the highest; grey where NaN.

    By the square root: attention is often on a few patches, and the others would all look alike.
    """
    highest = np.nanmax(scores, initial=0.0)
    shares = np.sqrt(np.nan_to_num(scores) / max(float(highest), 1e-12))
    steps = np.array([_heat(step / 255) for step in range(256)], np.uint8)
    colors: NDArray[np.uint8] = steps[np.rint(shares * 255).astype(np.int64).clip(0, 255)]
    colors[np.isnan(scores)] = LINE
    return colors.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _draw_head(draw: ImageDraw.ImageDraw, title: str) -> None:
    """Title, what the colours mean, and headings over the three columns."""
    small = _font(15)
    bar_width, bar_left = 120, WIDTH - MARGIN - 120 - 60
    _text(draw, (bar_left - 76, 24), "attention", small, GREY, 70)
    for x in range(bar_width):
        draw.line([(bar_left + x, 27), (bar_left + x, 39)], fill=_heat(x / (bar_width - 1)))
    _text(draw, (WIDTH - MARGIN, 24), "highest", small, GREY, 70, align_right=True)
    _text(draw, (MARGIN, 20), title, _font(22), INK, bar_left - 76 - MARGIN - GAP)
    for left, heading in (
        (MARGIN, "image with the kept patches"),
        (MARGIN + IMAGE_SIDE + GAP, "what the model says"),
        (PATCHES_LEFT, "kept patches with the highest attention, and its share"),
    ):
        _text(draw, (left, HEAD - 27), heading, small, GREY, WIDTH)


def _draw_entry(sheet: Picture.Image, draw: ImageDraw.ImageDraw, entry: SheetEntry, task: Task, top: int) -> None:
    attention = entry.prediction.kept.attention[task.name]
    heat = attention / max(float(attention.max()), 1e-12)
    picture = _outlined(entry, heat)
    left = MARGIN + (IMAGE_SIDE - picture.width) // 2
    draw.rectangle([MARGIN, top, MARGIN + IMAGE_SIDE - 1, top + ROW - 1], fill=GROUND)
    sheet.paste(picture, (left, top + (ROW - picture.height) // 2))

    _draw_words(draw, entry, task, MARGIN + IMAGE_SIDE + GAP, top)

    shown = np.argsort(-attention[: len(entry.patches)], kind="stable")[:PATCHES]
    for place, i in enumerate(shown):
        x = PATCHES_LEFT + place % PER_LINE * (PATCH_SIDE + PATCH_GAP)
        y = top + place // PER_LINE * (PATCH_SIDE + CAPTION + PATCH_GAP)
        patch = _picture(entry.patches[i]).resize((PATCH_SIDE - 8, PATCH_SIDE - 8), Picture.Resampling.BICUBIC)
        draw.rectangle([x, y, x + PATCH_SIDE - 1, y + PATCH_SIDE - 1], fill=_heat(float(heat[i])))
        draw.rectangle([x + 3, y + 3, x + PATCH_SIDE - 4, y + PATCH_SIDE - 4], fill=WHITE)
        sheet.paste(patch, (x + 4, y + 4))
        _text(draw, (x + 1, y + PATCH_SIDE + 3), _percent(float(attention[i])), _font(14), GREY, PATCH_SIDE)


def _outlined(entry: SheetEntry, heat: NDArray[np.float32]) -> Picture.Image:
    """The thumbnail at the size of its cell, with a frame around every kept patch, the most attended on top."""
    picture = _picture(entry.thumbnail)
    zoom = min(IMAGE_SIDE / picture.width, ROW / picture.height)
    size = (max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))
    picture = picture.resize(size, Picture.Resampling.LANCZOS if zoom < 1 else Picture.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    scale = zoom / entry.downsample
    for i in np.argsort(heat, kind="stable"):
        if not entry.prediction.kept.boxes[i, 2:].any():
            continue  # features without coordinates
        x, y, width, height = (entry.prediction.kept.boxes[i] * scale).tolist()
        # A frame that the border of the image would hide is moved onto it.
        left, top = min(max(x, 0), size[0] - 2), min(max(y, 0), size[1] - 2)
        right, bottom = max(min(x + width, size[0]) - 1, left + 1), max(min(y + height, size[1]) - 1, top + 1)
        line = 2 + round(float(heat[i]))
        draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], outline=WHITE, width=1)
        draw.rectangle([left, top, right, bottom], outline=_heat(float(heat[i])), width=line)
    return picture


def _draw_words(draw: ImageDraw.ImageDraw, entry: SheetEntry, task: Task, left: int, top: int) -> None:
    """Name, true and predicted label, the likeliest classes as bars, and how many patches were kept."""
    prediction, label = entry.prediction, entry.prediction.label[task.name]
    _text(draw, (left, top - 2), prediction.name, _font(18), INK, TEXT_WIDTH, keep_end=True)
    y = top + 36
    if entry.truth:
        _text(draw, (left, y), "true", _font(14), GREY, 78)
        _text(draw, (left + 80, y - 3), entry.truth, _font(18), INK, TEXT_WIDTH - 80)
        y += 30
    color = _verdict(task, entry.truth, label)
    _text(draw, (left, y), "predicted", _font(14), GREY, 78)
    _text(draw, (left + 80, y - 3), label or "none", _font(18), color, TEXT_WIDTH - 80)
    y += 42
    if task.kind != "regression":
        said = prediction.probability[task.name]
        for name in sorted(said, key=lambda name: -said[name])[:4]:
            _text(draw, (left, y), name, _font(15), INK, TEXT_WIDTH - 70)
            _text(draw, (left + TEXT_WIDTH, y), _percent(said[name]), _font(15), GREY, 66, align_right=True)
            draw.rectangle([left, y + 22, left + TEXT_WIDTH - 1, y + 26], fill=GROUND)
            shade = color if name in label.split(SEPARATOR) or name == label else GREY
            if said[name] * TEXT_WIDTH >= 1:
                draw.rectangle([left, y + 22, left + round(said[name] * TEXT_WIDTH) - 1, y + 26], fill=shade)
            y += 39
    looked_at = f" of {len(prediction.scores):,}" if prediction.scores is not None else ""
    size = f"{prediction.size.width:,} x {prediction.size.height:,} pixels"
    _text(draw, (left, top + ROW - 44), size, _font(14), GREY, TEXT_WIDTH)
    _text(
        draw, (left, top + ROW - 22), f"kept {len(prediction.kept):,}{looked_at} patches", _font(14), GREY, TEXT_WIDTH
    )


def _verdict(task: Task, truth: str | None, label: str) -> Color:
    """Green or red where the truth says so; a number is neither."""
    if not truth or task.kind == "regression":
        return NEUTRAL
    if task.kind == "multilabel":
        same = {part.strip() for part in truth.split(SEPARATOR)} - {""} == set(label.split(SEPARATOR)) - {""}
    else:
        same = truth.strip() == label
    return RIGHT if same else WRONG


def _picture(pixels: NDArray[np.uint8]) -> Picture.Image:
    return Picture.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def _heat(share: float) -> Color:
    """Colour of attention relative to the most in the image."""
    place = min(max(share, 0.0), 1.0) * (len(COLD_TO_HOT) - 1)
    low = min(int(place), len(COLD_TO_HOT) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(COLD_TO_HOT[low], COLD_TO_HOT[low + 1], strict=True))
    red, green, blue = mixed
    return red, green, blue


def _percent(share: float) -> str:
    """Not "100 %" or "0 %" unless it is."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %" if share < 1 else "100 %"


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    font: Font,
    color: Color,
    width: int,
    *,
    keep_end: bool = False,
    align_right: bool = False,
) -> None:
    """One line of at most `width` pixels; what is too long is cut with an ellipsis, in the middle for `keep_end`."""
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    text = _fitted(text, font, width, keep_end)
    draw.text(at, text, fill=color, font=font, anchor="ra" if align_right else "la")


def _fitted(text: str, font: Font, width: int, keep_end: bool) -> str:
    if font.getlength(text) <= width:
        return text
    # The longest that fits, by halving: with more characters a line only gets longer.
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
