"""QuPath counts from the corner of a slide's bounds, and everything else from the corner of level 0."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import csv_rows
from make_slides import write_vendors
from numpy.typing import NDArray
from test_predict import random_predictor

import keyhole
from keyhole.cli.main import main
from keyhole.config.settings import PatchConfig, SelectConfig
from keyhole.errors import ConfigError
from keyhole.images import open_image
from keyhole.inference.lesions import LesionShare, judge
from keyhole.inference.predictor import Predictor
from keyhole.patches.foreground.region_files import read_regions
from keyhole.report.files import write_prediction
from keyhole.report.geojson import TILES_AT_ONCE, tile_lines
from keyhole.report.prediction import Prediction, Scores

ORIGIN = 96, 64
"""Corner of the bounds of the Leica slide, which are half its width and height."""


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of which the scanner saw a part."""
    return write_vendors(tmp_path_factory.mktemp("slides"))["leica"].path


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return random_predictor(PatchConfig(size=32), SelectConfig(m=3))


@pytest.fixture(scope="module")
def prediction(slide: Path, predictor: Predictor) -> Prediction:
    return predictor.predict(slide)


def corners(geojson: Path) -> NDArray[np.int64]:
    features = json.loads(geojson.read_text())["features"]
    return np.array([np.min(feature["geometry"]["coordinates"][0], axis=0) for feature in features])


def write_geojson(path: Path, *boxes: tuple[int, int, int, int]) -> Path:
    """Rectangles as QuPath exports them."""
    rings = [[[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]] for x, y, w, h in boxes]
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}} for ring in rings
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def write_asap(path: Path, x: int, y: int, w: int, h: int) -> Path:
    points = enumerate([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])
    ring = "".join(f'<Coordinate Order="{n}" X="{a}" Y="{b}"/>' for n, (a, b) in points)
    path.write_text(
        f'<ASAP_Annotations><Annotations><Annotation Name="a" Type="Polygon"><Coordinates>{ring}</Coordinates>'
        "</Annotation></Annotations></ASAP_Annotations>"
    )
    return path


def test_what_is_written_for_qupath_is_moved_and_all_else_stays_in_level_0(
    slide: Path, prediction: Prediction, tmp_path: Path
) -> None:
    files = write_prediction(prediction, tmp_path)
    with open_image(slide) as image:
        assert image.qupath_origin == prediction.origin == ORIGIN
    boxes = prediction.kept.boxes
    np.testing.assert_array_equal(corners(files["kept.geojson"]), boxes[:, :2] - ORIGIN)
    kept = [[int(row["x"]), int(row["y"])] for row in csv_rows(files["kept.csv"])]
    np.testing.assert_array_equal(kept, boxes[:, :2])
    written = json.loads(files["prediction.json"].read_text())
    assert [patch["box"] for patch in written["kept"]["patches"]] == boxes.tolist()
    assert written["qupath_origin"] == list(ORIGIN)


def test_a_round_trip_through_qupath_is_the_same_place_as_mask_and_as_annotation(
    slide: Path, prediction: Prediction, tmp_path: Path, predictor: Predictor
) -> None:
    outlines = write_prediction(prediction, tmp_path)["kept.geojson"]
    regions = read_regions(outlines, prediction.origin)
    boxes = [(*region.rings[0].min(axis=0), *np.ptp(region.rings[0], axis=0)) for region in regions]
    np.testing.assert_array_equal(boxes, prediction.kept.boxes)
    share = judge(prediction, outlines)
    assert isinstance(share, LesionShare)
    assert share.kept == 1
    assert share.attention["color"] == pytest.approx(1)
    masked = random_predictor(PatchConfig(size=32, foreground="mask"), SelectConfig(m=3))
    again = masked.predict(slide, mask=outlines)
    assert again.scores is not None
    seen = again.scores.boxes(again.scores.index)
    assert sorted(seen.tolist()) == sorted(prediction.kept.boxes.tolist())


