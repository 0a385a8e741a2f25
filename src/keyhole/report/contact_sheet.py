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

from keyhole.report.prediction import Pictures, Prediction
from keyhole.tasks.kinds import Task
from keyhole.util.files import write_atomic

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, GREY, LINE, GROUND, WHITE = (28, 30, 33), (110, 115, 122), (224, 227, 231), (243, 244, 246), (255, 255, 255)
RIGHT, WRONG, NEUTRAL = (22, 128, 61), (200, 30, 38), (37, 84, 176)
COLD_TO_HOT: tuple[Color, ...] = ((76, 110, 245), (0, 172, 205), (250, 204, 21), (249, 115, 22), (225, 20, 60))
"""Colours of attention, see `heat`; they stand out on tissue, on photographs and on grey."""
HOTTEST = 16
"""Times its equal share at which a patch gets the hottest colour."""

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
        prediction: what was said, with its pictures.
        truth: the known label of the task shown, as written in the CSV; None or empty where unknown.
        looked_at: patches of the image; None where not known.
    """

    prediction: Prediction
    truth: str | None = None
    looked_at: int | None = None

    @property
    def pictures(self) -> Pictures:
        """What the prediction carries to be shown."""
        if self.prediction.pictures is None:
            raise ValueError(f"{self.prediction.name}: the prediction carries no pictures; predict with pictures=True")
        return self.prediction.pictures


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
    first = entries[0].prediction.tasks
    _draw_head(draw, title, f" of {task or first[0].name}" if len(first) > 1 else "")
    for i, entry in enumerate(entries):
        tasks = {known.name: known for known in entry.prediction.tasks}
        top = HEAD + i * (ROW + 2 * GAP) + GAP
        draw.line([(MARGIN, top - GAP), (WIDTH - MARGIN - 1, top - GAP)], fill=LINE)
        _draw_entry(sheet, draw, entry, entry.prediction.tasks[0] if task is None else tasks[task], top)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return write_atomic(path, data.getvalue())


def heat(weights: NDArray[np.float32], equal: float) -> NDArray[np.float32]:
    """How hot weights are, 0 to 1, against the weight that each would have if all were equal.

    A weight of at most `equal` is cold; twice that is one step, until `HOTTEST` times, or all of the weight where that
    is less. Weights that are all equal are all cold: a model that attends to nothing does not look certain.
    """
    most = min(float(HOTTEST), 1 / equal)
    if most <= 1:
        return np.zeros_like(weights, np.float32)
    times = np.clip(weights / equal, 1, most)
    hot: NDArray[np.float32] = (np.log2(times) / np.log2(most)).astype(np.float32)
    return hot


def score_picture(scores: NDArray[np.float32], zoom: int, equal: float) -> NDArray[np.uint8]:
    """Scores (rows, columns) as a picture (rows zoom, columns zoom, 3) by `heat`; grey where NaN."""
    shares = heat(np.nan_to_num(scores), equal)
    steps = np.array([_heat(step / 255) for step in range(256)], np.uint8)
    colors: NDArray[np.uint8] = steps[np.rint(shares * 255).astype(np.int64).clip(0, 255)]
    colors[np.isnan(scores)] = LINE
    return colors.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _draw_head(draw: ImageDraw.ImageDraw, title: str, which: str) -> None:
    """Title, what the colours mean, and headings over the three columns; `which` names one of several tasks."""
    small, bar_width = _font(15), 120
    least, most = "attention: equal share 1/M", f"{HOTTEST}/M, or all"
    right = WIDTH - MARGIN - round(small.getlength(most)) - 8
    bar_left = right - bar_width
    left = bar_left - round(small.getlength(least)) - 8
    _text(draw, (left, 24), least, small, GREY, bar_left - left)
    for x in range(bar_width):
        draw.line([(bar_left + x, 27), (bar_left + x, 39)], fill=_heat(x / (bar_width - 1)))
    _text(draw, (WIDTH - MARGIN - 1, 24), most, small, GREY, WIDTH - MARGIN - right, align_right=True)
    _text(draw, (MARGIN, 20), title, _font(22), INK, left - MARGIN - GAP)
    for left, width, heading in (
        (MARGIN, IMAGE_SIDE, "image with the kept patches"),
        (MARGIN + IMAGE_SIDE + GAP, TEXT_WIDTH, f"what the model says{which}"),
        (PATCHES_LEFT, WIDTH, "kept patches with the highest attention: its share, and times 1/M"),
    ):
        _text(draw, (left, HEAD - 27), heading, small, GREY, width)


def _draw_entry(sheet: Picture.Image, draw: ImageDraw.ImageDraw, entry: SheetEntry, task: Task, top: int) -> None:
    attention = entry.prediction.kept.attention[task.name]
    hot = heat(attention, 1 / len(attention))
    picture = _outlined(entry, hot)
    left = MARGIN + (IMAGE_SIDE - picture.width) // 2
    draw.rectangle([MARGIN, top, MARGIN + IMAGE_SIDE - 1, top + ROW - 1], fill=GROUND)
    sheet.paste(picture, (left, top + (ROW - picture.height) // 2))

    _draw_words(draw, entry, task, MARGIN + IMAGE_SIDE + GAP, top)

    shown = np.argsort(-attention[entry.pictures.place], kind="stable")[:PATCHES]
    for place, carried in enumerate(shown):
        i = int(entry.pictures.place[carried])
        x = PATCHES_LEFT + place % PER_LINE * (PATCH_SIDE + PATCH_GAP)
        y = top + place // PER_LINE * (PATCH_SIDE + CAPTION + PATCH_GAP)
        patch = _picture(entry.pictures.patches[carried]).resize(
            (PATCH_SIDE - 8, PATCH_SIDE - 8), Picture.Resampling.BICUBIC
        )
        draw.rectangle([x, y, x + PATCH_SIDE - 1, y + PATCH_SIDE - 1], fill=_heat(float(hot[i])))
        draw.rectangle([x + 3, y + 3, x + PATCH_SIDE - 4, y + PATCH_SIDE - 4], fill=WHITE)
        sheet.paste(patch, (x + 4, y + 4))
        share = f"{_percent(float(attention[i]))}  ({_times(float(attention[i]) * len(attention))})"
        _text(draw, (x + 1, y + PATCH_SIDE + 3), share, _font(14), GREY, PATCH_SIDE)


def _outlined(entry: SheetEntry, hot: NDArray[np.float32]) -> Picture.Image:
    """The thumbnail at the size of its cell, with a frame around every kept patch, the most attended on top."""
    picture = _picture(entry.pictures.thumbnail)
    zoom = min(IMAGE_SIDE / picture.width, ROW / picture.height)
    size = (max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))
    picture = picture.resize(size, Picture.Resampling.LANCZOS if zoom < 1 else Picture.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    scale = zoom / entry.pictures.downsample
    for i in np.argsort(hot, kind="stable"):
        if not entry.prediction.kept.boxes[i, 2:].any():
            continue  # features without coordinates
        x, y, width, height = (entry.prediction.kept.boxes[i] * scale).tolist()
        # A frame that the border of the image would hide is moved onto it.
        left, top = min(max(x, 0), size[0] - 2), min(max(y, 0), size[1] - 2)
        right, bottom = max(min(x + width, size[0]) - 1, left + 1), max(min(y + height, size[1]) - 1, top + 1)
        line = 2 + round(float(hot[i]))
        draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], outline=WHITE, width=1)
        draw.rectangle([left, top, right, bottom], outline=_heat(float(hot[i])), width=line)
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
    if task.classes:
        said = prediction.probability[task.name]
        for name in sorted(said, key=lambda name: -said[name])[:4]:
            _text(draw, (left, y), name, _font(15), INK, TEXT_WIDTH - 70)
            _text(draw, (left + TEXT_WIDTH, y), _percent(said[name]), _font(15), GREY, 66, align_right=True)
            draw.rectangle([left, y + 22, left + TEXT_WIDTH - 1, y + 26], fill=GROUND)
            shade = color if name in task.split(label) else GREY
            if said[name] * TEXT_WIDTH >= 1:
                draw.rectangle([left, y + 22, left + round(said[name] * TEXT_WIDTH) - 1, y + 26], fill=shade)
            y += 39
    count = entry.looked_at if prediction.scores is None else len(prediction.scores)
    m, looked_at = len(prediction.kept), "" if count is None else f" of {count:,}"
    lines = [
        entry.pictures.note,
        f"{prediction.size.width:,} x {prediction.size.height:,} pixels",
        f"kept {m:,}{looked_at} patches; 1/M is {_percent(1 / m)}",
    ]
    for line, text in enumerate(lines):
        _text(draw, (left, top + ROW - 22 * (len(lines) - line)), text, _font(14), GREY, TEXT_WIDTH)


def _verdict(task: Task, truth: str | None, label: str) -> Color:
    """Green or red where the truth says so; a number is neither."""
    right = task.is_right(truth, label)
    return NEUTRAL if right is None else RIGHT if right else WRONG


def _picture(pixels: NDArray[np.uint8]) -> Picture.Image:
    return Picture.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def _heat(share: float) -> Color:
    """Colour of `heat`."""
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


def _times(ratio: float) -> str:
    return f"{ratio:.2g} x" if ratio < 10 else f"{ratio:,.0f} x"


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
