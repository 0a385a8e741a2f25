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
        (0.25, "0.5", "0.5 microns per pixel by --mpp, 0.25 in the file; --mpp's is used"),
        (0.49, "0.5", ""),
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
    assert all(said in note for note in notes)


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


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with `patch.mpp 0.5`."""
    folder = tmp_path_factory.mktemp("fine")
    given = SMALL | {"patch": {"size": 16, "mpp": 0.5}, "train": {"epochs": 1, "batch": 4}}
    return keyhole.train(data(folder / "data", [0.5, 0.25] * 3), folder / "run", **given).path


def predicted(run: Path, out: Path, *words: str) -> dict[str, dict[str, object]]:
    """What `keyhole predict` writes as prediction.json, by the name of the file."""
    assert main(["predict", str(run), *words, "--out", str(out)]) == 0
    found = (json.loads(path.read_text()) for path in out.glob("*/prediction.json"))
    return {Path(each["image"]).name: each for each in found}


def warnings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning")]


def test_a_given_resolution_that_replaces_the_files_is_told_once_and_noted_at_each(
    fine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.tif", "b.tif", "c.tif", "d.tif"]
    paths = [str(slide(tmp_path / name, mpp)) for name, mpp in zip(names, [0.5, 0.4, 0.25, None], strict=True)]
    found = predicted(fine, tmp_path / "o", *paths, "--mpp", "0.25")
    assert [found[name]["notes"] for name in names] == [
        ["0.25 microns per pixel by --mpp, 0.5 in the file; --mpp's is used"],
        ["0.25 microns per pixel by --mpp, 0.4 in the file; --mpp's is used"],
        [],
        [],
    ]
    (line,) = warnings_of(capsys.readouterr().err)
    assert f"2 of 4 images, the first {paths[0]}: 0.25 microns per pixel by --mpp, 0.5 in the file" in line
    table = tmp_path / "new.csv"
    table.write_text("image,mpp\na.tif,0.25\nb.tif,\n")
    found = predicted(fine, tmp_path / "csv", str(table))
    assert found["a.tif"]["notes"] == ["0.25 microns per pixel in the CSV, 0.5 in the file; the CSV's is used"]
    assert found["b.tif"]["notes"] == []
    assert len(warnings_of(capsys.readouterr().err)) == 1


def test_in_python_and_in_evaluation_too(fine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prediction = keyhole.load(fine).predict(slide(tmp_path / "a.tif", 0.5), mpp=0.25)
    said = "0.25 microns per pixel by `mpp`, 0.5 in the file; `mpp`'s is used"
    assert prediction.notes == (said,)
    assert warnings_of(capsys.readouterr().err) == [f"warning: {tmp_path / 'a.tif'}: {said}"]
    slide(tmp_path / "b.tif", 0.4)
    rows = [f"{name}.tif,{label},test,0.25" for name, label in zip("ab", COLORS, strict=True)]
    (tmp_path / "d.csv").write_text("\n".join(["image,label,split,mpp", *rows]))
    found = keyhole.evaluate(fine, tmp_path / "d.csv", out=tmp_path / "out")
    line = "2 of 2 images, such as a.tif: 0.25 microns per pixel in the CSV, 0.5 in the file; the CSV's is used"
    assert line in found.notes
    assert line in json.loads((tmp_path / "out" / "metrics.json").read_text())["notes"]


@pytest.mark.parametrize(("mpp", "times"), [(0.5, ""), (0.59, ""), (0.62, "1.2"), (1.0, "2"), (0.25, "")])
def test_a_slide_that_is_coarser_than_the_patches_is_noted(
    fine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mpp: float, times: str
) -> None:
    found = predicted(fine, tmp_path / "o", str(slide(tmp_path / "new.tif", mpp)))["new.tif"]
    said = f"enlarged {times} x: the slide has {mpp:g} um per pixel, and patches are read at 0.5"
    assert found["notes"] == [said] * bool(times)
    assert [line.endswith(f"new.tif: {said}") for line in warnings_of(capsys.readouterr().err)] == [True] * bool(times)


def test_training_and_evaluation_count_the_slides_that_are_enlarged(
    fine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = data(tmp_path / "data", [1.0, 0.5, 0.5, 0.5, 1.0, 0.8])
    given = SMALL | {"patch": {"size": 16, "mpp": 0.5}, "train": {"epochs": 1, "batch": 4}}
    keyhole.train(table, tmp_path / "run", **given)
    said = "enlarged 2 x: the slide has 1 um per pixel, and patches are read at 0.5"
    assert f"warning: 3 of 6 images, such as 0.tif: {said}" in capsys.readouterr().err
    found = keyhole.evaluate(fine, table, split="train", out=tmp_path / "out")
    assert f"1 of 4 images: {said}" in found.notes


def test_a_prediction_states_the_resolution_of_its_image_and_what_its_file_says(fine: Path, tmp_path: Path) -> None:
    def stated(path: Path, *words: str) -> tuple[object, object, object]:
        found = predicted(fine, tmp_path / path.stem, str(path), *words)[path.name]
        patch = found["patch"]
        assert isinstance(patch, dict)
        return found["mpp"], found["file_mpp"], patch["mpp"]

    assert stated(slide(tmp_path / "a.tif", 0.25)) == (0.25, 0.25, 0.5)
    assert stated(slide(tmp_path / "b.tif", 1.0), "--mpp", "0.25") == (0.25, 1.0, 0.5)
    assert stated(slide(tmp_path / "c.tif", None), "--mpp", "0.25") == (0.25, None, 0.5)
    pixels = np.zeros((64, 64, 3), np.uint8)
    prediction = keyhole.load(fine).predict(pixels, mpp=0.25)
    assert (prediction.mpp, prediction.file_mpp, prediction.notes) == (0.25, None, ())
