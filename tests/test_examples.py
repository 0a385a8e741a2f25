"""The worked examples: each `prepare.py` handles the traps of its data set, here in small copies of the layout."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from conftest import BENCHMARKS, csv_rows

from keyhole.config.settings import DataConfig
from keyhole.data.manifest import read_manifest
from keyhole.images.geometry import Size
from keyhole.patches.foreground.annotations import check_annotation, read_annotation


def prepare(example: str) -> Any:
    return runpy.run_path(str(BENCHMARKS.parent / "examples" / example / "prepare.py"))["prepare"]


@pytest.mark.parametrize("example", ["potholes", "retinopathy", "circuit_boards", "surface_cracks"])
def test_a_folder_without_the_data_is_refused_and_nothing_is_written(tmp_path: Path, example: str) -> None:
    (tmp_path / "wrong").mkdir()
    (tmp_path / "out").mkdir()
    where = tmp_path / "out" / ("new" if example == "retinopathy" else "new.csv")

    with pytest.raises(SystemExit, match=r"wrong.*Give the (unpacked repository|folder with)"):
        prepare(example)(tmp_path / "wrong", where, *([None] if example == "retinopathy" else []))

    assert not list((tmp_path / "out").iterdir())


def write_picture(path: Path, seed: int, size: tuple[int, int] = (134, 89)) -> Path:
    """A picture that no other seed resembles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), np.uint8)
    PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC).save(path, quality=95)
    return path


def spot(path: Path, size: tuple[int, int], mode: str = "L", marked: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size[::-1], np.uint8)
    mask[:10, :10] = 255 * marked
    PIL.Image.fromarray(mask).convert(mode).save(path)
    return path


# --- potholes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def roads(tmp_path: Path) -> Path:
    """Six photographs of five roads; the last is a copy of the first."""
    names = ["1_ES_259_a", "2_RS_290_b", "3_DF_080_c", "4_DF_070_d", "5_RS_386_e", "6_ES_259_f"]
    for number, name in enumerate(names):
        folder = tmp_path / "Dataset" / name
        write_picture(folder / f"{name}_RAW.jpg", 0 if number == 5 else number)
        spot(folder / f"{name}_POTHOLE.png", (134, 89), marked=number % 2 == 0)
    return tmp_path


