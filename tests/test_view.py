"""The viewer shows what is stored: images as their readers give them, predictions as the tables have them."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import Say, csv_rows, write_toy
from made_predictions import TASK, made_prediction
from numpy.typing import NDArray
from PIL import Image
from viewing import Served, viewing

import keyhole
from keyhole import open_image
from keyhole.report.files import write_scores
from keyhole.report.score_layer import ScoreScale, colored, score_raster
from keyhole.view.scores import read_scores
from keyhole.view.tiles import zooms


def pixels(body: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGBA"))


@pytest.fixture(scope="module")
def looked_at(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with an evaluation."""
    run = Path(shutil.copytree(toy_run, tmp_path_factory.mktemp("view") / "run"))
    keyhole.evaluate(run, device="cpu")
    return run


@pytest.fixture(scope="module")
def served(looked_at: Path) -> Iterator[Served]:
    with viewing(looked_at) as server:
        yield server


def test_the_list_has_every_prediction_of_a_run_as_the_tables_have_it(served: Served, looked_at: Path) -> None:
    images = served.get("/api/images").json["images"]
    by_split = {split: csv_rows(looked_at / "predictions" / f"{split}.csv") for split in ("test", "val", "train")}
    assert [(image["split"], image["name"]) for image in images] == [
        (split, row["image"]) for split, rows in by_split.items() for row in rows
    ]
    for image, row in zip(images, itertools.chain(*by_split.values()), strict=True):
        answer = image["answers"]["label"]
        assert (answer["predicted"], answer["true"]) == (row["label.predicted"], row["label.true"])
        assert answer["error"] == float(answer["predicted"] != answer["true"])
        assert answer["confidence"] == max(answer["probability"].values())
        assert answer["probability"]["red"] == float(row["label.probability.red"])
        assert image["scores"] == (image["split"] == "test")


def test_map_and_kept_patches_are_those_of_the_evaluation(served: Served, looked_at: Path) -> None:
    row = csv_rows(looked_at / "evaluation" / "test" / "predictions.csv")[0]
    shown = served.get("/api/images/0").json
    with np.load(looked_at / "evaluation" / "test" / "scores" / "1.npz") as stored:
        told, scores = json.loads(bytes(stored["prediction"])), stored["map.label"]
    assert shown["name"] == told["name"] == row["image"]
    assert shown["kept"] == told["kept"]["patches"]
    assert shown["map"] == {"patches": 16, "top": {"label": 16}}
    values = [[served.get(f"/scores/0/0/0/{x}/{y}").json for x in range(5, 64, 16)] for y in range(5, 64, 16)]
    np.testing.assert_array_equal(np.array(values, np.float32), scores)
    assert served.get("/scores/0/0/0/64/0").json is None
    tile = pixels(served.get("/maps/0/0/0/0/0").body)
    middles = tile[8:64:16, 8:64:16, :3].reshape(16, 3).astype(int)
    order = scores.ravel().argsort()
    assert (tile[:64, :64, 3] > 0).all()
    assert (tile[64:, :, 3] == 0).all()
    assert (np.diff(middles[order].sum(axis=1)) >= 0).all(), "the palette grows brighter with the score"


