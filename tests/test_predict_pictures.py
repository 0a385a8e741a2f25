"""`keyhole predict --overlay --save-patches N --tiles`: by-products of the prediction, and nothing that is out of date."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import Say, csv_rows
from PIL import Image
from test_features import COORDS, write_h5
from test_features import predictor as feature_predictor
from test_predict import random_predictor
from test_shown import model_folder

import keyhole
import keyhole.report.pictures as report_pictures
from keyhole.config.settings import PatchConfig, SelectConfig
from keyhole.datasets.tiff_pyramid import TILE, write_pyramid
from keyhole.images.geometry import Size
from keyhole.images.pillow import PillowImage
from keyhole.inference.predictor import describe
from keyhole.report.captions import Words
from keyhole.report.drawing import INK
from keyhole.report.files import write_prediction
from keyhole.report.overlay import overlay, panel
from keyhole.runs.checkpoint import save_model

PLAIN = {"prediction.json", "kept.csv", "kept.geojson", "scores.csv", "scores.npz"}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_pictures_are_written_on_request_from_one_opening_and_go_when_they_are_not_asked_for(
    toy_run: Path, toy: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [toy / "red" / "0.png", toy / "green" / "1.png"]
    opened: Counter[str] = Counter()
    original = PillowImage.__init__

    def counted(image: PillowImage, path: Path) -> None:
        opened[path.name] += 1
        original(image, path)

    monkeypatch.setattr(PillowImage, "__init__", counted)
    out = tmp_path / "answers"
    said = say("predict", toy_run, *images, "--out", out, "--overlay", "--save-patches", "3", "--tiles")
    assert said.code == 0
    assert opened == {"0.png": 1, "1.png": 1}
    for image in images:
        folder = out / image.name
        kept = csv_rows(folder / "kept.csv")
        patches = {f"patches/{n:03}_x{row['x']}_y{row['y']}.png": row for n, row in enumerate(kept[:3], start=1)}
        assert files(folder) == PLAIN | {"overlay_label.png", "kept_label.png", "tiles.geojson", *patches}
        with Image.open(image) as picture:
            whole = np.asarray(picture)
        for name, row in patches.items():
            x, y = int(row["x"]), int(row["y"])
            with Image.open(folder / name) as saved:
                np.testing.assert_array_equal(np.asarray(saved), whole[y : y + 16, x : x + 16])
        with Image.open(folder / "overlay_label.png") as drawn:
            assert drawn.width > 1000
        (folder / "patches" / "mine.png").write_bytes(b"mine")
    assert say("predict", toy_run, *images, "--out", out).code == 0
    for image in images:
        assert files(out / image.name) == PLAIN | {"patches/mine.png"}, "an overlay of an earlier model would mislead"
    assert say("predict", toy_run, images[0], "--out", tmp_path / "few", "--save-patches", "99").code == 0
    assert len(list((tmp_path / "few" / "0.png" / "patches").iterdir())) == 4, "all that were kept"


@pytest.mark.parametrize("wrong", ["0", "-1", "x"])
def test_a_number_of_patches_is_at_least_one(toy_run: Path, toy: Path, say: Say, wrong: str) -> None:
    said = say("predict", toy_run, toy / "red" / "0.png", "--out", "a", "--save-patches", wrong)
    assert "--save-patches" in said.refusal()


def test_features_are_saved_from_their_slide_and_without_one_it_is_said(tmp_path: Path, say: Say) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (800, 1325, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", compress_level=0)
    features = write_h5(tmp_path / "a.h5", coords=COORDS // 4)
    model = feature_predictor()
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model.model, describe(model.config, model.tasks))
    (tmp_path / "new.csv").write_text(f"image,features\na.png,{features}\n")
    asked = ("predict", tmp_path / "model", tmp_path / "new.csv", "--overlay", "--save-patches", "2", "--out")
    assert say(*asked, "with").code == 0
    (folder,) = (path for path in Path("with").iterdir() if path.is_dir())
    row = csv_rows(folder / "kept.csv")[0]
    x, y, side = int(row["x"]), int(row["y"]), int(row["width"])
    with Image.open(next(folder.glob("patches/001_*"))) as saved:
        shown = np.asarray(saved)
    crop = Image.fromarray(pixels[y : y + side, x : x + side])
    np.testing.assert_array_equal(shown, np.asarray(crop.resize(saved.size, Image.Resampling.BICUBIC)))
    (tmp_path / "a.png").unlink()
    said = say("predict", tmp_path / "model", features, "--overlay", "--save-patches", "2", "--out", "without")
    assert said.code == 0
    assert "no patches saved, since there are no pixels of: " in said.err
    (folder,) = (path for path in Path("without").iterdir() if path.is_dir())
    assert {name for name in files(folder) if name.endswith("png")} == {"overlay_label.png", "kept_label.png"}


def test_pictures_in_full_read_no_patch_again(toy: Path, tmp_path: Path) -> None:
    predictor = keyhole.load(model_folder(tmp_path / "model", size=16))
    for whole in (0, 4):
        predictor.whole_patches = whole
        prediction = predictor.predict(toy / "red" / "0.png")
        reader = predictor.engine.reader
        assert prediction.pictures is not None
        assert prediction.pictures.whole.shape[0] == whole
        assert reader.reread_patches == 0
    assert len(list(tmp_path.iterdir())) == 1
    names = write_prediction(prediction, tmp_path / "out", overlay=True)
    assert {"overlay_label.png", "kept_label.png"} < names.keys()


def test_a_slide_of_sixteen_gigapixels_is_drawn_whole_with_its_millimetres(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tissue = rng.integers(90, 200, (TILE, TILE, 3), dtype=np.uint8)
    found = {(400, 77), (12, 498)}
    write_pyramid(
        tmp_path / "a.tif",
        Size(128_000, 128_000),
        lambda column, row: tissue if (column, row) in found else None,
        mpp=0.25,
        background=np.full((TILE, TILE, 3), 244, np.uint8),
        threads=1,
    )
    predictor = random_predictor(PatchConfig(size=32, level=2), SelectConfig(m=2))
    prediction = predictor.predict(tmp_path / "a.tif")
    assert prediction.scores is not None
    assert len(prediction.scores) == 62_500
    drawn = overlay(prediction, prediction.tasks[0])
    assert drawn.width < 2400
    assert drawn.height < 1700
    assert "128,000 x 128,000 px (32 mm x 32 mm)" in Words.of(prediction, prediction.tasks[0]).about
    shown = np.asarray(panel(prediction, prediction.tasks[0], 1024, layer=False))
    for x, y, *_ in prediction.kept.boxes / 125:  # patches of 4 pixels, each in a frame that can be seen
        around = shown[max(0, int(y) - 9) : int(y) + 12, max(0, int(x) - 9) : int(x) + 12]
        assert (around == INK).all(axis=-1).sum() > 20


def test_a_large_image_without_smaller_levels_is_sketched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.repeat(np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 16, 512, axis=0), 512, axis=1)
    tifffile.imwrite(tmp_path / "a.tif", pixels.repeat(3, axis=2), tile=(256, 256), photometric="rgb")
    predictor = random_predictor(PatchConfig(size=256), SelectConfig(m=2))
    whole = predictor.predict(tmp_path / "a.tif").pictures
    monkeypatch.setattr(report_pictures, "MAX_THUMBNAIL_PIXELS", 2**20)
    sketched = predictor.predict(tmp_path / "a.tif").pictures
    assert whole is not None
    assert sketched is not None
    assert "sketch" in sketched.note
    assert whole.note == ""
    assert sketched.downsample == whole.downsample
    np.testing.assert_allclose(sketched.thumbnail[8::16, 8::16], whole.thumbnail[8::16, 8::16], atol=1)