def test_roads_stay_whole_copies_are_left_out_and_empty_masks_mean_none(
    roads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = prepare("potholes")(roads, roads / "potholes.csv")

    rows = csv_rows(roads / "potholes.csv")
    assert [(row["pothole"], row["split"], row["group"]) for row in rows] == [
        ("yes", "train", "ES259"),
        ("no", "train", "RS290"),
        ("yes", "val", "DF080"),
        ("no", "test", "DF070"),
        ("yes", "test", "RS386"),
    ]
    assert "6_ES_259_f_RAW.jpg, the same file as 1_ES_259_a_RAW.jpg" in capsys.readouterr().out
    assert counts["train", "yes"] == counts["train", "no"] == 1
    assert [bool(row["annotation"]) for row in rows] == [row["pothole"] == "yes" for row in rows]
    items = read_manifest(DataConfig(path=roads / "potholes.csv")).items
    for item in items:
        if item.annotation is not None:
            assert len(read_annotation(item.annotation, Size(134, 89))) == 1


def test_other_roads_can_be_held_out_but_they_must_exist(roads: Path) -> None:
    prepare("potholes")(roads, roads / "potholes.csv", ["RS290", "DF080"])

    split_of = {row["group"]: row["split"] for row in csv_rows(roads / "potholes.csv")}
    assert split_of == {"ES259": "train", "RS290": "test", "DF080": "test", "DF070": "train", "RS386": "train"}
    with pytest.raises(SystemExit, match=r"--test: no photograph is of RS29\. The roads are DF070, DF080"):
        prepare("potholes")(roads, roads / "other.csv", ["RS386", "RS29"])
    assert not (roads / "other.csv").exists()


def test_a_folder_of_another_layout_is_named(roads: Path) -> None:
    (roads / "Dataset" / "2_RS_290_b" / "2_RS_290_b_POTHOLE.png").unlink()
    with pytest.raises(SystemExit, match=r"2_RS_290_b: expected a folder like .* with _RAW and _POTHOLE"):
        prepare("potholes")(roads, roads / "potholes.csv")


# --- retinopathy -----------------------------------------------------------------------------------------------------


@pytest.fixture
def retinas(tmp_path: Path) -> Path:
    """Four training and two test photographs: names repeat, training has a copy of its own and one of the test set."""
    grading, segmentation = tmp_path / "B. Disease Grading", tmp_path / "A. Segmentation"
    seeds = {"a. Training Set": [0, 1, 0, 10], "b. Testing Set": [10, 11]}
    grades = {"a. Training Set": [0, 1, 0, 3], "b. Testing Set": [2, 0]}
    labels = {"a. Training Set": "a. IDRiD_Disease Grading_Training Labels.csv"}
    labels["b. Testing Set"] = "b. IDRiD_Disease Grading_Testing Labels.csv"
    for folder, each in seeds.items():
        lines = ["Image name,Retinopathy grade,Risk of macular edema ,"]
        for number, seed in enumerate(each, start=1):
            write_picture(grading / "1. Original Images" / folder / f"IDRiD_{number:03d}.jpg", seed)
            lines.append(f"IDRiD_{number:03d},{grades[folder][number - 1]},0,")
        path = grading / "2. Groundtruths" / labels[folder]
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([*lines, ",,,"]), encoding="utf-8-sig")
    folder = "a. Training Set"  # of masks: training photograph 2 as number 7, and one that has no grade as 8
    for number, seed in ((7, 1), (8, 99)):
        write_picture(segmentation / "1. Original Images" / folder / f"IDRiD_{number:02d}.jpg", seed)
        masks = segmentation / "2. All Segmentation Groundtruths" / folder
        spot(masks / "1. Microaneurysms" / f"IDRiD_{number:02d}_MA.tif", (134, 89), "P")
        spot(masks / "3. Hard Exudates" / f"IDRiD_{number:02d}_EX.tif", (134, 89), "RGBA", marked=False)
        whole = PIL.Image.new("L", (134, 89), 255)
        (masks / "5. Optic Disc").mkdir(exist_ok=True)
        whole.save(masks / "5. Optic Disc" / f"IDRiD_{number:02d}_OD.tif")
    return tmp_path


