"""The contact sheet shows the right colours in the right places, and nothing runs into anything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_predictions import made_prediction
from PIL import Image as Picture
from PIL import ImageFont

from keyhole.images.geometry import Size
from keyhole.report import contact_sheet as sheet
from keyhole.report import drawing
from keyhole.report.contact_sheet import SheetEntry, contact_sheet
from keyhole.report.prediction import KeptPatches, Pictures, Prediction
from keyhole.report.score_layer import ScoreScale, opaque
from keyhole.tasks.kinds import Task

LONG = "adenocarcinoma of the descending colon, poorly differentiated, with " + "W" * 900
COLON = Task("diagnosis", "multiclass", ("normal", LONG, "adenoma"))
TAGS = Task("tags", "multilabel", ("bird", "fish"))
AGE = Task("age", "regression")
BOXES = [[0, 0, 300, 300], [2400, 1200, 300, 300], [-100, 1900, 300, 300], [3900, 1900, 300, 300]]
SIZE = Size(4000, 2000)


def entry(
    task: Task = COLON,
    logits: tuple[float, ...] = (3, 0, 0),
    truth: str | None = "normal",
    channels: int = 3,
    attention: tuple[float, ...] = (0.1, 0.7, 0.15, 0.05),
    name: str = "slides/a.svs",
    thumbnail: tuple[int, int] = (240, 480),
    patches: int = 4,
) -> SheetEntry:
    p = task.probability(np.array(logits))
    m = len(attention)
    pixels = np.full((*thumbnail, channels), 128, np.uint8)
    shades = np.tile(np.arange(1, patches + 1, dtype=np.uint8)[:, None, None, None] * 20, (1, 40, 40, channels))
    prediction = Prediction(
        name=name,
        image=Path("a.svs"),
        size=SIZE,
        tasks=(task,),
        probability={task.name: task.by_column(p)},
        label={task.name: task.label(p)},
        kept=KeptPatches(
            index=np.arange(m),
            boxes=np.array((BOXES * m)[:m]),
            score=np.array(attention, np.float32),
            attention={task.name: np.array(attention, np.float32)},
        ),
        scores=None,
        pictures=Pictures(pixels, SIZE.width / thumbnail[1], shades, np.arange(patches)),
    )
    return SheetEntry(prediction, truth)


def with_pictures(of: SheetEntry, **changed: Any) -> SheetEntry:
    return replace(of, prediction=replace(of.prediction, pictures=replace(of.pictures, **changed)))


def drawn(entries: list[SheetEntry], folder: Path, title: str = "t") -> np.ndarray:
    path = contact_sheet(entries, folder / "sheet.png", title=title)
    with Picture.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def count(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((pixels == color).all(axis=-1).sum())


@pytest.mark.parametrize("entries", [1, 2, 40])
def test_height_grows_by_one_row_per_image(tmp_path: Path, entries: int) -> None:
    one = drawn([entry()], tmp_path)
    many = drawn([entry(channels=1 + 2 * (i % 2)) for i in range(entries)], tmp_path)
    assert many.shape == (one.shape[0] + (entries - 1) * (sheet.ROW + 2 * sheet.GAP), sheet.WIDTH, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("task", "logits", "truth", "color"),
    [
        (COLON, (3, 0, 0), "normal", sheet.RIGHT),
        (COLON, (3, 0, 0), "adenoma", sheet.WRONG),
        (COLON, (3, 0, 0), None, sheet.NEUTRAL),
        (TAGS, (3, 3), "fish | bird", sheet.RIGHT),
        (TAGS, (-3, -3), "|", sheet.RIGHT),
        (TAGS, (3, -3), "bird|fish", sheet.WRONG),
        (AGE, (41.5,), "42", sheet.NEUTRAL),
    ],
)
def test_the_predicted_label_is_green_when_right_and_red_when_wrong(
    tmp_path: Path, task: Task, logits: tuple[float, ...], truth: str | None, color: tuple[int, int, int]
) -> None:
    pixels = drawn([entry(task, logits, truth)], tmp_path)
    assert count(pixels, color) > 20
    for other in {sheet.RIGHT, sheet.WRONG, sheet.NEUTRAL} - {color}:
        assert count(pixels, other) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_are_where_the_boxes_are_and_the_hottest_is_the_most_attended(tmp_path: Path, channels: int) -> None:
    pixels = drawn([entry(channels=channels, attention=(0.0, 1.0, 0.0, 0.0))], tmp_path)
    cell = pixels[sheet.HEAD + sheet.GAP :][: sheet.ROW, sheet.MARGIN :][:, : sheet.IMAGE_SIDE]
    zoom = sheet.IMAGE_SIDE / SIZE.width
    top = (sheet.ROW - SIZE.height * zoom) / 2
    y, x = np.nonzero((cell == drawing.ATTENTION_COLORS[-1]).all(axis=-1))
    left, upper, side, _ = BOXES[1]
    assert (x.min(), x.max() + 1) == pytest.approx((left * zoom, (left + side) * zoom), abs=1.5)
    assert (y.min(), y.max() + 1) == pytest.approx((top + upper * zoom, top + (upper + side) * zoom), abs=1.5)
    # Boxes that reach over the border keep a visible frame on it.
    for left, upper, *_ in (BOXES[2], BOXES[3]):
        inside = cell[int(top + upper * zoom) + 1 : int(top + 2000 * zoom) - 1]
        edge = inside[:, 0] if left < 0 else inside[:, -1]
        assert (np.abs(edge.astype(int) - 128) > 20).any(axis=-1).all()


def test_patches_come_by_attention_the_highest_first(tmp_path: Path) -> None:
    pixels = drawn([entry()], tmp_path)
    row = pixels[sheet.HEAD + sheet.GAP + sheet.PATCH_SIDE // 2]
    middles = [sheet.PATCHES_LEFT + i * (sheet.PATCH_SIDE + sheet.PATCH_GAP) + sheet.PATCH_SIDE // 2 for i in range(4)]
    assert [int(row[x, 0]) for x in middles] == [40, 60, 20, 80]


def test_no_text_leaves_its_column_however_long(tmp_path: Path) -> None:
    entries = [
        entry(logits=(0, 9, 0), truth=LONG, name="/".join(["very-long-folder-name"] * 20) + "/x.svs"),
        entry(logits=(0, 9, 0), truth="adenoma", name="two\nlines\t\x1b[31m"),
    ]
    pixels = drawn(entries, tmp_path, title="W" * 5000)
    body = pixels[sheet.HEAD + 1 :]
    lines = (body[:, sheet.MARGIN : -sheet.MARGIN] == drawing.LINE).all(axis=(1, 2))
    assert lines.sum() == 1
    for left, width in (
        (0, sheet.MARGIN),
        (sheet.MARGIN + sheet.IMAGE_SIDE, sheet.GAP),
        (sheet.PATCHES_LEFT - sheet.GAP, sheet.GAP),
        (sheet.WIDTH - sheet.MARGIN, sheet.MARGIN),
    ):
        assert (body[~lines, left : left + width] == 255).all()
    assert (pixels[:, -sheet.MARGIN :] == 255).all(), "the title neither"


@given(text=st.text(max_size=80), width=st.integers(20, 300), keep_end=st.booleans())
@settings(deadline=None, max_examples=100)
def test_a_cut_text_fits_and_an_uncut_one_is_whole(text: str, width: int, keep_end: bool) -> None:
    text = " ".join(text.split())
    font = ImageFont.load_default(16)
    fitted = drawing.fitted(text, font, width, keep_end)
    assert font.getlength(fitted) <= width
    assert fitted == text or font.getlength(text) > width


def test_a_cut_name_keeps_its_suffix() -> None:
    assert drawing.fitted("a/very/long/path/" * 9 + "x.svs", ImageFont.load_default(18), 200, keep_end=True).endswith(
        "x.svs"
    )


@pytest.mark.parametrize("shape", [(1, 1), (480, 3), (3, 480), (2000, 900)])
def test_thumbnails_of_any_shape_and_few_patches_are_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    few = entry(attention=(1.0,), patches=1, thumbnail=shape)
    none = entry(attention=(0.0,) * 20 + (1.0,), patches=0, thumbnail=shape)
    assert drawn([few, none], tmp_path).shape[1] == sheet.WIDTH


def test_the_same_entries_give_the_same_bytes(tmp_path: Path) -> None:
    first = contact_sheet([entry()], tmp_path / "a.png").read_bytes()
    assert first == contact_sheet([entry()], tmp_path / "b.png").read_bytes()


def test_a_sheet_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one entry"):
        contact_sheet([], tmp_path / "a.png")


def test_shares_are_never_rounded_to_all_or_nothing() -> None:
    assert [drawing.percent(p) for p in (0.0, 0.0004, 0.5, 0.9996, 1.0)] == [
        "0.0 %",
        "< 0.1 %",
        "50.0 %",
        "> 99.9 %",
        "100 %",
    ]


def test_scores_are_a_picture_where_there_is_no_image(tmp_path: Path) -> None:
    scores = np.array([[0.0, 0.25, np.nan], [1.0, 0.5, 0.0]], np.float32)
    picture = opaque(ScoreScale(4, 4.0).heat(scores)).repeat(5, axis=0).repeat(5, axis=1)
    cells = picture[2::5, 2::5]
    assert tuple(cells[1, 0]) == drawing.SCORE_COLORS[-1]
    assert tuple(cells[0, 0]) == tuple(cells[0, 1]) == tuple(cells[1, 2]) == drawing.SCORE_COLORS[0]
    assert tuple(cells[1, 1]) == drawing.color_at(drawing.SCORE_COLORS, 0.5)
    assert tuple(cells[0, 2]) == drawing.LINE
    nothing = np.empty((0, 8, 8, 3), np.uint8)
    bare = with_pictures(
        entry(), thumbnail=picture, downsample=SIZE.width / 15, patches=nothing, place=np.empty(0, np.int64)
    )
    pixels = drawn([bare], tmp_path)
    assert (pixels[:, sheet.PATCHES_LEFT : sheet.WIDTH - sheet.MARGIN][sheet.HEAD + sheet.GAP :] == 255).all()


def test_patches_without_a_place_are_not_outlined(tmp_path: Path) -> None:
    placed = entry(attention=(0.0, 1.0, 0.0, 0.0))
    kept = replace(placed.prediction.kept, boxes=np.zeros((4, 4), np.int64))
    nowhere = replace(placed, prediction=replace(placed.prediction, kept=kept))
    here = slice(sheet.MARGIN, sheet.MARGIN + sheet.IMAGE_SIDE)
    assert count(drawn([placed], tmp_path)[sheet.HEAD :, here], drawing.ATTENTION_COLORS[-1]) > 0
    assert count(drawn([nowhere], tmp_path)[sheet.HEAD :, here], drawing.ATTENTION_COLORS[-1]) == 0


@pytest.mark.parametrize("m", [1, 4, 100])
def test_a_model_that_attends_to_all_patches_alike_does_not_look_certain(tmp_path: Path, m: int) -> None:
    pixels = drawn([entry(attention=(1 / m,) * m, patches=min(m, 8))], tmp_path)[sheet.HEAD :]
    assert count(pixels, drawing.ATTENTION_COLORS[0]) > 0
    for color in drawing.ATTENTION_COLORS[2:]:
        assert count(pixels, color) == 0
    even = np.full((4, 5), 1 / 20, np.float32)
    assert (opaque(ScoreScale.of(even.ravel()).heat(even)) == drawing.SCORE_COLORS[0]).all()


def test_the_sheet_of_an_evaluation_says_where_the_kept_patches_are_only_the_first(tmp_path: Path) -> None:
    even, chosen = np.full(48, 1 / 48), np.linspace(0, 2 / 48, 48)
    rows = [sheet.SheetEntry.of(made_prediction(score=score)) for score in (even, chosen)]
    assert [row.tied for row in rows] == [True, False]
    assert [row.patch_count for row in rows] == [48, 48]
    assert all(row.prediction.scores is None for row in rows), "they need not stay in memory"
    words = slice(sheet.TEXT_LEFT, sheet.TEXT_LEFT + sheet.TEXT_WIDTH)
    said = [count(drawn([row], tmp_path)[sheet.HEAD :, words], drawing.WRONG) for row in rows]
    assert said[0] > 100
    assert said[1] == 0


def test_colours_say_how_many_times_its_equal_share_a_patch_gets() -> None:
    weights = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 16.0, 50.0], np.float32) / 100
    assert drawing.heat(weights, equal=1 / 100).tolist() == pytest.approx([0, 0, 0, 0.25, 0.5, 1, 1])
    assert drawing.heat(np.array([0.25, 0.5, 1.0]), equal=1 / 4).tolist() == pytest.approx([0, 0.5, 1]), (
        "all on one of 4"
    )
    assert drawing.heat(np.array([1.0]), equal=1).tolist() == [0], "of one patch the attention says nothing"


def test_the_sheet_names_the_task_where_the_model_has_several(tmp_path: Path) -> None:
    one = entry()
    both = replace(one.prediction, tasks=(COLON, AGE))
    plain = np.asarray(Picture.open(contact_sheet([one], tmp_path / "one.png")))
    named = np.asarray(Picture.open(contact_sheet([replace(one, prediction=both)], tmp_path / "two.png")))
    differ = np.argwhere((plain != named).any(-1))
    left = sheet.MARGIN + sheet.IMAGE_SIDE + sheet.GAP
    assert len(differ), "the heading of the second column names the task"
    assert (differ[:, 0] < sheet.HEAD).all()
    assert (left <= differ[:, 1]).all()
    assert (differ[:, 1] < left + sheet.TEXT_WIDTH).all()
