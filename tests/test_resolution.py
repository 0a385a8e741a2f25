"""A model keeps the resolution that it learned at; images of another one are told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import COLORS, SMALL

import keyhole
from keyhole.cli.main import main
from keyhole.data.resolution import Resolution


def slide(path: Path, mpp: float | None, seed: int = 0) -> Path:
    """A picture of 64 px that says its resolution."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 90, (64, 64, 3), dtype=np.uint8)
    pixels[16:32, 16:32] = list(COLORS.values())[seed % 2]
    about = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="deflate", photometric="rgb", **about)
    return path


def data(folder: Path, mpps: list[float | None]) -> Path:
    folder.mkdir()
    rows = [["image", "label", "split"]]
    for number, mpp in enumerate(mpps):
        slide(folder / f"{number}.tif", mpp, number)
        rows.append([f"{number}.tif", list(COLORS)[number % 2], "train" if number < 4 else "val"])
    with (folder / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "d.csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at 0.5 um per pixel, as the files say, without `patch.mpp`."""
    folder = tmp_path_factory.mktemp("resolution")
    table = data(folder / "data", [0.5, 0.5, 0.49, 0.51, 0.5, 0.5])
    return keyhole.train(table, folder / "run", **(SMALL | {"train": {"epochs": 1, "batch": 4}})).path


def test_the_model_keeps_the_resolution_of_its_training_images(run: Path) -> None:
    kept = json.loads((run / "best" / "model.json").read_text())["resolution"]
    assert kept["unknown"] == 0
    assert (kept["low"], kept["high"]) == pytest.approx((0.49, 0.51), rel=1e-3)
    assert str(keyhole.load(run).resolution) == "0.49 to 0.51"


@pytest.mark.parametrize(
    ("mpp", "given", "said"),
    [
        (0.5, None, ""),
        (0.45, None, ""),
        (0.6, None, ""),
        (0.25, None, "the model learned at 0.49 to 0.51: everything is 2.0 times larger"),
        (1.0, None, "everything is 2.0 times smaller"),
        (0.25, "0.5", ""),
        (None, None, "no resolution is stated, and the model learned at"),
        (None, "0.5", ""),
    ],
)
def test_images_of_another_resolution_are_told_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mpp: float | None, given: str | None, said: str
) -> None:
    image = slide(tmp_path / "new.tif", mpp)
    assert (
        main(["predict", str(run), str(image), "--out", str(tmp_path / "o"), *(["--mpp", given] if given else [])]) == 0
    )
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == bool(said)
    assert all(said in line and "new.tif" in line for line in warnings)
    notes = json.loads((tmp_path / "o" / "new.tif" / "prediction.json").read_text())["notes"]
    assert len(notes) == bool(said)


def test_evaluation_counts_them_in_its_notes(run: Path, tmp_path: Path) -> None:
    found = keyhole.evaluate(run, data(tmp_path / "other", [0.25] * 4 + [0.5] * 2), split="train", out=tmp_path / "out")
    line = next(line for line in found.lines() if line.startswith("4 of 4 images: patches of 0.25 um per pixel"))
    assert "a column `mpp` in a CSV" in line, "evaluate has no --mpp, so it is not the remedy there"


def test_training_images_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = data(tmp_path / "data", [0.25, 0.5, 0.25, 0.5, 0.25, 0.5])
    given = SMALL | {"train": {"epochs": 1, "batch": 4}}
    keyhole.train(table, tmp_path / "mixed", **given)
    assert (
        "images differ in resolution, 0.25 to 0.5 um per pixel. Read all at one: --patch.mpp 0.5."
        in capsys.readouterr().err
    )
    one = keyhole.train(table, tmp_path / "one", **(given | {"patch": {"size": 16, "mpp": 0.5}}))
    assert "differ in resolution" not in capsys.readouterr().err
    assert one.best["resolution"] == {"low": 0.5, "high": 0.5, "unknown": 0}
    assert keyhole.load(one.path).predict(slide(tmp_path / "new.tif", 0.25)).notes == (), "it is read at 0.5"


def test_where_nothing_is_known_nothing_is_said() -> None:
    assert Resolution.from_json(None).doubt(0.25) == ""
    assert Resolution.of([None, None]).doubt(0.25) == ""
    assert Resolution.of([0.5, None]).doubt(None) == "", "some training images did not say theirs either"
    assert Resolution.of([84.7]).doubt(42.0) == "", "the print resolution of photographs"
    assert Resolution.of([0.5]).doubt(0.25) != ""
