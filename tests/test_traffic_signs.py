"""Swedish Traffic Signs: a miniature in its layout becomes a manifest by the published filter, and is learned from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Say, csv_rows
from PIL import Image

import keyhole
from keyhole.datasets.traffic_signs import Sign, choose, read_traffic_signs
from keyhole.errors import DataError
from keyhole.images.geometry import Box
from keyhole.patches.foreground.region_files import read_regions

WIDTH, HEIGHT = 80, 64
MISC = "MISC_SIGNS"
RED = (220, 30, 30)


def sign(name: str, box: tuple[float, float, float, float] = (10, 12, 26, 30), seen: str = "VISIBLE") -> str:
    """A sign as annotations.txt has it, from left, top, right and bottom."""
    left, top, right, bottom = box
    return f"{seen}, {right:f}, {bottom:f}, {left:f}, {top:f}, PROHIBITORY, {name}"


def write_set(folder: Path, lines: dict[str, list[str]], inside: str = "") -> None:
    """annotations.txt with its images, which are grey with a red rectangle for each VISIBLE sign."""
    (folder / inside).mkdir(parents=True)
    text = "".join(f"{name}:{''.join(f'{each};' for each in signs)}\n" for name, signs in lines.items())
    (folder / "annotations.txt").write_text(text)
    for number, (name, signs) in enumerate(lines.items()):
        pixels = np.full((HEIGHT, WIDTH, 3), 60 + number % 60, np.uint8)
        for each in signs:
            visibility, *numbers = each.split(",")[:5]
            if visibility == "VISIBLE":
                right, bottom, left, top = (int(float(x)) for x in numbers)
                pixels[top:bottom, left:right] = RED
        Image.fromarray(pixels).save(folder / inside / name, quality=95)


def several(count: int, name: str = "") -> dict[str, list[str]]:
    """Lines of images that show a sign of one kind, or nothing."""
    return {f"{name}-{number}.jpg": [sign(name, (32, 16, 64, 48))] if name else [] for number in range(count)}


FILTERED = {
    # image: signs, label or None if it is left out
    "nothing": ([], "empty"),
    "only signs without a place": ([MISC], "empty"),
    "other signs": ([sign("STOP")], None),
    "another limit": ([sign("60_SIGN"), MISC], None),
    "one": ([sign("80_SIGN")], "80"),
    "among others": ([MISC, sign("STOP", (0, 0, 60, 60)), sign("50_SIGN")], "50"),
    "blurred": ([sign("50_SIGN", seen="BLURRED")], None),
    "of a side road": ([sign("70_SIGN", seen="SIDE_ROAD")], None),
    "with a word that is not known": ([sign("70_SIGN", seen="UNREADABLE")], None),
    "the largest": ([sign("50_SIGN", (0, 0, 9, 9)), sign("70_SIGN", (20, 20, 30, 30))], "70"),
    "a visible one before a larger one": ([sign("50_SIGN", (0, 0, 60, 60), "OCCLUDED"), sign("70_SIGN")], "70"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A miniature: all of `FILTERED` in Set1, two images in Set2, in the subfolder that its archive gives."""
    lines = {f"{name.replace(' ', '-')}.jpg": signs for name, (signs, _) in FILTERED.items()}
    write_set(tmp_path / "signs" / "Set1", lines)
    write_set(tmp_path / "signs" / "Set2", several(1) | several(1, "50_SIGN"), inside="Set2Part0")
    return tmp_path / "signs"


# --- the filter ------------------------------------------------------------------------------------------------------


def test_the_manifest_has_what_the_published_filter_leaves_and_names_all_else(tree: Path, say: Say) -> None:
    code, out, _ = say("data", "traffic-signs", tree, "table", "--train-set", "Set1")

    assert code == 0
    rows = csv_rows(Path("table/manifest.csv"))
    assert all((Path("table") / row["image"]).resolve().is_file() for row in rows)
    assert not any(Path(row["image"]).is_absolute() for row in rows)
    found = {Path(row["image"]).stem.replace("-", " "): row["sign"] for row in rows if row["split"] == "train"}
    assert found == {name: label for name, (_, label) in FILTERED.items() if label}
    assert [row["sign"] for row in rows if row["split"] == "test"] == ["empty", "50"]
    left_out = csv_rows(Path("table/left_out.csv"))
    names = {Path(row["image"]).stem.replace("-", " ") for row in left_out}
    assert names == {name for name, (_, label) in FILTERED.items() if label is None}
    assert f"train: 6 images of {tree / 'Set1'} (2 empty, 1 50, 2 70, 1 80)" in out
    assert "train: 3 images left out: its speed signs are not well visible" in out
    assert "not the original files" in out, "a miniature or a composite never passes for the data set"
    assert "keyhole train table/manifest.csv --recipe traffic --patch.size 80" in out


