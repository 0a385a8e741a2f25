"""How much of the kept attention lies in annotated lesions: figures by hand, and `keyhole evaluate` over a CSV."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image as Picture
import pytest
from conftest import csv_rows

from keyhole.errors import DataError
from keyhole.images.geometry import Size
from keyhole.inference.lesions import LesionShare, judge, lesion_means, lesion_share, lesion_table
from keyhole.patches.foreground.annotations import MarkedPixels, Outlines, check_annotation, read_annotation
from keyhole.patches.foreground.regions import Region
from keyhole.report.prediction import KeptPatches, Prediction, Scores
from keyhole.tasks.kinds import Task

TASKS = (Task("label", "binary", ("normal", "tumor")), Task("grade", "binary", ("1", "2")))
SIDE, COLUMNS = 16, 10


def boxes(index: np.ndarray) -> np.ndarray:
    """Patches of 16 px on a grid of 10 columns."""
    row, column = np.divmod(np.asarray(index), COLUMNS)
    return np.stack([column * SIDE, row * SIDE, np.full_like(row, SIDE), np.full_like(row, SIDE)], axis=1)


def prediction(kept: list[int], label: list[float], grade: list[float], scores: bool = True) -> Prediction:
    index = np.array(kept)
    attention = {"label": np.array(label, np.float32), "grade": np.array(grade, np.float32)}
    every = np.arange(100)
    score = np.full(100, 0.01, np.float32)
    return Prediction(
        name="a",
        image=Path("a.tif"),
        size=Size(160, 160),
        tasks=TASKS,
        probability={},
        label={},
        kept=KeptPatches(index, boxes(index), np.ones(len(index), np.float32), attention),
        scores=Scores(10, 10, every, np.stack(np.divmod(every, 10), axis=1), score, {}, boxes) if scores else None,
    )


def square(x: float, y: float, side: float) -> Region:
    return Region((np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]], np.float64),))


def test_attention_counts_by_the_area_of_a_patch_inside_and_touching_by_any_of_it() -> None:
    # the lesion is patch 0 whole, and the left half of patch 1
    regions = [square(0, 0, 16), Region((np.array([[16, 0], [24, 0], [24, 16], [16, 16]], np.float64),))]

    share = lesion_share(prediction([0, 1, 50, 51], [0.4, 0.2, 0.2, 0.2], [0.0, 0.0, 0.5, 0.5]), Outlines(regions))

    assert share.attention == pytest.approx({"label": 0.4 + 0.2 / 2, "grade": 0})
    assert share.kept == 0.5
    assert share.looked_at == 0.02
    assert share.regions == 2
    assert share.area == pytest.approx(0.015), "one patch and a half of 100"
    assert share.most_attention == pytest.approx(1.0), "all of it on patch 0"
    assert share.most_kept == 0.5, "two of the four kept can touch the lesion"


def test_a_lesion_smaller_than_a_patch_can_hold_only_part_of_the_attention() -> None:
    share = lesion_share(prediction([0, 50], [1.0, 0.0], [0.5, 0.5]), Outlines([square(0, 0, 8)]))
    assert share.most_attention == pytest.approx(0.25)
    assert share.attention["label"] == pytest.approx(0.25), "a perfect model reaches the most"
    assert share.area == pytest.approx(0.0025)
    nothing = lesion_share(prediction([0], [1.0], [1.0]), Outlines([square(1000, 1000, 8)]))
    assert (nothing.most_attention, nothing.most_kept, nothing.area) == (0, 0, 0)


def test_without_scores_it_is_not_known_what_was_looked_at() -> None:
    share = lesion_share(prediction([0], [1.0], [1.0], scores=False), Outlines([square(0, 0, 16)]))
    assert share.looked_at is None
    means = lesion_means({"a": share, "b": share}, {}, ["label"])
    assert means.looked_at.value is None
    assert means.attention["label"].value == 1.0
    assert "undefined (the scores of the patches were not kept)" in means.lines()[-1]


def test_patches_without_a_place_say_nothing_of_lesions(tmp_path: Path) -> None:
    nowhere = prediction([0], [1.0], [1.0])
    nowhere.kept.boxes[:] = 0  # as of stored features without coordinates

    said = judge(nowhere, outline(tmp_path / "a.geojson", (0, 0)))

    assert isinstance(said, str)
    assert "without coordinates" in said
    assert lesion_means({"a": said}, {}, ["label"]).left_out == {"a": said}


def test_means_are_over_images_with_a_lesion_and_what_does_not_count_is_listed() -> None:
    judged = {
        "one": LesionShare(1, {"label": 0.2, "grade": 0.0}, 0.5, 0.1, 0.02, 0.8, 0.5),
        "two": LesionShare(3, {"label": 0.6, "grade": 1.0}, 0.7, 0.3, 0.06, 1.0, 1.0),
        "none": LesionShare(0, {"label": 0.0, "grade": 0.0}, 0.0, 0.0),
        "broken": "broken.xml: not XML",
    }

    means = lesion_means(judged, dict.fromkeys(judged), ["label", "grade"])

    assert (means.images, means.empty, means.left_out) == (2, ("none",), {"broken": "broken.xml: not XML"})
    assert means.attention["label"].value == pytest.approx(0.4)
    assert (means.attention["label"].low, means.attention["label"].high) == pytest.approx((0.2, 0.6))
    assert (means.kept.value, means.looked_at.value) == pytest.approx((0.6, 0.2))
    assert means.lines() == [
        "label attention in annotated regions 0.400 [0.200 0.600]; by chance 0.040, at most 0.900; mean of 2 annotated images",
        "grade attention in annotated regions 0.500 [0.000 1.000]; by chance 0.040, at most 0.900; mean of 2 annotated images",
        "kept patches that touch an annotated region 0.600 [0.500 0.700]; by chance 0.200, at most 0.750",
        "1 annotation marks nothing and does not count; see lesions.csv",
        "1 annotation cannot be used and does not count; see lesions.csv",
    ]
    assert json.loads(json.dumps(means.to_json(), allow_nan=False))["images"] == 2
    table = list(csv.DictReader(lesion_table(judged, ["label", "grade"]).splitlines()))
    assert [row["image"] for row in table] == list(judged)
    assert table[1]["attention label"] == "0.600000"
    assert [bool(row["problem"]) for row in table] == [False, False, True, True]


@pytest.mark.parametrize(
    ("corner", "counts"),
    [((150, 150), True), ((-10, 40), True), ((159, 0), True), ((160, 0), False), ((0, -16), False)],
)
def test_regions_count_if_any_of_them_reaches_into_the_image(
    tmp_path: Path, corner: tuple[int, int], counts: bool
) -> None:
    far = (50_000, 50_000)
    said = judge(prediction([0], [1.0], [1.0]), outline(tmp_path / "a.geojson", corner, far))
    assert isinstance(said, LesionShare) == counts
    if isinstance(said, str):
        assert said.startswith("the regions lie outside of the image (160 x 160 px), at x ")
        assert said.endswith(" to 50,016; are they in microns, or of another slide?")


def test_a_slide_of_unknown_size_may_have_regions_beyond_its_last_patch(tmp_path: Path) -> None:
    beyond = outline(tmp_path / "a.geojson", (500, 500))
    features = replace(prediction([0], [1.0], [1.0]), patch={"size_known": False})
    share = judge(features, beyond)
    assert isinstance(share, LesionShare)
    assert share.most_attention == 0


def test_images_of_one_group_are_drawn_together() -> None:
    judged = {str(i): LesionShare(1, {"label": float(i % 2)}, 0.5, 0.1) for i in range(4)}

    apart = lesion_means(judged, {}, ["label"]).attention["label"]
    together = lesion_means(judged, dict.fromkeys(judged, "patient"), ["label"]).attention["label"]

    assert apart.low == 0.0
    assert together.low is None
    assert together.note == "there is only one group"


def test_no_lesion_at_all_is_said_and_not_zero() -> None:
    means = lesion_means({"a": LesionShare(0, {"label": 0.0}, 0.0, 0.0)}, {}, ["label"])
    assert means.attention["label"].value is None
    assert "undefined (no image has an annotated region)" in means.lines()[0]
    means = lesion_means({"a": "a.xml: not XML"}, {}, ["label"])
    assert "undefined (no annotation can be used)" in means.lines()[0]


def test_a_mask_says_what_its_outlines_say(tmp_path: Path) -> None:
    """Any resolution; patches over the border included."""
    squares = [(16, 32, 16), (96, 0, 48), (150, 150, 10)]
    outlines = Outlines([square(*each) for each in squares])
    mask = np.zeros((160, 160), np.uint8)
    for x, y, side in squares:
        mask[y : y + side, x : x + side] = 255
    every = boxes(np.arange(100)) + np.array([5, 3, 9, 0])
    for cell in (1, 2):
        Picture.fromarray(mask[::cell, ::cell]).save(tmp_path / "mask.png")
        marked = read_annotation(tmp_path / "mask.png", Size(160, 160))

        assert len(marked) == len(outlines) == 3
        np.testing.assert_allclose(marked.covered(every), outlines.covered(every), atol=0.05)
        np.testing.assert_array_equal(marked.touching(every), outlines.touching(every))
        assert lesion_share(prediction([0, 21], [0.5, 0.5], [0.0, 1.0]), marked).kept == 0.5


def test_the_area_of_a_mask_is_exact_between_its_cells() -> None:
    marked = MarkedPixels(np.array([[True, False], [False, False]]), Size(20, 40))

    np.testing.assert_allclose(marked.covered([[5, 10, 10, 20], [-10, -20, 20, 40], [12, 0, 5, 5]]), [0.25, 0.25, 0])
    assert marked.touching([[9.9, 19.9, 5, 5], [10, 0, 5, 5], [30, 0, 5, 5]]).tolist() == [True, False, False]
    assert not len(MarkedPixels(np.zeros((3, 4), bool), Size(4, 3)))
    assert len(MarkedPixels(np.eye(3, dtype=bool), Size(3, 3))) == 1, "pixels that touch at a corner are one area"


def test_a_mask_of_other_proportions_or_damaged_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Picture.fromarray(np.zeros((30, 40), np.uint8)).save(path)
    check_annotation(path)
    with pytest.raises(DataError, match=r"mask\.png: this mask of 40 x 30 pixels has other proportions.* turned"):
        read_annotation(path, Size(600, 800))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"mask\.png: this mask is damaged"):
        check_annotation(path)
    with pytest.raises(DataError, match="are read from"):
        check_annotation(tmp_path / "mask.gif")


def test_every_column_of_the_table_is_explained() -> None:
    explained = (Path(__file__).parents[1] / "docs" / "reports.md").read_text()
    for tasks in (["label"], ["TASK", "TASK"]):
        for column in lesion_table({}, tasks).strip().split(","):
            assert f"`{column}`" in explained


# --- keyhole evaluate ------------------------------------------------------------------------------------------------


def outline(path: Path, *corners: tuple[int, int]) -> Path:
    """A QuPath file with a square of 16 px at each corner."""
    rings = [[[x, y], [x + 16, y], [x + 16, y + 16], [x, y + 16], [x, y]] for x, y in corners]
    geometry = {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
    feature = {"type": "Feature", "geometry": geometry, "properties": {"objectType": "annotation"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature] if corners else []}))
    return path


@pytest.fixture
def annotated(toy: Path, tmp_path: Path) -> Path:
    """The toy images as a CSV; four of them with an annotation of the whole image, one with an empty one."""
    rows = [["image", "label", "annotation"]]
    for number, image in enumerate(sorted(toy.rglob("*.png"))[::2]):
        everywhere = [(x, y) for x in range(0, 64, 16) for y in range(0, 64, 16)]
        name = f"{number}.geojson" if number < 5 else ""
        if name:
            outline(tmp_path / name, *(everywhere if number < 4 else []))
        rows.append([str(image), image.parent.name, name])
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "data.csv"


def test_all_attention_lies_in_a_lesion_that_is_everywhere(toy_run: Path, annotated: Path, tmp_path: Path) -> None:
    from keyhole.inference.evaluate import evaluate

    evaluation = evaluate(toy_run, annotated, out=tmp_path / "out")

    lesions = json.loads((tmp_path / "out" / "metrics.json").read_text())["lesions"]
    assert lesions["images"] == 4
    assert lesions["attention_in_lesions"]["label"]["value"] == pytest.approx(1)
    assert lesions["kept_touching_a_lesion"]["value"] == lesions["looked_at_touching_a_lesion"]["value"] == 1
    assert len(lesions["without_region"]) == 1
    assert any(line.startswith("attention in annotated regions 1.000 [1.000 1.000]") for line in evaluation.lines())
    rows = csv_rows(tmp_path / "out" / "lesions.csv")
    assert [row["regions"] for row in rows] == ["16"] * 4 + ["0"]


def test_masks_are_read_from_the_column_annotation(toy_run: Path, annotated: Path, tmp_path: Path) -> None:
    from keyhole.inference.evaluate import evaluate

    everywhere, corner = np.full((32, 32), 255, np.uint8), np.zeros((64, 64), np.uint8)
    corner[:20, :10] = 1  # of the 16 patches, two
    for number, mask in enumerate([everywhere, corner]):
        Picture.fromarray(mask).save(tmp_path / f"{number}.png")
    text = annotated.read_text()
    annotated.write_text(text.replace("0.geojson", "0.png").replace("1.geojson", "1.png"))

    evaluate(toy_run, annotated, out=tmp_path / "out")

    rows = csv_rows(tmp_path / "out" / "lesions.csv")
    assert [row["regions"] for row in rows] == ["1", "1", "16", "16", "0"]
    assert [float(row["looked_at_touching"]) for row in rows[:3]] == [1, 2 / 16, 1]


def test_annotations_outside_of_their_image_are_left_out_and_counted_and_not_zero(
    toy_run: Path, annotated: Path, tmp_path: Path
) -> None:
    from keyhole.inference.evaluate import evaluate

    for number in (1, 2):
        outline(tmp_path / f"{number}.geojson", (50_000, 50_000))

    evaluation = evaluate(toy_run, annotated, out=tmp_path / "out")

    assert evaluation.lesions is not None
    assert evaluation.lesions.images == 2
    assert evaluation.lesions.attention["label"].value == pytest.approx(1), "as of the other two alone"
    assert len(evaluation.lesions.outside) == 2
    assert "2 annotations lie outside of their images and do not count; see lesions.csv" in evaluation.lines()
    assert not any("cannot be used" in line for line in evaluation.lines())
    rows = csv_rows(tmp_path / "out" / "lesions.csv")
    assert [row["attention"] for row in rows[:3]] == ["1.000000", "", ""]
    assert [row["problem"].partition(" (")[0] for row in rows] == [
        "",
        *["the regions lie outside of the image"] * 2,
        "",
        "the annotation marks nothing",
    ]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "2 annotations lie outside of their images" in report


def test_a_broken_annotation_ends_it_at_once_or_is_left_out_and_listed(
    toy_run: Path, annotated: Path, tmp_path: Path
) -> None:
    from keyhole.inference.evaluate import evaluate

    (tmp_path / "1.geojson").write_text("{")
    (tmp_path / "2.geojson").write_text("")

    with pytest.raises(DataError, match=r"1\.geojson: not JSON"):
        evaluate(toy_run, annotated, out=tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.csv").exists()
    evaluation = evaluate(toy_run, annotated, out=tmp_path / "out", on_bad_image="skip")

    assert evaluation.lesions is not None
    assert evaluation.lesions.images == 2
    assert len(evaluation.lesions.left_out) == 2
    assert evaluation.metrics[0].n == 12  # the images themselves still count
    assert not evaluation.left_out
    problems = [row["problem"] for row in csv_rows(tmp_path / "out" / "lesions.csv")]
    assert sum("geojson" in problem for problem in problems) == 2


def test_without_annotations_nothing_is_said_of_lesions(toy_run: Path, tmp_path: Path) -> None:
    from keyhole.inference.evaluate import evaluate

    evaluation = evaluate(toy_run, out=tmp_path / "out")

    assert evaluation.lesions is None
    assert "lesions" not in json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not (tmp_path / "out" / "lesions.csv").exists()
