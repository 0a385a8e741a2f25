"""The names of `import keyhole`, and what its functions take."""

from __future__ import annotations

import multiprocessing
import pickle
import pkgutil
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image
from processes import run_process

import keyhole
from keyhole.config.settings import Config, PatchConfig, SelectConfig
from keyhole.errors import ConfigError, KeyholeError
from keyhole.images import ArrayImage
from keyhole.inference.predictor import Predictor
from keyhole.patches.foreground.rules import foreground
from keyhole.patches.grid import Foreground
from keyhole.report.files import write_prediction
from keyhole.report.prediction import Prediction


def test_every_name_of_the_api_is_there_and_no_submodule_can_hide_it() -> None:
    modules = {module.name for module in pkgutil.iter_modules(keyhole.__path__)}
    functions = {name for name in keyhole.__all__ if not name.startswith("_")}
    assert {"train", "resume", "evaluate", "check", "embed", "load"} <= functions
    assert not functions & modules
    for name in functions:
        assert callable(getattr(keyhole, name)), name


def test_import_keyhole_loads_nothing_heavy() -> None:
    assert run_process("imported", "torch,numpy,pydantic,tyro", "package").stdout == "[]\n"


# Whole configurations and mappings


def test_train_and_check_take_a_whole_config_as_well_as_keywords(toy: Path, tmp_path: Path) -> None:
    config = Config().replace(**SMALL, data={"path": str(toy)})
    run = keyhole.train(config, tmp_path / "run", train={"epochs": 1})
    assert run.config.train.epochs == 1
    assert run.config.patch.size == 16
    assert run.config.select.m == config.select.m
    for report in (keyhole.check(config), keyhole.check(toy, patch={"size": 16}, select={"m": 4})):
        assert report.ok
        assert report.images == 24
    with pytest.raises(ConfigError, match="recipe: not beside a whole Config"):
        keyhole.train(config, tmp_path / "other", recipe="small")
    with pytest.raises(ConfigError, match=r"unknown key `patch.sise` \(did you mean `patch.size`\?\)"):
        keyhole.check(toy, patch={"sise": 16})
    with pytest.raises(ConfigError, match=r"patch.sise"):
        keyhole.embed(toy, tmp_path / "features", patch={"sise": 16})


def test_a_name_that_an_argument_does_not_know_is_told_with_those_it_knows(toy_run: Path) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    image = ArrayImage(pixels)
    scores = keyhole.load(toy_run).predict(pixels).scores
    assert scores is not None
    refused: dict[str, Callable[[], object]] = {
        r"edge \(='shfit'\) must be one of .*\(did you mean 'shift'\?\)": lambda: keyhole.PatchGrid(
            image,
            32,
            edge="shfit",  # type: ignore[arg-type]
        ),
        r"rule \(='mask'\) must be one of 'non-empty', 'tissue'$": lambda: foreground(image, "mask"),  # type: ignore[arg-type]
        r"foreground mask must be a NumPy array, bool \(rows, columns\), not uint8 \(4, 4\)": lambda: keyhole.PatchGrid(
            image,
            32,
            mask=np.full((4, 4), 255, np.uint8),  # type: ignore[arg-type]
        ),
        r"patch.size \(=32.5\) must be a whole number": lambda: keyhole.PatchGrid(image, 32.5),  # type: ignore[arg-type]
        r"patch.stride \(=True\) must be a whole number": lambda: keyhole.PatchGrid(image, 32, True),
        r"bool \(rows, columns\), not bool \(0, 4\)": lambda: keyhole.PatchGrid(
            image, 32, mask=np.zeros((0, 4), np.bool_)
        ),
        r"foreground mask must be .*, not list": lambda: keyhole.PatchGrid(image, 32, mask=[[True]]),  # type: ignore[arg-type]
        r"share \(=5\) of a foreground mask must be between 0 and 1": lambda: keyhole.PatchGrid(
            image, 32, mask=Foreground(np.ones((4, 4), np.bool_), 5)
        ),
        r"task \(='lable'\) must be one of 'label' \(did you mean 'label'\?\)": lambda: scores.map("lable"),
        r"compare runs/one: expected a list": lambda: keyhole.compare("runs/one"),
    }
    for message, call in refused.items():
        with pytest.raises((ConfigError, ValueError), match=message):
            call()