def test_an_annotation_outlines_the_visible_signs_of_the_class_alone(tree: Path, say: Say) -> None:
    (tree / "Set1" / "annotations.txt").write_text(
        "one.jpg:"
        + ";".join(
            [
                sign("80_SIGN", (0, 0, 20, 20)),
                sign("50_SIGN", (30, 0, 40, 9)),
                sign("80_SIGN", (50, 40, 60, 50)),
                sign("80_SIGN", (0, 40, 9, 50), "BLURRED"),
                sign("STOP", (60, 0, 70, 9)),
            ]
        )
        + ";\nnothing.jpg:\n"
    )
    say("data", "traffic-signs", tree, "table", "--train-set", "Set1")
    shown, empty = csv_rows(Path("table/manifest.csv"))[:2]
    assert (shown["sign"], empty["sign"], empty["annotation"]) == ("80", "empty", "")
    regions = read_regions(Path("table") / shown["annotation"])
    assert [(*region.rings[0].min(0), *region.rings[0].max(0)) for region in regions] == [
        (0, 0, 20, 20),
        (50, 40, 60, 50),
    ]
    assert {region.name for region in regions} == {"80"}


def test_of_equally_visible_signs_the_largest_decides_in_any_order() -> None:
    near, far = Sign("VISIBLE", 0, 0, 30, 30, "80_SIGN"), Sign("VISIBLE", 0, 0, 20, 20, "50_SIGN")
    hidden = Sign("OCCLUDED", 0, 0, 90, 90, "70_SIGN")
    for order in ([near, far, hidden], [hidden, far, near], [far, hidden, near]):
        assert choose(order) == (near,)


def test_what_stands_behind_a_number_is_left_off_and_counted(tree: Path, say: Say) -> None:
    path = tree / "Set1" / "annotations.txt"
    path.write_text("one.jpg:VISIBLE, 26.5l, 30.0, 10.0, 12.0, PROHIBITORY, 80_SIGN;\r\nnothing.jpg:\r\n")
    said = say("data", "traffic-signs", tree, "table", "--train-set", "Set1")
    assert "train: 1 coordinate with something behind the number, left off" in said.out
    (region,) = read_regions(next(Path("table/annotations").glob("Set1-one.*")))
    assert region.rings[0].max(0).tolist() == [26.5, 30.0]


# --- the numbers of images -------------------------------------------------------------------------------------------


def test_the_set_with_747_images_is_for_training_whichever_it_is(tmp_path: Path) -> None:
    for place, (train, test) in enumerate((("Set1", "Set2"), ("Set2", "Set1"))):
        root = tmp_path / str(place)
        for name, count in ((train, 747), (test, 684)):
            (root / name).mkdir(parents=True)
            names = [f"{number}.jpg" for number in range(count)]
            (root / name / "annotations.txt").write_text("".join(f"{each}:\n" for each in names))
            for each in names:
                (root / name / each).touch()
        found = read_traffic_signs(root)
        assert {split: signs.folder.name for split, signs in found.items()} == {"train": train, "test": test}
        swapped = read_traffic_signs(root, "Set1" if train == "Set2" else "Set2")
        assert swapped["train"].folder.name == test


def test_other_counts_are_an_error_that_says_what_was_found_until_a_set_is_named(tree: Path, say: Say) -> None:
    refusal = say("data", "traffic-signs", tree, "table").refusal()
    assert f"{tree}: 6 images in Set1 and 2 in Set2" in refusal
    assert "expected 747 to learn from and 684 to test on" in refusal
    assert "--train-set Set1" in refusal
    assert not Path("table").exists()
    assert say("data", "traffic-signs", tree, "table", "--train-set", "Set2").code == 0
    rows = csv_rows(Path("table/manifest.csv"))
    assert {row["split"] for row in rows if "Set2" in row["image"]} == {"train"}


# --- a copy that is not whole ----------------------------------------------------------------------------------------


def test_a_copy_that_is_not_whole_is_one_line_with_what_to_do(tree: Path, say: Say) -> None:
    def refused(root: Path) -> str:
        refusal = say("data", "traffic-signs", root, "table", "--train-set", "Set1").refusal()
        assert not Path("table").exists()
        return refusal

    assert "no such folder" in refused(tree / "gone")
    assert "Set1 and Set2 not found in it" in refused(tree / "Set1")
    (tree / "Set1" / "one.jpg").unlink()
    lost = refused(tree)
    assert f"{tree / 'Set1'}: 1 of 6 images are missing: one.jpg. Unpack Set1Part0.zip in it" in lost
    path = tree / "Set1" / "annotations.txt"
    path.write_text("nothing.jpg:\nno colon\n")
    assert f"{path}, line 2: expected name.jpg:VISIBLE" in refused(tree)
    path.write_text("nothing.jpg:VISIBLE, a, 1, 2, 3, PROHIBITORY, 50_SIGN;\n")
    assert "line 1" in refused(tree)
    path.write_text("nothing.jpg:VISIBLE, 1, 2, 3;\n")
    assert "Found 'VISIBLE, 1, 2, 3'" in refused(tree)
    path.write_bytes(b"\xff\xfe\xff")
    assert "not text in UTF-8" in refused(tree)
    path.unlink()
    assert f"{path}: cannot be read (No such file or directory)" in refused(tree)


