"""Patches over the border, on the way that production takes: from `train` and `embed` to what is written of an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import settings, write_toy
from PIL import Image
from safetensors.torch import save_file

import keyhole
from keyhole.cli.main import main
from keyhole.config.file import resolve
from keyhole.config.settings import Config, PatchConfig
from keyhole.errors import ConfigError
from keyhole.images import open_image
from keyhole.nn import SmallEncoder
from keyhole.patches.edge import Edge
from keyhole.patches.features import FeatureOpener
from keyhole.patches.grid import PatchGrid
from keyhole.report.files import write_prediction
from keyhole.runs.run import find_run

EDGES: tuple[Edge, ...] = ("drop", "shift", "reflect", "background")
SIDE = 58
"""Of an image: three patches of 16 px, and 10 px left over."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("photos") / "photos", count=8, side=SIDE)


@pytest.fixture(scope="module")
def photos_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on photographs, under the default rule; do not change it."""
    return keyhole.train(photos, tmp_path_factory.mktemp("runs") / "photos", **short()).path


def short(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return settings(**{"train": {"epochs": 1}, **sections})


def write_slide(path: Path, seed: int) -> Path:
    """A pyramid of two levels whose sides are no multiples of 16."""
    pixels = np.random.default_rng(seed).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as writer:
        writer.write(pixels, tile=(32, 32), photometric="rgb")
        writer.write(pixels[::2, ::2], tile=(32, 32), photometric="rgb", subfiletype=1)
    return path


def test_photographs_learn_and_predict_from_patches_inside_the_image(
    photos: Path, photos_run: Path, tmp_path: Path
) -> None:
    assert find_run(photos_run).config.patch.edge == "shift"
    assert json.loads((photos_run / "best" / "model.json").read_text())["patch"]["edge"] == "shift"
    assert "patch.edge auto: shift, since green/0.png has one level" in (photos_run / "log.txt").read_text()
    prediction = keyhole.load(photos_run).predict(photos / "red" / "1.png")
    assert prediction.scores is not None
    boxes = prediction.scores.boxes(prediction.scores.index)
    assert prediction.patch["edge"] == "shift"
    assert (prediction.scores.rows, prediction.scores.columns) == (4, 4)
    assert boxes.min() == 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() == SIDE
    assert np.isfinite(prediction.scores.map()).all()
    files = write_prediction(prediction, tmp_path)
    rings = [
        feature["geometry"]["coordinates"][0] for feature in json.loads(files["kept.geojson"].read_text())["features"]
    ]
    assert 0 <= np.min(rings) <= np.max(rings) <= SIDE


def test_slides_are_looked_at_as_before(tmp_path: Path) -> None:
    for number in range(8):
        write_slide(tmp_path / "slides" / "ab"[number % 2] / f"{number}.tif", number)
    run = keyhole.train(tmp_path / "slides", tmp_path / "run", **short())
    assert run.config.patch.edge == "background"
    assert keyhole.load(run.path).predict(tmp_path / "slides" / "a" / "0.tif").patch["edge"] == "background"
    # what the model learned with holds for images of another kind too
    photograph = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    photograph.save(tmp_path / "a.png")
    assert keyhole.load(run.path).predict(tmp_path / "a.png").patch["edge"] == "background"


@pytest.mark.parametrize("edge", EDGES)
def test_a_run_under_each_rule_trains_shifted_evaluates_and_says_its_rule(
    edge: Edge, photos: Path, tmp_path: Path
) -> None:
    run = keyhole.train(photos, tmp_path / "run", **short(patch={"size": 16, "edge": edge}))
    assert run.config.patch.edge == edge
    assert keyhole.evaluate(run.path).left_out == {}
    assert (run.path / "evaluation" / "test" / "contact_sheet.png").is_file()
    prediction = keyhole.load(run.path / "best").predict(photos / "red" / "1.png")
    assert prediction.scores is not None
    assert prediction.patch["edge"] == edge
    assert (prediction.scores.rows, prediction.scores.columns) == ((3, 3) if edge == "drop" else (4, 4))


@pytest.mark.parametrize("mpp", [None, 0.65])
@pytest.mark.parametrize("stride", [16, 11, 19])
@pytest.mark.parametrize("edge", EDGES)
def test_features_lie_where_the_patches_did(edge: Edge, stride: int, mpp: float | None, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 131, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "images.csv").write_text("image,mpp\na.png,0.5\n")
    save_file(SmallEncoder(3, 4).state_dict(), tmp_path / "weights.safetensors")
    patch = {"size": 16, "stride": stride, "mpp": mpp, "edge": edge}
    done = keyhole.embed(
        tmp_path / "images.csv",
        tmp_path / "features",
        encoder="small",
        width=4,
        weights=tmp_path / "weights.safetensors",
        patch=PatchConfig(**patch),  # type: ignore[arg-type]
        quiet=True,
    )
    source = FeatureOpener(done.files["a.png"], "a")()
    with open_image(tmp_path / "a.png") as image:
        image.mpp = 0.5
        grid = PatchGrid(image, 16, stride, mpp, edge=edge)
        assert len(source) == len(grid)
        np.testing.assert_array_equal(source.grid.boxes(slice(None))[:, :2], grid.boxes(slice(None))[:, :2])
        np.testing.assert_array_equal(source.grid.cells(slice(None)), grid.cells(slice(None)))
        assert (source.grid.rows, source.grid.columns) == (grid.rows, grid.columns)
    source.close()


def test_features_of_another_rule_are_not_gone_on_with(photos: Path, tmp_path: Path) -> None:
    save_file(SmallEncoder(3, 4).state_dict(), tmp_path / "weights.safetensors")
    line = ["embed", photos, "--encoder", "small", "--width", "4", "--weights", tmp_path / "weights.safetensors"]
    line += ["--patch.size", "16", "--out", tmp_path / "features"]
    assert main([str(word) for word in line]) == 0
    assert main([str(word) for word in [*line, "--patch.edge", "shift"]]) == 0, "what auto chose"
    assert main([str(word) for word in [*line, "--patch.edge", "reflect"]]) == 2


def test_the_published_recipes_cut_patches_as_the_published_code_does() -> None:
    # `unfold` of photographs and canvases leaves out what does not fill a patch; tiles of slides go over the border
    found = {name: resolve(name).patch.edge for name in ("traffic", "megapixel-mnist", "camelyon16")}
    assert found == {"traffic": "drop", "megapixel-mnist": "drop", "camelyon16": "background"}
    assert Config().patch.edge == "auto"


@pytest.mark.parametrize("edge", ["auto", *EDGES])
def test_an_image_smaller_than_a_patch_is_one_clear_error(edge: Any, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 15, 3), np.uint8)).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png") as image, pytest.raises(ConfigError, match=r"larger than the image \(15 x 20"):
        PatchGrid(image, 16, edge=edge)