def test_what_the_api_returns_shows_itself_in_a_line_and_prints_what_the_command_says(
    toy: Path, toy_run: Path, tmp_path: Path
) -> None:
    run, source = shutil.copytree(toy_run, tmp_path / "run"), toy / "red" / "1.png"
    evaluation = keyhole.evaluate(run)
    embedded = keyhole.embed(toy, tmp_path / "features", quiet=True, run=run)
    comparison = keyhole.compare([run, run], out=tmp_path / "comparison")
    with keyhole.open_image(source) as image:
        shown = [
            (evaluation, f"Evaluation('{run / 'evaluation' / 'test'}', label: accuracy "),
            (embedded, f"Embedded('{tmp_path / 'features'}', 24 images)"),
            (comparison, f"Comparison('{tmp_path / 'comparison'}', of "),
            (keyhole.check(toy, patch={"size": 16}), "CheckReport(24 images"),
            (keyhole.load(run), "Predictor("),
            (keyhole.Run(run), "Run("),
            (image, f"PillowImage('{source}', 64 x 64 px)"),
            (keyhole.PatchGrid(image, 16), f"PatchGrid('{source}', 16 of 4 x 4 patches of 16 px)"),
        ]
        for each, start in shown:
            assert repr(each).startswith(start)
            assert "\n" not in repr(each)
    for told in (evaluation, embedded, comparison):
        assert str(told) == "\n".join(told.lines())


# Pixels in memory


@pytest.fixture(scope="module")
def predictor(toy_run: Path) -> Predictor:
    return keyhole.load(toy_run)


def same(one: Prediction, other: Prediction) -> None:
    assert one.label == other.label
    assert one.probability == other.probability
    assert one.size == other.size
    np.testing.assert_array_equal(one.kept.boxes, other.kept.boxes)
    assert one.scores is not None
    assert other.scores is not None
    np.testing.assert_array_equal(one.scores.map(), other.scores.map())
    index = one.scores.index
    np.testing.assert_array_equal(one.scores.boxes(index), other.scores.boxes(index))
    assert one.to_json()["kept"] == other.to_json()["kept"]


def test_arrays_and_pictures_are_predicted_as_their_file_is(predictor: Predictor, toy: Path, tmp_path: Path) -> None:
    path = toy / "red" / "1.png"
    of_file = predictor.predict(path)
    picture = Image.open(path)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.crop((0, 0, 60, 40)).save(turned, exif=exif)
    for image in (np.asarray(picture), picture, Image.fromarray(np.asarray(picture)).convert("RGBA")):
        prediction = predictor.predict(image)
        same(prediction, of_file)
        assert prediction.pictures is not None
        assert len(prediction.pictures.patches) == len(prediction.kept)
    assert predictor.predict(np.asarray(picture)).name == "array"
    assert predictor.predict(picture).name == str(path)
    with Image.open(turned) as upright:
        same(predictor.predict(upright), predictor.predict(turned))
    grey = np.asarray(picture.convert("L"))
    same(predictor.predict(grey), predictor.predict(grey[:, :, None]))
    for file in write_prediction(predictor.predict(grey), tmp_path / "out").values():
        assert file.is_file()


def test_a_foreground_is_found_in_pixels_too(tmp_path: Path) -> None:
    from test_predict import random_predictor

    pixels = np.full((80, 80, 3), 255, np.uint8)
    pixels[32:48, 16:48] = np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predictor = random_predictor(PatchConfig(size=16, foreground="non-empty"), SelectConfig(m=2, chunk=16))
    of_pixels = predictor.predict(pixels, mpp=0.5)
    same(of_pixels, predictor.predict(tmp_path / "a.png", mpp=0.5))
    assert of_pixels.scores is not None
    assert len(of_pixels.scores) < 25


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((20, 20, 3)), r"uint8 of shape \(h, w, 3\) or \(h, w\), not float64 \(20, 20, 3\).*255"),
        (np.zeros((20, 20), np.uint16), r"not uint16 \(20, 20\)\. Scale"),
        (np.zeros((3, 20, 20), np.uint8), r"not uint8 \(3, 20, 20\)\. Put channels last: array\.transpose\(1, 2, 0\)"),
        (np.zeros((20, 20, 4), np.uint8), r"not uint8 \(20, 20, 4\)\. Leave out channels other than RGB"),
        (np.zeros((2, 20, 20, 3), np.uint8), r"\(2, 20, 20, 3\)\. Give one image"),
        (np.zeros((0, 20, 3), np.uint8), r"\(0, 20, 3\)\. Give one image"),
        (Image.new("F", (20, 20)), r"picture: cannot be used: grey values of the kind F"),
        (b"bytes", r"expected a path, a numpy array or a Pillow picture, not <class 'bytes'>"),
        (np.zeros((9, 9, 3), np.uint8), r"array: the patch \(16 x 16 px\) is larger than the image \(9 x 9 px\)"),
    ],
)
def test_pixels_of_another_kind_are_refused_in_words(predictor: Predictor, image: Any, said: str) -> None:
    with pytest.raises(KeyholeError, match=said) as caught:
        predictor.predict(image)
    assert "\n" not in str(caught.value)