def test_names_that_repeat_copies_and_renumbered_masks_are_told_apart(
    retinas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    counts = prepare("retinopathy")(retinas, out, 67)

    rows = {row["name"]: row for row in csv_rows(out / "manifest.csv")}
    assert list(rows) == ["test/IDRiD_001", "test/IDRiD_002", "train/IDRiD_001", "train/IDRiD_002"]
    said = capsys.readouterr().out
    assert "train/IDRiD_003, the same photograph as train/IDRiD_001" in said
    assert "train/IDRiD_004, the same photograph as test/IDRiD_001" in said
    assert [(row["retinopathy"], row["referable"]) for row in rows.values()] == [
        *(("yes", "yes"), ("no", "no"), ("no", "no"), ("yes", "no"))
    ]
    assert [row["split"] for row in rows.values()] == ["test", "test", "val", "train"]
    assert [name for name, row in rows.items() if row["annotation"]] == ["train/IDRiD_002"], "8 has no grade"
    assert counts["train", "with lesion masks"] == 1
    lesions = rows["train/IDRiD_002"]
    with PIL.Image.open(out / lesions["image"]) as image:
        assert image.size == (67, 44)
    share = read_annotation(out / lesions["annotation"], Size(67, 44)).covered([[0, 0, 67, 44]])[0]
    assert 0 < share < 0.1, "the optic disc is not a lesion"


# --- circuit boards --------------------------------------------------------------------------------------------------


@pytest.fixture
def boards(tmp_path: Path) -> Path:
    """Six boards to learn from and one to test, one of them without a defect."""
    data = tmp_path / "PCBData"
    boxes = ["", "10 20 30 40 1\n50 50 60 60 3\n", "0 0 5 5 6", "0 0 5 5 2\n1 1 3 3 5", "0 0 5 5 4", "0 0 5 5 5"]
    boxes.append("1 1 9 9 1\n2 2 4 4 1")
    for number, text in enumerate(boxes):
        write_picture(data / "group1" / "00041" / f"{number}_test.jpg", number)
        (data / "group1" / "00041_not").mkdir(exist_ok=True)
        (data / "group1" / "00041_not" / f"{number}.txt").write_text(text)
    lines = [f"group1/00041/{number}.jpg group1/00041_not/{number}.txt" for number in range(7)]
    (data / "trainval.txt").write_text("\n".join(lines[:6]) + "\n")
    (data / "test.txt").write_text(lines[6] + "\n")
    return tmp_path


def test_boards_have_their_defects_as_labels_and_boxes(boards: Path) -> None:
    counts = prepare("circuit_boards")(boards, boards / "boards.csv")

    rows = csv_rows(boards / "boards.csv")
    assert [row["defects"] for row in rows] == [
        "|",
        "mousebite|open",
        "pin-hole",
        "copper|short",
        "spur",
        "copper",
        "open",
    ]
    assert [row["split"] for row in rows] == ["val", *["train"] * 4, "val", "test"]
    assert [bool(row["annotation"]) for row in rows] == [False, *[True] * 6]
    assert counts["test", "open"] == counts["test", "boards"] == 1
    (task,) = read_manifest(DataConfig(path=boards / "boards.csv")).tasks
    assert task.kind == "multilabel"
    outline = boards / rows[1]["annotation"]
    check_annotation(outline)
    assert len(json.loads(outline.read_text())["features"]) == 2
    covered = read_annotation(outline, Size(640, 640)).covered([[10, 20, 20, 20], [0, 0, 10, 10]])
    assert covered.tolist() == [1, 0]


# --- surface cracks --------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """All photographs by number, tiny; two parts are there twice, and every part has a crack."""
    twice = {143 + number: number for number in range(8)} | {223 + number: 96 + number for number in range(8)}
    for number in range(399):
        part = "train" if number < 320 else "val"
        path = tmp_path / "Datasets" / "images" / part / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(twice.get(number, number)).integers(0, 255, (5, 4), np.uint8)
        PIL.Image.fromarray(pixels).resize((20, 50), PIL.Image.Resampling.BICUBIC).save(path)
        label = tmp_path / "Datasets" / "labels" / part / f"{number:03d}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.2 1.0 0.2 1.0 0.4 0.5 0.4" if number % 8 == 0 else "")
    return tmp_path


def test_parts_stay_whole_and_copies_are_left_out(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = prepare("surface_cracks")(parts, parts / "cracks.csv")

    rows = csv_rows(parts / "cracks.csv")
    assert len(rows) == sum(counts.values()) == 399 - 16
    assert "left out: 143.jpg, the same file as 000.jpg" in capsys.readouterr().out
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(each) == 1 for each in splits.values())
    assert {row["split"] for row in rows if 104 <= int(row["name"]) <= 134} == {"train"}, "one part of four has seven"
    assert all(bool(row["annotation"]) == (row["crack"] == "yes") for row in rows)
    first = next(row for row in rows if row["annotation"])
    covered = read_annotation(parts / first["annotation"], Size(20, 50)).covered([[10, 10, 10, 10], [0, 0, 10, 10]])
    assert covered.tolist() == [1, 0]
    (task,) = read_manifest(DataConfig(path=parts / "cracks.csv")).tasks
    assert task.kind == "binary"


def test_other_photographs_are_refused(parts: Path) -> None:
    (parts / "Datasets" / "images" / "val" / "398.jpg").unlink()
    with pytest.raises(SystemExit, match="found 398 files"):
        prepare("surface_cracks")(parts, parts / "cracks.csv")
