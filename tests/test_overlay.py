"""The picture of a prediction: every score where its patch is, kept patches outlined, one meaning for each colour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_predictions import TASK, made_prediction

from keyhole.report.captions import BETWEEN, Words, attention_legend, score_legend
from keyhole.report.drawing import ATTENTION_COLORS, INK, SCORE_COLORS, Page, ScaleBar, heat, palette, text_width
from keyhole.report.kept_sheet import kept_sheet
from keyhole.report.overlay import MAX_SIDE, MIN_SIDE, overlay, panel
from keyhole.report.prediction import Prediction
from keyhole.report.score_layer import OPACITY, ScoreScale, colored, score_raster

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
HUGE = 128_000, 128_000


def boxes_of(prediction: Prediction) -> np.ndarray:
    assert prediction.scores is not None
    return prediction.scores.boxes(prediction.scores.index)


@given(
    width=st.integers(60, 700),
    height=st.integers(60, 700),
    patch=st.integers(8, 60),
    stride=st.integers(6, 70),
    edge=st.sampled_from(["drop", "shift", "reflect", "background"]),
    downsample=st.floats(0.5, 40),
)
@settings(deadline=None, max_examples=60)
def test_each_pixel_has_the_highest_score_of_the_patches_over_it(
    width: int, height: int, patch: int, stride: int, edge: str, downsample: float
) -> None:
    prediction = made_prediction((width, height), patch, stride, edge=edge)
    scores = prediction.scores
    assert scores is not None
    shape = max(1, round(height / downsample)), max(1, round(width / downsample))
    raster = score_raster(scores, TASK.name, shape, downsample)
    assert raster.shape == shape
    first = np.rint(boxes_of(prediction)[:, :2] / downsample).clip(0, [shape[1] - 1, shape[0] - 1]).astype(int)
    assert (raster[first[:, 1], first[:, 0]] >= scores.score).all(), "a patch is at least a pixel"
    assert np.nanmax(raster) == scores.score.max()
    middle = (np.stack(np.meshgrid(np.arange(shape[1]), np.arange(shape[0])), axis=-1) + 0.5) * downsample
    for (x, y), value in zip(
        middle.reshape(-1, 2)[:: 1 + shape[0] * shape[1] // 50],
        raster.ravel()[:: 1 + shape[0] * shape[1] // 50],
        strict=True,
    ):
        left, top, wide, high = boxes_of(prediction).T
        near = (left - downsample <= x) & (x < left + wide + downsample)
        near &= (top - downsample <= y) & (y < top + high + downsample)
        assert np.isnan(value) or value in scores.score[near]


def test_a_patch_that_was_not_scored_has_no_colour() -> None:
    prediction = made_prediction((400, 300), 50)
    scores = prediction.scores
    assert scores is not None
    arrived = np.ones(len(scores), bool)
    arrived[9] = False
    raster = score_raster(replace(scores, arrived=arrived), None, (300, 400), 1.0)
    x, y, _, _ = boxes_of(prediction)[9]
    assert np.isnan(raster[y : y + 50, x : x + 50]).all()
    assert np.isnan(raster).sum() == 50 * 50
    layer = colored(ScoreScale.of(scores.score).heat(raster))
    assert (layer[y : y + 50, x : x + 50, 3] == 0).all()
    assert layer[0, 0, 3] > 0


def test_the_scale_reaches_from_an_equal_share_to_the_highest_score() -> None:
    even = ScoreScale.of(np.full(100, 0.01, np.float32))
    assert even == (100, 16)
    assert (even.heat(np.full(3, 0.01, np.float32)) == 0).all(), "attention to all alike does not look like a find"
    peaked = np.array([0.7, *np.full(9999, 0.3 / 9999)], np.float32)
    scale = ScoreScale.of(peaked)
    assert scale == (10_000, 8192)
    assert 0.95 < scale.heat(peaked)[0] <= 1
    assert ScoreScale.of(np.ones(1, np.float32)) == (1, 1)
    assert (ScoreScale(1, 1.0).heat(np.array([1.0, np.nan], np.float32))[:1] == 0).all()
    scores = made_prediction((10_000, 10_000), 100, score=peaked).scores
    assert scores is not None
    legend = score_legend(scale, scores, TASK.name)
    assert legend.ticks == ((0, "1/N or less"), (6 / 13, "64 x 1/N"), (1, "8,192 x 1/N"))
    assert [text for _, text in attention_legend(100).ticks] == ["1/M = 1.0 %", "4.0 %", "16.0 % or more"]
    assert "attention weight" in attention_legend(4).text
    assert "score" in legend.text
    assert "here 0.3 to 7,000 x 1/N." in legend.text


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 48])
def test_each_value_of_a_legend_stands_at_its_colour_and_no_colour_has_two(n: int) -> None:
    scores = made_prediction((n * 100, 100), 100, m=1).scores
    assert scores is not None
    scale = ScoreScale.of(scores.score)
    for equal, legend in ((1 / n, attention_legend(n)), (1 / n, score_legend(scale, scores, TASK.name))):
        places, texts = zip(*legend.ticks, strict=True)
        assert len(set(places)) == len(set(texts)) == len(places)
        if n == 1:
            assert texts == ("100 %",)
            assert "all of the attention" in legend.text
            continue
        assert (places[0], places[-1]) == (0, 1)
        for place, text in legend.ticks:
            number = float(text.split("=")[-1].split()[0].split("/")[0].replace(",", ""))
            share = number / 100 if "%" in text else number * equal
            top = min(16, n) if "%" in text else scale.top
            assert place == pytest.approx(heat(np.array([share], np.float32), equal, top)[0], abs=0.01), text


@pytest.mark.parametrize(("low", "text"), [(0.9, "0.9 to 1.9"), (1e-6, "less than 0.01 to 1.9"), (1.0, "here 1")])
def test_the_legend_says_which_scores_occur_in_the_image(low: float, text: str) -> None:
    score = np.full(48, low / 48, np.float32)
    if low != 1.0:
        score[7] = 1.9 / 48
    scores = made_prediction((800, 600), 100, score=score).scores
    assert scores is not None
    said = score_legend(ScoreScale.of(score), scores, TASK.name).text
    assert f"{text} x 1/N." in said
    arrived = np.ones(48, bool)
    score[9], arrived[9] = 0, False
    unread = replace(scores, score=score, per_task={TASK.name: score}, arrived=arrived)
    assert score_legend(ScoreScale.of(score), unread, TASK.name).text == said, "what was not read has no score"


def test_the_legend_says_which_frames_have_a_number() -> None:
    assert "Numbers 1 to 8: the highest weights." in attention_legend(16).text
    assert "Numbers: rank by this weight." in attention_legend(8).text
    assert "Numbers: rank by this weight." in attention_legend(16, numbered=16).text, "as on the sheet of kept patches"


@given(
    width=st.integers(150, 2000),
    model=st.text(st.characters(categories=["L", "Nd"]), min_size=1, max_size=12),
    note=st.lists(st.sampled_from(["another", "resolution", "0.5", "µm/px"]), max_size=40).map(" ".join),
)
@settings(deadline=None, max_examples=60)
def test_no_fact_above_the_pictures_is_lost_for_want_of_width(width: int, model: str, note: str) -> None:
    prediction = replace(made_prediction(mpp=0.25), model=model, notes=(note,) if note else ())
    words = Words.of(prediction, TASK)
    lines = words.lines(13, width)
    said = [fact for line, _ in lines for fact in line.split(BETWEEN)]
    facts = words.about.split(BETWEEN)
    assert said[: len(facts)] == facts
    assert facts[-2:] == ["4 kept", model]
    assert " ".join(said[len(facts) :]) == note
    assert all(BETWEEN not in line or text_width(line, 13) <= width for line, _ in lines)
    page = Page(width, 1000)
    assert words.draw(page, 0, 0, width, 1) == words.height(1, width)


def test_one_patch_is_not_called_patches() -> None:
    assert "1 patch of 300 px" in Words.of(made_prediction((300, 300), 300, m=1), TASK).about
    assert "48 patches of 50 px" in Words.of(made_prediction(), TASK).about


def test_patches_that_are_only_the_first_of_equal_ones_are_not_shown_as_a_choice() -> None:
    even = np.full(48, 1 / 48, np.float32)
    tied = made_prediction(score=even)
    assert Words.of(tied, TASK).doubts == ("all patches have the same score: these are the first",)
    rounded = even * (1 + np.finfo(np.float32).eps * np.random.default_rng(0).integers(-1, 2, 48)).astype(np.float32)
    kept = replace(made_prediction(score=rounded), kept=tied.kept)
    assert Words.of(kept, TASK).doubts == Words.of(tied, TASK).doubts, "equal but for rounding"
    assert tied.scores is not None
    unread = replace(tied.scores, arrived=np.arange(48) != 20, score=np.where(np.arange(48) == 20, 0, even))
    assert unread.tied(tied.kept.index), "a patch that was not read has no score"
    chosen = even.copy()
    chosen[0] *= 1.001
    assert Words.of(made_prediction(score=chosen), TASK).doubts == ()
    assert not tied.scores.tied(np.array([5, 9])), "not the first: chosen by another rule"
    assert Words.of(made_prediction(score=even, m=48), TASK).doubts == (), "all are kept: nothing was chosen"


def test_palettes_are_ordered_by_lightness_alone_and_do_not_share_a_colour() -> None:
    from matplotlib import colormaps

    viridis = colormaps["viridis"](np.linspace(0, 1, 256))[:, :3] * 255
    assert np.abs(palette(SCORE_COLORS) - viridis).max() < 15
    for colors, sign in ((SCORE_COLORS, 1), (ATTENTION_COLORS, -1)):
        assert (sign * np.diff(palette(colors) @ LUMINANCE) > -0.5).all()
    apart = np.abs(palette(SCORE_COLORS)[:, None].astype(int) - palette(ATTENTION_COLORS)[None]).sum(axis=-1)
    assert apart.min() > 80


@pytest.mark.parametrize(
    ("size", "patch"), [((500, 500), 100), ((64, 48), 16), (HUGE, 2000), ((90_000, 4000), 500), ((300, 5000), 100)]
)
def test_images_of_any_size_and_shape_give_a_picture_of_one_size(size: tuple[int, int], patch: int) -> None:
    prediction = made_prediction(size, patch, mpp=0.25)
    whole, sheet = overlay(prediction, TASK), kept_sheet(prediction, TASK)
    assert MIN_SIDE <= max(whole.size) <= 3 * MAX_SIDE
    assert min(whole.size) >= MIN_SIDE
    assert sheet.size[0] >= MIN_SIDE
    longest = max(panel(prediction, TASK, 700).size)
    assert longest == 700
    assert np.asarray(overlay(prediction, TASK)).tobytes() == np.asarray(whole).tobytes()


def test_layer_and_frames_lie_where_the_patches_are() -> None:
    score = np.full(48, 0.5 / 46)
    score[[10, 37]] = 0.4, 0.1
    prediction = made_prediction((800, 600), 100, score=score, m=2)
    plain, layered = (np.asarray(panel(prediction, TASK, 800, layer=layer)).astype(int) for layer in (False, True))
    x, y, side, _ = boxes_of(prediction)[10]
    for pixels in (plain, layered):
        rows, columns = np.nonzero((pixels == ATTENTION_COLORS[-1]).all(axis=-1))
        assert len(rows) == 0, "0.8 of two is less than all"
    hottest = np.abs(plain - palette(ATTENTION_COLORS)[round(np.log2(0.8 * 2) * 255)]).sum(axis=-1) == 0
    rows, columns = np.nonzero(hottest)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (x, x + side - 1, y, y + side - 1)
    hot = ScoreScale.of(score.astype(np.float32)).heat(score[[10, 12]].astype(np.float32))
    assert hot.tolist() == pytest.approx([np.log2(0.4 * 48) / 5, 0])
    grey = 0.4 * 255 + 0.6 * 128
    for place, share in ((50, hot[0]), (250, hot[1])):
        opacity = OPACITY[0] + (OPACITY[1] - OPACITY[0]) * share
        expected = opacity * palette(SCORE_COLORS)[round(255 * share)] + (1 - opacity) * grey
        assert np.abs(layered[y + 50, x + place] - expected).max() < 8
    inside = plain[y + 20 : y + 80, x + 30 : x + 80]
    assert ((inside >= 119) & (inside <= 137)).all(), "the image itself, without the layer"


@pytest.mark.parametrize(("mpp", "um", "text"), [(0.25, 50.0, "50 µm"), (20.0, 5000.0, "5 mm"), (None, 0, "")])
def test_a_scale_bar_has_its_length_and_stands_only_where_microns_are_known(
    mpp: float | None, um: float, text: str
) -> None:
    prediction = made_prediction((1000, 800), 100, mpp=mpp)
    pixels = np.asarray(overlay(prediction, TASK))
    longest = 0
    below = pixels[-260:] if mpp else pixels[-220:]  # under the panels, whose frames have long lines too
    for row in (below == INK).all(axis=-1).astype(int):
        ends = np.flatnonzero(np.diff(np.r_[0, row, 0]))
        longest = max(longest, int((ends[1::2] - ends[::2]).max(initial=0)))
    if mpp is None:
        assert longest < 40, "letters"
        return
    bar = ScaleBar.within(1000 / 4, mpp)
    assert (bar.um, bar.pixels) == (um, um / mpp)
    assert longest == pytest.approx(um / mpp, abs=1.5)
    assert text.split()[1] in Words.of(prediction, TASK).about


def test_one_panel_shows_the_scores_where_there_is_no_image() -> None:
    prediction = made_prediction((1000, 800), 100)
    assert prediction.pictures is not None
    bare = replace(prediction, pictures=replace(prediction.pictures, of_scores=True, note="stored features: scores"))
    assert overlay(bare, TASK).size[0] < overlay(prediction, TASK).size[0]
    shown = np.asarray(panel(bare, TASK, 500))
    scale = ScoreScale.of(prediction.scores.score)  # type: ignore[union-attr]
    x, y, *_ = (prediction.kept.boxes[0] / 2).astype(int)
    expected = palette(SCORE_COLORS)[round(float(scale.heat(prediction.kept.score[:1])[0]) * 255)]
    assert tuple(shown[y + 30, x + 30]) == tuple(expected)
    assert Words.of(bare, TASK).doubts == ("stored features: scores",)


def test_a_prediction_without_pictures_says_so() -> None:
    with pytest.raises(ValueError, match="carries no pictures; predict with pictures=True"):
        overlay(replace(made_prediction(), pictures=None), TASK)