# What a prediction is to Python


def test_a_file_that_is_not_there_is_told_before_a_reader_waits_for_it(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keyhole.engine.engine.open_reader", lambda *_: pytest.fail("a reader tries again for 20 s"))
    with pytest.raises(KeyholeError, match=r"nosuch.png: no such file"):
        predictor.predict("nosuch.png")


def test_a_prediction_shows_itself_in_a_line_and_survives_another_process(predictor: Predictor, toy: Path) -> None:
    path = toy / "red" / "1.png"
    prediction = predictor.predict(path)
    share = prediction.probability["label"][prediction.label["label"]]
    assert repr(prediction) == (
        f"Prediction({str(path)!r}, label: {prediction.label['label']} {share:.2f}, kept 4 of 16 patches)"
    )
    assert repr(prediction.kept) == "KeptPatches(4 patches)"
    assert repr(prediction.scores) == "Scores(16 patches on 4 x 4)"
    assert repr(prediction.pictures) == "Pictures(64 x 64 pixels and 4 patches)"
    back = pickle.loads(pickle.dumps(prediction))  # noqa: S301 - our own
    same(back, prediction)
    assert back.patch == prediction.patch
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        same(pool.submit(_through, prediction).result(timeout=60), prediction)


def _through(prediction: Prediction) -> Prediction:
    return prediction


# Modules


def test_wrong_shapes_are_told_in_words_with_both_values() -> None:
    said = dict(line.split(": ", 1) for line in run_process("wrong_shapes").stdout.splitlines())
    assert said == {
        "grey patches": "patches must be (k c h w) with c = 3, the encoder's `channels`, not (5, 1, 16, 16)",
        "channels last": "patches must be (k c h w) with c = 3, the encoder's `channels`, not (5, 16, 16, 3)",
        "one image": "patches must be (b n c h w), or features (b n f), not (6, 3, 16, 16); one image is patches[None]",
        "two axes": "patches must be (b n c h w), or features (b n f), not (6, 3); one image is patches[None]",
        "mask of another number": "`mask` must be bool (2, 6), one value for each patch, not bool (2, 5)",
        "mask of NumPy": "`mask` must be a torch tensor, not ndarray",
        "patches of NumPy": "patches must be a torch tensor, not ndarray",
        "whole numbers": "patches must be uint8 pixels of 0 ... 255, or floats, not int64",
        "more embeddings than patches": "the encoder gave (48, 32) for 12 patches, expected a vector for each",
        "fewer logits than patches": "4 images, 4 indices and 3 logits are not of the same patches",
        "queries": "`queries` must name the tasks ['label'], not ['lable']",
        "mask of numbers": "`mask` must be bool (2, 6), one value for each patch, not float32 (2, 6)",
        "position": "`position` must begin with (2, 6), as the patches do, not (2, 7)",
        "select mask": "`mask` must be bool (2, 6), one value for each patch, not bool (6, 2)",
        "select none": "`m` (=0) and `chunk` (=4) must be at least 1",
        "pool width": "embeddings must be (b n d) with `dim` d = 32, not (2, 6, 7)",
        "pool of one image": "embeddings must be (b n d) with `dim` d = 32, not (6, 32)",
        "features": "features must be (k f) with `features` f = 8, not (5, 9)",
    }
