"""Features of two encoders never meet without a word: not in training, not in evaluation, not in prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import keyhole
from keyhole.cli.main import main
from keyhole.errors import ConfigError, ImageError
from keyhole.nn import SmallEncoder
from keyhole.patches.features import FeatureOpener

Say = pytest.CaptureFixture[str]
TINY = "--model.dim 8 --model.heads 2 --select.m 4 --train.epochs 1 --train.batch 8 --run.threads 2".split()


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The warnings that were printed, but for that of a model that has learned nothing, as these have not."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("warning:") and "learned nothing" not in line]


@pytest.fixture(scope="module")
def folders(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy images by two encoders of equal width, and by the first on larger patches."""
    place = tmp_path_factory.mktemp("features")
    found = {}
    for name, seed, size in (("a", 0, 16), ("b", 1, 16), ("large", 0, 32)):
        torch.manual_seed(seed)
        weights = place / f"{name}.safetensors"
        save_file(SmallEncoder(width=4).state_dict(), weights)
        line = ["embed", str(toy), "--encoder", "small", "--width", "4", "--weights", str(weights)]
        assert main([*line, "--patch.size", str(size), "--out", str(place / name)]) == 0
        found[name] = place / name
    return found


@pytest.fixture(scope="module")
def run(toy: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    assert main(["train", str(toy), "--data.features", str(folders["a"]), *TINY, "--out", str(out)]) == 0
    log = (out / "log.txt").read_text()
    assert "projected to 8" in log
    assert "compiled" not in log  # there is no encoder
    return out


def silent(folder: Path, out: Path) -> Path:
    """The same features without a word on where they come from, as CLAM writes them."""
    shutil.copytree(folder, out)
    for path in out.rglob("*.h5"):
        with h5py.File(path, "r+") as file:
            for name in list(file["features"].attrs):
                del file["features"].attrs[name]
    return out


def test_a_model_knows_what_it_learned_from(run: Path, folders: dict[str, Path]) -> None:
    with h5py.File(next(folders["a"].rglob("*.h5"))) as file:
        digest = file["features"].attrs["weights_sha256"]
    for model in (
        yaml.safe_load((run / "config.yaml").read_text())["model"],
        json.loads((run / "best" / "model.json").read_text())["model"],
    ):
        assert model["feature_weights"] == digest
        assert model["feature_encoder"] == "small"
        assert model["feature_patches"].startswith("16 px, level 0")


def test_features_of_other_weights_are_refused(
    toy: Path, run: Path, folders: dict[str, Path], tmp_path: Path, capsys: Say
) -> None:
    assert main(["predict", str(run), str(folders["a"]), "--out", str(tmp_path / "same")]) == 0
    assert not warnings_of(capsys)
    other = ["--features", str(folders["b"]), "--data", str(toy)]
    for line in (
        ["predict", str(run), str(folders["b"]), "--out", str(tmp_path / "predicted")],
        ["evaluate", str(run), *other, "--out", str(tmp_path / "evaluated")],
    ):
        assert main(line) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "features of small with weights" in error
        assert "Numbers of two encoders mean nothing to each other" in error
    assert not (tmp_path / "predicted" / "predictions.csv").exists()


def test_a_folder_that_mixes_encoders_is_refused_whichever_comes_first(
    toy: Path, folders: dict[str, Path], tmp_path: Path, capsys: Say
) -> None:
    mixed = tmp_path / "mixed"
    silent(folders["a"], mixed)
    shutil.copytree(folders["b"] / "red", mixed / "red", dirs_exist_ok=True)
    shutil.copytree(folders["a"] / "green", mixed / "green", dirs_exist_ok=True)
    assert main(["check", str(toy), "--data.features", str(mixed), "--run.threads", "1"]) == 1
    assert "Use features of one encoder for all images" in capsys.readouterr().out
    line = ["train", str(toy), "--data.features", str(mixed), *TINY, "--out", str(tmp_path / "run")]
    assert main(line) == 2
    assert "Numbers of two encoders mean nothing to each other" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_not_known_or_differs_in_patches_is_said_once(
    toy: Path, run: Path, folders: dict[str, Path], tmp_path: Path, capsys: Say
) -> None:
    unknown = silent(folders["a"], tmp_path / "unknown")
    broken = sorted(unknown.rglob("*.h5"))[1]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    skipping = ["--data.features", str(unknown), *TINY, "--data.on-bad-image", "skip", "--out", str(tmp_path / "some")]
    assert main(["train", str(toy), *skipping]) == 0
    assert "left out 1 image that cannot be read" in capsys.readouterr().err
    broken.write_bytes(whole)
    assert main(["train", str(toy), "--data.features", str(unknown), *TINY, "--out", str(tmp_path / "run")]) == 0
    said = warnings_of(capsys)
    assert said == [
        "warning: features do not say which encoder made them. Make sure that it is one for all of them (21 of 21 files)"
    ]
    for model, features, words in (
        (run, unknown, "features do not say which encoder made them; the others, or the model, are of small with"),
        (
            run,
            folders["large"],
            "; the others, or the model, are of 16 px, level 0",
        ),
        (tmp_path / "run", folders["a"], "those that the model learned from did not say their encoder"),
    ):
        assert main(["predict", str(model), str(features), "--out", str(tmp_path / words[-9:])]) == 0
        warned = warnings_of(capsys)
        assert len(warned) == 1
        assert words in warned[0]
        for path in (tmp_path / words[-9:]).rglob("prediction.json"):
            assert [words in note for note in json.loads(path.read_text())["notes"]] == [True]


# STAMP

STAMP = {
    "stamp_version": "2.3.0",
    "extractor": "uni2",
    "unit": "um",
    "tile_size_um": 256.0,
    "tile_size_px": 224,
    "feat_type": "tile",
}


def write_stamp(path: Path, **attributes: object) -> Path:
    """Six tiles in two rows of three, in microns; slides of 0.5 microns per pixel have tiles of 512 px."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(3), np.arange(2))
    with h5py.File(path, "w") as file:
        file["feats"] = rng.normal(size=(6, 8)).astype(np.float16)
        file["coords"] = (np.stack([x.ravel(), y.ravel()], axis=1) * 256.0).astype(np.float32)
        file.attrs.update({**STAMP, **attributes})
    return path


def test_coordinates_of_stamp_become_pixels_where_the_resolution_is_given(tmp_path: Path) -> None:
    source = FeatureOpener(write_stamp(tmp_path / "s.h5"), "s", mpp=0.5)()
    assert source.grid.boxes([0, 4]).tolist() == [[0, 0, 512, 512], [512, 512, 512, 512]]
    assert (source.grid.rows, source.grid.columns, source.grid.known, source.grid.size) == (2, 3, True, 224)
    assert source.grid.mpp == pytest.approx(256 / 224)
    assert source.positions_2d([5]).tolist() == [[1280.0, 768.0]]
    assert source.origin.describe() == "uni2"
    assert len(source.read(slice(None))) == 6
    source.close()
    apart = FeatureOpener(tmp_path / "s.h5", "s")()
    assert apart.grid.boxes([4]).tolist() == [[0, 0, 0, 0]]
    with pytest.raises(ConfigError, match="`coords` are in microns; give the slide's microns per pixel"):
        apart.positions_2d([0])
    apart.close()


def test_an_archive_of_stamp_trains_and_predicts_and_another_extractor_is_refused(tmp_path: Path, capsys: Say) -> None:
    (tmp_path / "stamp").mkdir()
    for number in range(8):
        write_stamp(tmp_path / "stamp" / f"s{number}.h5")
    table = tmp_path / "slides.csv"
    table.write_text("image,label,mpp\n" + "".join(f"s{number},{'ab'[number % 2]},0.5\n" for number in range(8)))
    line = ["train", str(table), "--data.features", str(tmp_path / "stamp"), *TINY, "--data.test", "0"]
    assert main([*line, "--out", str(tmp_path / "run")]) == 0
    assert not warnings_of(capsys)
    prediction = keyhole.load(tmp_path / "run").predict(tmp_path / "stamp" / "s0.h5", mpp=0.25)
    assert set(prediction.kept.boxes[:, 2]) == {1024}
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "stamp"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("places in microns") == 1
    other = write_stamp(tmp_path / "other.h5", extractor="conch")
    with pytest.raises(ImageError, match="features of conch, but the others, or the model, are of uni2"):
        keyhole.load(tmp_path / "run").predict(other)