def test_an_image_that_cannot_be_enlarged_leaves_nothing_behind(tree: Path, say: Say) -> None:
    (tree / "Set1" / "one.jpg").write_bytes(b"not a picture")
    refusal = say("data", "traffic-signs", tree, "table", "--train-set", "Set1", "--enlarge").refusal()
    assert "one.jpg" in refusal
    assert not Path("table").exists()


def test_a_folder_whose_name_is_no_text_is_an_error_of_one_line(tree: Path, say: Say) -> None:
    odd = tree.rename(Path(f"{tree.parent}/\udcff"))
    assert "not valid text" in say("data", "traffic-signs", odd, "table", "--train-set", "Set1").refusal()
    assert not Path("table").exists()


# --- what is learned from --------------------------------------------------------------------------------------------


def test_enlarged_images_are_those_of_the_published_code_and_their_boxes_grow_with_them(tree: Path, say: Say) -> None:
    said = say("data", "traffic-signs", tree, "table", "--train-set", "Set1", "--enlarge")
    assert said.out.rstrip().endswith("--recipe traffic"), "no other patch size"
    row = next(row for row in csv_rows(Path("table/manifest.csv")) if "Set1-one" in row["image"])
    with Image.open(tree / "Set1" / "one.jpg") as source, Image.open(Path("table") / row["image"]) as image:
        assert image.size == (1600, 1200)
        assert image.tobytes() == source.resize((1600, 1200), Image.Resampling.BILINEAR).tobytes()
    (region,) = read_regions(Path("table") / row["annotation"])
    assert region.rings[0].min(0).tolist() == [10 * 20, 12 * 1200 / HEIGHT]
    with keyhole.open_image(Path("table") / row["image"]) as image:
        inside = image.read(Box(210, 240, 300, 300))
    red, green, _ = np.median(inside, axis=(0, 1))
    assert red > 180 > 60 > green, "the box is where the sign is"


def test_a_model_learns_from_the_manifest_and_evaluation_says_how_many_kept_patches_touch_a_sign(
    tmp_path: Path, say: Say
) -> None:
    lines = several(4) | several(2, "50_SIGN") | several(2, "70_SIGN") | several(2, "80_SIGN")
    for name in ("Set1", "Set2"):
        write_set(tmp_path / "signs" / name, lines)
    say("data", "traffic-signs", "signs", "table", "--train-set", "Set1")
    flags = [f"--{section}.{name}={value}" for section, values in SMALL.items() for name, value in values.items()]
    flags += ["--train.epochs=1", "--data.val=0"]
    assert say("train", "table/manifest.csv", *flags, "--out", "run").code == 0
    said = say("evaluate", "run")
    assert "kept patches that touch an annotated region" in said.out
    metrics = json.loads(Path("run/evaluation/test/metrics.json").read_text())
    assert metrics["tasks"]["sign"]["kind"] == "multiclass"
    assert metrics["lesions"]["images"] == 6
    chance = metrics["lesions"]["kept_touching_a_lesion_by_chance"]["value"]
    assert chance == pytest.approx(4 / 20), "the sign is on 2 x 2 of 5 x 4 patches of 16 px"


def test_composites_in_its_layout_are_read_as_the_data_set(shared: Path, tmp_path: Path, say: Say) -> None:
    script = shared / "tools" / "make_traffic_scenes.py"
    subprocess.run([sys.executable, script, tmp_path / "scenes", "--train", "6", "--test", "2"], check=True)
    assert say("data", "traffic-signs", "scenes", "table", "--train-set", "Set2").code == 0
    rows = csv_rows(Path("table/manifest.csv"))
    assert Counter(row["split"] for row in rows) == {"train": 6, "test": 2}
    for row in rows:
        assert bool(row["annotation"]) == (row["sign"] != "empty")


def test_an_image_named_like_one_of_another_part_is_that_of_the_first_place(tree: Path) -> None:
    (tree / "Set2" / "Set2Part1").mkdir()
    for path in (tree / "Set2" / "Set2Part0").iterdir():
        (tree / "Set2" / "Set2Part1" / path.name).touch()
    found = read_traffic_signs(tree, "Set1")["test"]
    assert {image.file.parent.name for image in found.images} == {"Set2Part0"}
    with pytest.raises(DataError, match="no such folder"):
        read_traffic_signs(tree / "Set3")