@pytest.mark.parametrize("mpp", [250, 0.0, float("nan")])
def test_a_scale_given_to_predict_is_held_to_the_rule_of_files(slide: Path, predictor: Predictor, mpp: float) -> None:
    with pytest.raises(ConfigError, match=r"mpp is .*0\.02 \.\.\. 100"):
        predictor.predict(slide, mpp=mpp)


def test_asap_counts_from_level_0_and_qupath_from_the_bounds(prediction: Prediction, tmp_path: Path) -> None:
    x, y, width, height = prediction.kept.boxes[0].tolist()
    left, top = ORIGIN
    same = [
        write_asap(tmp_path / "a.xml", x, y, width, height),
        write_geojson(tmp_path / "a.geojson", (x - left, y - top, width, height)),
    ]
    for path in same:
        share: Any = judge(prediction, path)
        assert share.kept == pytest.approx(1 / 3)
    other: Any = judge(prediction, write_asap(tmp_path / "b.xml", x - left, y - top, width, height))
    assert other != share


def test_features_carry_the_origin_of_their_slide(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "slides.csv").write_text(f"image,label\n{slide},a\n")
    made = ["embed", str(tmp_path / "slides.csv"), "--encoder", "small", "--width", "4", "--patch.size", "32"]
    weights = tmp_path / "small.safetensors"
    from safetensors.torch import save_file

    from keyhole.nn import SmallEncoder

    save_file(SmallEncoder(channels=3, width=4).state_dict(), str(weights))
    assert main([*made, "--weights", str(weights), "--out", str(tmp_path / "features")]) == 0
    (file,) = (tmp_path / "features").rglob("*.h5")
    source = keyhole.patches.features.FeatureOpener(file, "a")()
    try:
        assert source.grid.qupath_origin == ORIGIN
    finally:
        source.close()


def test_every_patch_is_a_tile_where_qupath_shows_it(prediction: Prediction, tmp_path: Path) -> None:
    files = write_prediction(prediction, tmp_path, tiles=True)
    read = json.loads(files["tiles.geojson"].read_text())
    scores, tiles = prediction.scores, read["features"]
    assert scores is not None
    assert read["type"] == "FeatureCollection"
    assert {tile["properties"]["objectType"] for tile in tiles} == {"tile"}
    np.testing.assert_array_equal(corners(files["tiles.geojson"]), scores.boxes(scores.index)[:, :2] - ORIGIN)
    measured = [tile["properties"]["measurements"] for tile in tiles]
    for name, score in (
        ("score times N", scores.score),
        *((f"score {k} times N", v) for k, v in scores.per_task.items()),
    ):
        np.testing.assert_allclose([each[name] for each in measured], score * len(scores), rtol=1e-5)
    ids = [tile["id"] for tile in tiles]
    ids += [each["id"] for each in json.loads(files["kept.geojson"].read_text())["features"]]
    assert len(set(ids)) == len(scores) + len(prediction.kept), "no tile is taken for a kept patch"
    again = write_prediction(prediction, tmp_path / "again", tiles=True)["tiles.geojson"]
    assert again.read_bytes() == files["tiles.geojson"].read_bytes(), "imported again, objects are the same"


def test_tiles_are_written_as_they_come(prediction: Prediction) -> None:
    asked = 0

    def counted(index: NDArray[np.int64]) -> NDArray[np.int64]:
        nonlocal asked
        asked += len(index)
        return np.tile(np.array([0, 0, 32, 32]), (len(index), 1))

    n = 3 * TILES_AT_ONCE
    score = np.full(n, 1 / n, np.float32)
    scores = Scores(1, n, np.arange(n), np.zeros((n, 2), np.int64), score, {"color": score}, counted)
    lines = tile_lines(replace(prediction, scores=scores))
    for _ in range(5):
        next(lines)
    assert asked == TILES_AT_ONCE
    assert sum("score times N" in line for line in lines) == n - 4