@pytest.mark.parametrize(
    ("size", "patch", "stride", "edge"),
    [
        ((700, 410), 50, 20, "background"),
        ((700, 410), 48, 17, "shift"),
        ((530, 600), 3, 2, "drop"),
        ((300, 90), 30, 45, "drop"),
    ],
)
def test_overlay_map_and_pointer_show_overlapping_patches_alike(
    size: tuple[int, int], patch: int, stride: int, edge: str, tmp_path: Path
) -> None:
    prediction = made_prediction(size, patch, stride, edge=edge)
    assert prediction.scores is not None
    prediction = replace(prediction, scores=replace(prediction.scores, arrived=np.arange(len(prediction.scores)) != 7))
    shown = read_scores(write_scores(prediction, tmp_path / "scores.npz"))
    assert prediction.scores is not None
    scale = ScoreScale.of(prediction.scores.per_task[TASK.name])
    for zoom in range(zooms(prediction.size) + 1):
        downsample = 2 ** (zooms(prediction.size) - zoom)
        height, width = (-(-side // downsample) for side in size[::-1])
        values = score_raster(prediction.scores, TASK.name, (height, width), downsample)
        expected = colored(scale.heat(values))
        for row, column in np.ndindex(-(-height // 256), -(-width // 256)):
            tile = pixels(shown.tile(TASK.name, zoom, column, row) or b"")
            here = expected[row * 256 : (row + 1) * 256, column * 256 : (column + 1) * 256]
            high, wide = here.shape[:2]
            assert not tile[high:, :, 3].any()
            assert not tile[:, wide:, 3].any()
            seen = here[..., 3] > 0
            np.testing.assert_array_equal(tile[:high, :wide, 3] > 0, seen)
            np.testing.assert_allclose(tile[:high, :wide, :3][seen], here[..., :3][seen], atol=3)  # 255 of 256 colours
        for x, y in np.random.default_rng(0).integers(0, (width, height), (40, 2)).tolist():
            said = shown.score(TASK.name, zoom, x, y)
            assert said == values[y, x] or (said is None and np.isnan(values[y, x]))


def test_a_tile_has_the_pixels_of_the_reader(served: Served, looked_at: Path) -> None:
    shown = served.get("/api/images/0").json
    with open_image(shown["path"]) as image:
        whole = image.read((0, 0, 64, 64))
    tile = pixels(served.get("/tiles/0/0/0/0").body)
    np.testing.assert_array_equal(tile[:64, :64, :3], whole)
    assert (tile[:64, :64, 3] == 255).all()
    assert (tile[64:, 64:, 3] == 0).all()
    x, y, width, height = shown["kept"][0]["box"]
    patch = pixels(served.get("/patches/0/0").body)
    np.testing.assert_array_equal(patch[..., :3], whole[y : y + height, x : x + width])
    assert [served.get(f"/tiles/0/{place}").status for place in ("1/0/0", "0/1/0", "0/0/1")] == [404] * 3
    assert served.get("/patches/0/4").status == 404


def test_tiles_of_a_pyramid_fit_together_at_every_zoom(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (13, 20, 3), dtype=np.uint8)
    picture = blocks.repeat(64, axis=0).repeat(64, axis=1)[:800, :1250]
    Image.fromarray(picture).save(tmp_path / "plain.png")
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as tiff:
        tiff.write(picture, tile=(128, 128), subifds=1, compression="deflate", photometric="rgb")
        tiff.write(picture[::4, ::4], tile=(128, 128), subfiletype=1, compression="deflate", photometric="rgb")
    with viewing(tmp_path) as server:
        names = [image["name"] for image in server.get("/api/images").json["images"]]
        assert names == ["plain.png", "pyramid.tif"]
        for index in range(2):
            about = server.get(f"/api/images/{index}").json
            assert (about["width"], about["height"], about["zooms"]) == (1250, 800, 3)
            for zoom in range(4):
                scale = 2 ** (3 - zoom)
                for column in range(-(-1250 // (256 * scale))):
                    got = pixels(server.get(f"/tiles/{index}/{zoom}/{column}/0").body)
                    x = 256 * scale * column
                    there = min(256, round((1250 - x) / scale))
                    wanted = picture[: 256 * scale : scale, x : x + there * scale : scale]
                    rows = min(len(wanted), 800 // scale)
                    inner = np.s_[2 : rows - 2, 2 : there - 2, :3]
                    difference = np.abs(got[inner].astype(int) - wanted[inner[:2]].astype(int))
                    assert np.median(difference) <= 4, "colours are in their places"


def test_files_that_end_or_hang_a_decoder_do_not_end_the_server(shared: Path, tmp_path: Path) -> None:
    for hostile in (shared / "data" / "hostile").iterdir():
        shutil.copy(hostile, tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (10, 10)).save(tmp_path / "sound.png")
    with viewing(tmp_path) as server:
        names = [image["name"] for image in server.get("/api/images").json["images"]]
        assert names == ["giant_tile.tif", "page_loop.tif", "sound.png", "text.png"]
        statuses = [server.get(f"/tiles/{index}/0/0/0").status for index in range(4)]
        assert statuses == [422, 422, 200, 422]
        assert "problem" in server.get("/api/images/0").json
        assert server.get("/api/images/2").json["width"] == 10


def test_images_that_moved_or_changed_are_told(looked_at: Path, tmp_path: Path) -> None:
    toy = Path(csv_rows(looked_at / "evaluation" / "test" / "predictions.csv")[0]["path"]).parents[1]
    moved = Path(shutil.copytree(toy, tmp_path / "elsewhere" / "toy"))
    run = Path(shutil.copytree(looked_at, tmp_path / "run"))
    first, second, *_ = csv_rows(run / "evaluation" / "test" / "predictions.csv")
    Image.new("RGB", (80, 64)).save(moved / first["image"])
    (moved / second["image"]).unlink()
    for table in (run / "evaluation" / "test" / "predictions.csv", *(run / "predictions").glob("*.csv")):
        table.write_text(table.read_text().replace(f"{toy}/", f"{tmp_path}/gone/"))
    with viewing(run) as server:
        problem = server.get("/api/images/0").json["problem"]
        assert "no such file" in problem
        assert "--root DIR" in problem
        assert server.get("/tiles/0/0/0/0").status == 404
    with viewing(run, "--root", moved) as server:
        shown = server.get("/api/images/0").json
        assert shown["path"] == str(moved / first["image"])
        (note,) = shown["notes"]
        assert "The image has changed: 64 x 64" in note
        assert "no such file" in server.get("/api/images/1").json["problem"]


def test_scores_of_another_prediction_than_the_table_are_not_shown(looked_at: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(looked_at / "evaluation" / "test", tmp_path / "evaluation"))
    scores = folder / "scores"
    shutil.copy(scores / "2.npz", scores / "1.npz")
    (scores / "2.npz").write_bytes((scores / "3.npz").read_bytes()[:100])
    with viewing(folder) as server:
        assert "another prediction" in server.get("/api/images/0").json["no_scores"]
        assert "damaged" in server.get("/api/images/1").json["no_scores"]
        assert server.get("/api/images/2").json["kept"]
        assert server.get("/patches/0/0").status == 404
        assert server.get("/maps/1/0/0/0/0").status == 422


def test_what_predict_wrote_is_shown_without_labels(toy_run: Path, toy: Path, say: Say) -> None:
    assert say("predict", toy_run, toy / "red", "--out", "answers", "--device", "cpu").code == 0
    with viewing("answers") as server:
        image, *others = server.get("/api/images").json["images"]
        assert len(others) == 11
        assert image["answers"]["label"]["true"] == ""
        assert image["answers"]["label"]["error"] is None
        assert len(server.get("/api/images/0").json["kept"]) == 4


def test_what_cannot_be_shown_is_one_line(toy_run: Path, say: Say, tmp_path: Path) -> None:
    assert "nothing to look at" in say("view").refusal()
    assert "no such file or folder" in say("view", "missing.png").refusal()
    bare = Path(shutil.copytree(toy_run, tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation", "predictions")))
    assert "keyhole evaluate" in say("view", bare).refusal()
    assert "alone" in say("view", toy_run, tmp_path).refusal()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "predictions.csv").write_text(
        "image,path,label.predicted,label.probability.red\na,a,red,x\n"
    )
    assert "cannot be read" in say("view", tmp_path / "broken").refusal()
    write_toy(tmp_path / "photos", count=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: in use" in say("view", tmp_path / "photos", "--port", port).refusal()
    assert "--address" in say("view", tmp_path / "photos", "--address", "203.0.113.7", "--port", "0").refusal()
