"""`check`: every image opened in a process that may die, what was found, and a fix beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from processes import run_process

from keyhole.cli.check import run as run_check
from keyhole.config.settings import Config, DataConfig, PatchConfig, SelectConfig
from keyhole.data.item import Item
from keyhole.errors import DataError, OutputError
from keyhole.images import ArrayImage, open_image
from keyhole.patches.grid import PatchGrid
from keyhole.report import mask_preview
from keyhole.report.drawing import WRONG
from keyhole.report.mask_preview import preview_names
from keyhole.tools.check import worker as check_worker
from keyhole.tools.check.look import Failed, Probed, Request, probe_here
from keyhole.tools.check.run import CheckReport, Finding, check
from keyhole.tools.check.worker import ANSWERS, MESSAGES, ImageProbe, as_line, from_line, serve
from keyhole.util.wording import problem_and_fix

PATCH = {"size": 32, "stride": None, "level": None, "mpp": None, "foreground": "all"}


def request(path: Path, patch: dict[str, Any] | None = None, **options: Any) -> Request:
    return Request(Item("", path, {}, **options), patch or PATCH)


def picture(path: Path, width: int = 100, height: int = 80, mode: str = "RGB", seed: int = 0) -> Path:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8)).save(path)
    return path


def data_set(folder: Path, count: int = 12) -> Path:
    """A CSV with `count` good images of two classes."""
    for i in range(count):
        picture(folder / f"{i}.png", 100 + i, 80, seed=i)
    path = folder / "labels.csv"
    path.write_text("image,grade\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(count)))
    return path


def config(path: Path, **data: object) -> Config:
    return Config(
        data=DataConfig(path=path, **data),  # type: ignore[arg-type]
        patch=PatchConfig(size=32),
        select=SelectConfig(m=4),
    )


def by_name(report: CheckReport) -> dict[str, Finding]:
    return {finding.name: finding for finding in report.findings}


@pytest.fixture
def fast_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, so that a test starts one."""
    monkeypatch.setattr(check_worker, "MAX_PROCESSES", 1)


@pytest.fixture(scope="module")
def probe() -> Iterator[ImageProbe]:
    probe = ImageProbe(stall=20)
    yield probe
    probe.close()


pytestmark = pytest.mark.usefixtures("fast_start")


def test_a_good_data_set_is_measured_and_nothing_is_wrong(tmp_path: Path) -> None:
    done = []
    report = check(config(data_set(tmp_path)), progress=lambda number, total: done.append((number, total)))
    assert (report.ok, report.images) == (True, 12)
    assert all(finding.severity == "warning" for finding in report.findings)
    assert done == [(number, 12) for number in range(1, 13)]
    assert (report.spreads["width"].min, report.spreads["width"].max) == (100, 111)
    assert report.spreads["patches"].total == 12 * 4 * 3
    assert report.classes["grade"]["a"] == {"train": 4, "val": 1, "test": 1}
    assert "memory" in report.memory
    again = json.loads(json.dumps(report.to_json()))
    assert again["ok"] is True
    assert again["spreads"]["height"] == {"min": 80, "median": 80, "max": 80, "total": 960}
    for table in (report.table(), report.class_table()):
        assert len({len(row) for row in table}) == 1
        assert all(isinstance(cell, str) for row in table for cell in row)
    assert ["patches", "12", "12", "12", "144"] in report.table()


def test_every_bad_image_is_a_finding_with_a_fix_and_the_others_are_measured(tmp_path: Path) -> None:
    path = data_set(tmp_path)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_text("image,grade\n")
    (tmp_path / "3.png").unlink()
    picture(tmp_path / "4.png", 20, 20)
    report = check(config(path))
    findings = by_name(report)
    assert not report.ok
    assert {name for name, finding in findings.items() if finding.severity == "error"} == {f"{i}.png" for i in range(5)}
    assert all(finding.fix and "\n" not in finding.problem + finding.fix for finding in report.findings)
    assert findings["3.png"].problem == "no such file"
    assert "--data.root" in findings["3.png"].fix
    assert "larger than the image" in findings["4.png"].problem
    assert "skip" in findings["0.png"].fix
    assert "patch" in findings["4.png"].fix
    assert (report.images, report.left_out) == (7, ())
    assert report.spreads["width"].min == 105


def test_with_skip_bad_images_are_warnings_and_missing_ones_are_listed(tmp_path: Path) -> None:
    path = data_set(tmp_path)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "3.png").unlink()
    report = check(config(path, on_bad_image="skip"))
    assert report.ok
    assert by_name(report)["1.png"].severity == "warning"
    assert [(left.name, left.reason) for left in report.left_out] == [("3.png", "no such file")]


def test_no_good_training_image_of_a_class_is_an_error_even_with_skip(tmp_path: Path) -> None:
    path = data_set(tmp_path)
    for i in range(0, 12, 2):
        (tmp_path / f"{i}.png").write_bytes(b"")
    report = check(config(path, on_bad_image="skip"))
    assert not report.ok
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert [(error.name, error.problem) for error in errors] == [("grade", "no usable training image of class 'a'")]


def test_warnings_tell_what_would_not_stop_a_run_but_spoil_it(tmp_path: Path) -> None:
    for i in range(26):
        picture(tmp_path / f"{i}.png", 70, 70, "L" if i == 5 else "RGB", seed=min(i, 23))
    grade = ["b" if i in (4, 24) else "a" for i in range(26)]
    group = ["p" if i in (0, 25) else f"p{i}" for i in range(26)]
    rows = [f"{i}.png,{grade[i]},{'train' if i < 24 else 'val'},{group[i]},{1 if i else 0.5}" for i in range(26)]
    path = tmp_path / "l.csv"
    path.write_text("image,grade,split,group,mpp\n" + "\n".join(rows))
    settings = config(path)
    report = check(settings.replace(select=SelectConfig(m=9)), deep=True)
    assert report.ok
    problems = [finding.problem for finding in report.findings]
    assert "fewer than 3 training images of 'b'" in problems
    assert any("select.m (=9) keeps every patch (at most 9 per image)" in problem for problem in problems)
    assert "images differ in resolution, 0.5 to 1 um per pixel" in problems
    assert any("1 grey images among colour ones: 5.png" in problem for problem in problems)
    assert by_name(report)["p"].problem.startswith("group with images in more than one split")
    assert by_name(report)["23.png"].problem == "same content as 24.png, 25.png, with another grade, in train and val"


def test_a_class_is_weighed_where_there_is_something_to_weigh(tmp_path: Path) -> None:
    path = data_set(tmp_path, count=33)

    def fix(rare: int) -> str:
        rows = (f"{i}.png,{'a' if i < rare else 'b'},train\n" for i in range(33))
        path.write_text("image,grade,split\n" + "".join(rows))
        (found,) = (
            each for each in check(config(path, val=0.0, test=0.0)).findings if "training image" in each.problem
        )
        return found.fix

    assert fix(3) == "Weigh the classes: --train.balance loss."
    assert fix(2).startswith("Add images, correct labels that are mistyped")


def test_a_data_set_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("picture,grade\n")
    with pytest.raises(DataError, match="no column `image`"):
        check(config(tmp_path / "l.csv"))


# Foreground: previews, masks, resolutions


def slides(folder: Path) -> Path:
    """Three pictures of slides, the last one empty glass, and a CSV of them; names that must not collide."""
    rng = np.random.default_rng(0)
    names = ["a/slide 1.png", "a_slide_1.png", "b.png"]
    for name in names:
        pixels = rng.integers(236, 244, (300, 400, 3), dtype=np.uint8)
        if name != "b.png":
            pixels[100:200, 100:300] = (190, 100, 160)
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).save(folder / name)
    path = folder / "labels.csv"
    path.write_text("image,grade,split\n" + "".join(f"{n},{g},train\n" for n, g in zip(names, "abb", strict=True)))
    return path


def page(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The slide of 400 x 300 in a preview, and what is written below it."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    left = (pixels.shape[1] - 400) // 2
    return pixels[16 : 16 + 300, left : left + 400], pixels[16 + 300 :]


def shows(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((pixels == color).all(axis=-1).any())


GREEN, BLUE, RED = (0, 150, 60), (30, 90, 220), WRONG


def test_a_preview_of_every_slide_is_written_also_where_no_patch_is_left(tmp_path: Path) -> None:
    settings = config(slides(tmp_path)).replace(patch=PatchConfig(size=50, foreground="tissue", min_foreground=0.5))
    report = check(settings, previews=tmp_path / "pictures")
    assert report.previews == str(tmp_path / "pictures")
    found = by_name(report)["b.png"]
    assert found.severity == "error"
    assert found.problem.startswith("no patches: the foreground mask (tissue) leaves none of 48")
    assert str(tmp_path / "pictures" / "b.png") in found.problem
    assert "--patch.foreground" in found.fix
    assert report.spreads["patches"].total == 2 * 8
    pictures = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert pictures == ["a_slide_1-2.png", "a_slide_1.png", "b.png"]
    listing = (tmp_path / "pictures" / "previews.csv").read_text().splitlines()
    assert listing[0] == "image,preview"
    assert sorted(line.rpartition(",")[2] for line in listing[1:]) == pictures
    for name in pictures:
        slide, caption = page(tmp_path / "pictures" / name)
        assert shows(slide, GREEN) == shows(slide, BLUE) == (name != "b.png")
        assert shows(caption, RED) == (name == "b.png")


def test_the_patches_of_a_preview_are_where_the_grid_has_them(tmp_path: Path) -> None:
    settings = config(slides(tmp_path)).replace(patch=PatchConfig(size=50, foreground="tissue", min_foreground=0.5))
    check(settings, previews=tmp_path / "pictures")
    drawn, _ = page(tmp_path / "pictures" / "a_slide_1.png")
    y, x = np.nonzero((drawn == BLUE).all(axis=-1))
    assert (y.min(), y.max(), x.min(), x.max()) == (100, 199, 100, 299)
    # Outside the patches the contrast is lower.
    assert drawn[20:80, 20:80].min() > 240


def test_no_preview_is_made_unless_asked_for_and_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    settings = config(slides(tmp_path)).replace(patch=PatchConfig(size=50, foreground="tissue"))
    before = sorted(tmp_path.rglob("*"))
    assert check(settings).previews is None
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(OutputError, match=r"labels\.csv"):
        check(settings, previews=tmp_path / "labels.csv")
    (tmp_path / "pictures" / "b.png").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"b\.png"):
        check(settings, previews=tmp_path / "pictures")


@pytest.mark.parametrize("size", [4, 16, 60])
@pytest.mark.parametrize("stride", [3, 16, 90])
@pytest.mark.parametrize("edge", ["drop", "shift", "background"])
def test_the_area_under_patches_is_what_their_boxes_cover(size: int, stride: int, edge: Any) -> None:
    mask = np.random.default_rng(0).random((30, 40)) < 0.1
    image = ArrayImage(np.zeros((300, 400, 3), np.uint8))
    grid = PatchGrid(image, size, stride, offset=(-5, -2), mask=mask, edge=edge)
    expected = np.zeros((300, 400), bool)
    for x, y, width, height in grid.boxes(slice(None)).tolist():
        expected[max(y, 0) : y + height, max(x, 0) : x + width] = True
    np.testing.assert_array_equal(mask_preview.covered_by(grid, (300, 400), 1.0), expected)


def test_previews_of_an_earlier_call_are_removed_and_a_file_of_the_user_is_never_overwritten(tmp_path: Path) -> None:
    table, pictures = slides(tmp_path), tmp_path / "pictures"
    settings = config(table).replace(patch=PatchConfig(size=50, foreground="tissue"))
    check(settings, previews=pictures)
    assert len(list(pictures.glob("*.png"))) == 3
    (pictures / "mine.png").write_bytes(b"of the user")
    (tmp_path / "a" / "slide 1.png").rename(tmp_path / "c.png")
    table.write_text(table.read_text().replace("a/slide 1.png", "c.png"))

    report = check(settings, previews=pictures)

    assert {path.name for path in pictures.glob("*.png")} == {"a_slide_1.png", "b.png", "c.png", "mine.png"}
    assert any("removed 1 earlier preview of images that are not checked now" in note for note in report.notes)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "b.png").write_bytes(b"a photograph")
    with pytest.raises(OutputError, match=r"b\.png: not a preview of keyhole check"):
        check(settings, previews=tmp_path / "photos")
    assert (tmp_path / "photos" / "b.png").read_bytes() == b"a photograph"


def test_previews_have_safe_and_distinct_names() -> None:
    names = ["a/b.svs", "a_b.svs", "A/B.svs", "../../etc/passwd", "ö\n.png", "x" * 500 + "1", "x" * 500 + "2", "", "/"]
    found = preview_names(names)
    assert len({name.lower() for name in found}) == len(names)
    for name in found:
        assert name.endswith(".png")
        assert len(name) < 140
        assert not name.startswith(".")
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")


def test_the_command_makes_previews_by_default_only_where_there_is_a_foreground(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    slides(tmp_path)
    (tmp_path / "labels.csv").write_text("image,grade\na/slide 1.png,a\na_slide_1.png,b\n")
    line = ["labels.csv", "--data.val", "0", "--data.test", "0", "--patch.size", "50", "--select.m", "2"]
    assert run_check(line) == 0
    assert run_check([*line, "--patch.foreground", "tissue", "--previews", "none"]) == 0
    assert not (tmp_path / "keyhole-check").exists()
    assert "to look at" not in capsys.readouterr().out
    assert run_check([*line, "--patch.foreground", "tissue"]) == 0
    assert len(list((tmp_path / "keyhole-check").glob("*.png"))) == 2
    assert "foreground masks and patches to look at: keyhole-check" in capsys.readouterr().out
    assert run_check([*line, "--previews", "other"]) == 0
    assert len(list((tmp_path / "other").glob("*.png"))) == 2


def test_masks_are_checked_and_their_faults_name_the_mask(tmp_path: Path, probe: ImageProbe) -> None:
    path, mask = picture(tmp_path / "a.png", 100, 80), tmp_path / "mask.png"
    Image.fromarray(np.pad(np.full((1, 1), 255, np.uint8), 1)[:, :2]).resize((50, 40), 0).save(mask)
    patch = {**PATCH, "size": 20, "foreground": "mask", "min_foreground": 0.01}
    found = probe.probe(request(path, patch=patch, mask=mask))
    assert isinstance(found, Probed)
    assert 0 < found.patches < 20
    mask.write_bytes(mask.read_bytes()[:-20])
    found = probe.probe(request(path, patch=patch, mask=mask))
    assert isinstance(found, Failed)
    assert found.trouble == "image"
    assert found.problem.startswith(f"{mask}: this mask is damaged")
    found = probe.probe(request(path, patch=patch))
    assert isinstance(found, Failed)
    assert found.trouble == "settings"
    assert "--data.masks" in found.fix


def scanned(path: Path, seed: int, x: int, y: int) -> None:
    """A TIFF of `x` and `y` pixels a centimetre."""
    pixels = np.random.default_rng(seed).integers(0, 255, (80, 100, 3), np.uint8)
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(32, 32), resolution=(x, y), resolutionunit=3)


def test_resolutions_of_csv_and_file_that_differ_are_named(tmp_path: Path) -> None:
    rows = []
    for number, mpp in enumerate(["", "0.51", "0.6"]):
        scanned(tmp_path / f"{number}.tif", number, 20000, 20000)
        rows.append(f"{number}.tif,{'ab'[number % 2]},train,{mpp}")
    path = tmp_path / "labels.csv"
    path.write_text("image,grade,split,mpp\n" + "\n".join(rows) + "\n")
    findings = by_name(check(config(path)))
    assert "0.6 microns per pixel in the CSV, 0.5 in the file; the CSV's is used" in findings["2.tif"].problem
    assert findings["2.tif"].severity == "warning"
    assert not {"0.tif", "1.tif"} & set(findings)


def test_annotations_that_no_evaluation_can_use_are_warnings(tmp_path: Path) -> None:
    path = data_set(tmp_path)
    for number, corner in enumerate([(0, 0), (95, 75), (50_000, 40), (0, 50_000)]):
        x, y = corner
        ring = [[x, y], [x + 20, y], [x + 20, y + 20], [x, y + 20], [x, y]]
        (tmp_path / f"{number}.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    (tmp_path / "4.geojson").write_text("{")
    Image.fromarray(np.full((40, 105), 255, np.uint8)).save(tmp_path / "5_marked.png")
    rows = [f"{i}.png,{'ab'[i % 2]},{f'{i}.geojson' if i < 5 else '5_marked.png' if i == 5 else ''}" for i in range(12)]
    path.write_text("\n".join(["image,grade,annotation", *rows]))

    report = check(config(path))

    assert report.ok, "training does not read annotations"
    assert report.images == 12
    found = [finding for finding in report.findings if finding.name in ("2 images", "4.png", "5.png")]
    outside, broken, narrow = sorted(found, key=lambda finding: finding.name)
    assert outside.name == "2 images"
    assert "(102 x 80 px, regions at x 50,000 to 50,020, y 40 to 60 in the first): 2.png, 3.png" in outside.problem
    assert "microns" in outside.fix
    assert broken.name == "4.png"
    assert "4.geojson: not JSON" in broken.problem
    assert narrow.name == "5.png"
    assert "other proportions" in narrow.problem


def test_slides_coarser_than_the_patches_are_one_warning_for_each_resolution(tmp_path: Path) -> None:
    rows = []
    for number, mpp in enumerate(["", "0.5", "1.0", "1.0", "2.0", "0.55"]):
        scanned(tmp_path / f"{number}.tif", number, 20000, 20000)
        rows.append(f"{number}.tif,{'ab'[number % 2]},train,{mpp}")
    path = tmp_path / "labels.csv"
    path.write_text("image,grade,split,mpp\n" + "\n".join(rows) + "\n")
    given = config(path)

    def enlarged(mpp: float | None) -> dict[str, str]:
        report = check(given.replace(patch=PatchConfig(size=32, mpp=mpp)))
        found = [each for each in report.findings if each.problem.startswith("enlarged")]
        assert {each.severity for each in found} <= {"warning"}
        assert all("--patch.mpp" in each.fix for each in found)
        return {each.name: each.problem for each in found}

    said = "enlarged {} x: the slide has {} um per pixel, and patches are read at 0.5"
    assert enlarged(0.5) == {"2 images": said.format(2, 1) + ": 2.tif, 3.tif", "4.tif": said.format(4, 2)}
    assert enlarged(2.0) == {}
    assert enlarged(None) == {}


def test_an_implausible_resolution_is_a_warning_and_an_error_where_it_is_needed(tmp_path: Path) -> None:
    for number in range(2):
        scanned(tmp_path / f"{number}.tif", number, 20000, 40000)
    path = tmp_path / "labels.csv"
    path.write_text("image,grade\n0.tif,a\n1.tif,b\n")
    whole = config(path, val=0.0, test=0.0)
    with open_image(tmp_path / "0.tif") as image:
        assert image.mpp is None
        note = image.mpp_note
    assert note
    found = by_name(check(whole))["2 images"]
    assert found.problem == f"microns per pixel are not known ({note}): 0.tif, 1.tif"
    report = check(whole.replace(patch=PatchConfig(size=32, mpp=1.0)))
    wrong = by_name(report)["0.tif"]
    assert wrong.severity == "error"
    assert note in wrong.problem
    assert "column `mpp`" in wrong.fix
    assert "--patch.mpp none" in wrong.fix


def test_stored_features_are_checked_instead_of_images(tmp_path: Path) -> None:
    for number, width in enumerate([8, 8, 6]):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["features"] = np.random.default_rng(number).random((5 + number, width), np.float32)
            file["coords"] = np.stack([np.arange(5 + number) * 256, np.zeros(5 + number)], axis=1).astype(np.int64)
    path = tmp_path / "labels.csv"
    path.write_text("image,grade\n0.h5,a\n1.h5,b\n")
    whole = config(path, val=0.0, test=0.0)
    report = check(whole, previews=tmp_path / "pictures")
    assert report.ok
    assert report.images == 2
    assert report.spreads["patches"].total == 5 + 6
    assert any(note.startswith("patch.size: no effect on stored features") for note in report.notes)
    assert set(report.spreads) == {"feature width", "patches"}
    assert not list((tmp_path / "pictures").iterdir())
    path.write_text("image,grade\n0.h5,a\n1.h5,b\n2.h5,b\n")
    found = by_name(check(whole))["all images"]
    assert found.severity == "error"
    assert found.problem == "stored features of different widths: 6 in 2.h5; 8 in 0.h5, 1.h5"
    (tmp_path / "2.h5").write_bytes(b"nothing of the kind")
    assert by_name(check(whole))["2.h5"].severity == "error"


# The process that may die


def test_the_other_process_returns_the_same_result(tmp_path: Path, probe: ImageProbe) -> None:
    path = picture(tmp_path / "a b\nö.png", 90, 70, "L")
    found = probe.probe(request(path, mpp=0.25))
    assert found == probe_here(request(path, mpp=0.25))
    assert found == Probed(size=(90, 70), levels=1, mpp=0.25, channels=1, patches=9, level_bytes=6300)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("action", "stall", "failed"),
    [
        (
            "print('out of range', file=sys.stderr, flush=True); os.abort()",
            20,
            Failed("reading it ended the process (signal 6), saying: out of range", "died"),
        ),
        ("time.sleep(1000)", 3, Failed("no data for 3 s", "stalled")),
    ],
)
def test_an_image_that_kills_the_process_or_stalls_is_named_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, stall: float, failed: Failed
) -> None:
    good, bad = picture(tmp_path / "good.png"), picture(tmp_path / "bad.png")
    with_reader(tmp_path, monkeypatch, action)
    probe = ImageProbe(stall=stall)
    try:
        assert probe.probe(request(bad)) == failed
        assert isinstance(probe.probe(request(good)), Probed)
    finally:
        probe.close()


def test_a_slow_image_that_still_gives_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = picture(tmp_path / "bad.png")
    with_reader(tmp_path, monkeypatch, "[(time.sleep(0.5), pool.beat()) for _ in range(9)]")
    probe = ImageProbe(stall=3)
    try:
        assert isinstance(probe.probe(request(slow)), Probed)
    finally:
        probe.close()


def with_reader(folder: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """Makes processes started from here do `action` when they open a file called bad.png."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(
        "import os, sys, time, keyhole.images.image as image, keyhole.util.threads as pool\n"
        "def write(pipe, data):\n"
        "    try: os.write(pipe, data)\n"
        "    except OSError: pass\n"
        "opened = image.open_image\n"
        "def open_image(path, bits=None):\n"
        f"    if str(path).endswith('bad.png'): {action}\n"
        "    return opened(path, bits)\n"
        "image.open_image = open_image\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))


@pytest.mark.parametrize("name", ["page_loop.tif", "giant_tile.tif"])
def test_the_known_hostile_files_are_findings(name: str, shared: Path, tmp_path: Path) -> None:
    path = data_set(tmp_path, 11)
    shutil.copy(shared / "data/hostile" / name, tmp_path / name)
    path.write_text(path.read_text() + f"{name},b\n")
    report = check(config(path))
    assert [finding.name for finding in report.findings if finding.severity == "error"] == [name]


def test_an_answer_wakes_the_thread_that_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[bool] = []
    wait = threading.Condition.wait

    def counted(self: threading.Condition, timeout: float | None = None) -> bool:
        result = wait(self, timeout)
        if timeout is not None:
            woken.append(result)
        return result

    monkeypatch.setattr(threading.Condition, "wait", counted)
    paths = [picture(tmp_path / f"{i}.png", seed=i) for i in range(3)]
    answers: list[Any] = []
    serve([(20, request(path)) for path in paths], answers.append)
    assert [answer.patches for answer in answers if answer] == [12, 12, 12]
    assert woken, "nobody waited"
    assert all(woken), "a wait ran to its timeout although the answer was there"


def test_the_process_ends_with_its_input_and_never_imports_torch() -> None:
    messages = as_line(MESSAGES, None) + as_line(MESSAGES, (5, request(Path("none.png"))))
    done: Any = run_process("imported", "torch", "worker", input=messages, text=False, timeout=60)
    assert done.stderr == b"[]\n", "its output is for answers alone"
    greeting, answer = (from_line(ANSWERS, line) for line in done.stdout.splitlines(keepends=True))
    assert greeting == "ready"
    assert answer.trouble == "image"


@pytest.mark.parametrize(
    "said",
    [
        b"cos\nsystem\n(S'touch taken-over'\ntR.",
        b'{"problem": 5, "trouble": "image"}\n',
        b"{" * 10**5 + b"\n",
        b"9" * 10**7,
    ],
    ids=["a pickle", "other types", "depth", "length"],
)
def test_an_image_that_takes_over_the_process_cannot_harm_the_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    """A file's decoder writes to each open pipe, as code that a hostile file brings could."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "said").write_bytes(said)
    script = "data = open('said', 'rb').read(); [write(pipe, data) for pipe in range(3, 10)]; os._exit(3)"
    with_reader(tmp_path, monkeypatch, script)
    good, bad = picture(tmp_path / "good.png"), picture(tmp_path / "bad.png")
    probe = ImageProbe(stall=20)
    try:
        failed = probe.probe(request(bad))
        assert isinstance(failed, Failed)
        assert failed.trouble == "died"
        assert isinstance(probe.probe(request(good)), Probed)
    finally:
        probe.close()
    assert not (tmp_path / "taken-over").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_names_that_are_not_text_go_through(tmp_path: Path, probe: ImageProbe) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(picture(tmp_path / "a.png").read_bytes())
    assert isinstance(probe.probe(request(path)), Probed)
    path.write_bytes(b"")
    assert probe.probe(request(path)) == probe_here(request(path))


def test_a_killed_probe_ends_the_call_that_waits_for_it(tmp_path: Path) -> None:
    probe = ImageProbe(stall=60)
    assert isinstance(probe.probe(request(picture(tmp_path / "good.png"))), Probed)
    assert probe.pid is not None
    os.kill(probe.pid, signal.SIGSTOP)
    threading.Timer(0.3, probe.kill).start()
    failed = probe.probe(request(tmp_path / "good.png"))
    assert isinstance(failed, Failed)
    assert failed.trouble == "died"
    probe.close()


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ("patch.level (=9) must be one of 0 ... 3", ("patch.level (=9) must be one of 0 ... 3", "")),
        ("damaged (see No. 7. Then 8). Copy it again.", ("damaged (see No. 7. Then 8)", "Copy it again.")),
        ("pixels of v1.5 are not read. Save a.b. Or c.", ("pixels of v1.5 are not read", "Save a.b. Or c.")),
        ("levels 0 ... All of them", ("levels 0 ... All of them", "")),
    ],
)
def test_a_message_is_cut_at_the_end_of_its_first_sentence_only(message: str, parts: tuple[str, str]) -> None:
    assert problem_and_fix(message) == parts


def test_a_fix_is_whole_whatever_dots_the_problem_has(tmp_path: Path) -> None:
    path = data_set(tmp_path / "Dr. Who's images, e.g. No. 1", 6)
    settings = config(path).replace(patch=PatchConfig(size=32, level=9))
    (finding, *_) = check(settings).findings
    assert finding.problem == "patch.level (=9) must be 0, the image's only level"
    assert finding.fix == "Change the patch settings. Or leave it out: --data.on-bad-image skip."
    mask = tmp_path / "Dr. Who" / "masks"
    mask.mkdir(parents=True)
    for i in range(6):
        (mask / f"{i}.png").write_bytes(b"not a mask")
    settings = config(path, masks=mask).replace(patch=PatchConfig(size=32, foreground="mask"))
    (finding, *_) = check(settings).findings
    assert finding.problem == f"{mask / '0.png'}: this mask is not a PNG"
    assert finding.fix.startswith("Expected a PNG or GeoJSON")


def last_line(said: str) -> str:
    return said.strip().splitlines()[-1]


def test_nothing_is_wrong_only_where_there_is_neither_error_nor_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data_set(tmp_path, 24)
    line = [str(path), "--model.encoder", "small", "--patch.size", "32", "--select.m", "4"]
    assert run_check(line) == 0
    assert last_line(capsys.readouterr().out) == "24 images can be used; nothing is wrong"
    assert run_check([*line[:-1], "1"]) == 0
    said = capsys.readouterr().out
    assert last_line(said) == "24 images can be used; warnings: 1"
    assert "a step learns from 8 patches (train.batch x select.m), few for the batch norm" in said
    for harmless in (["--train.batch", "16"], ["--model.freeze"], ["--model.encoder", "vit_tiny_patch16_224"]):
        assert run_check([*line[:-1], "1", *harmless]) == 0
        assert "batch norm" not in capsys.readouterr().out
    (tmp_path / "0.png").write_bytes(b"")
    assert run_check([*line[:-1], "1"]) == 1
    assert last_line(capsys.readouterr().out) == "23 images can be used; errors: 1, warnings: 1"


def test_features_of_one_patch_a_slide_are_few_for_a_batch_norm(tmp_path: Path) -> None:
    for i in range(8):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            file["features"] = np.ones((1, 4), np.float32)
    (tmp_path / "l.csv").write_text("image,grade\n" + "".join(f"{i}.h5,{'ab'[i % 2]}\n" for i in range(8)))
    found = [finding for finding in check(config(tmp_path / "l.csv")).findings if "batch norm" in finding.problem]
    assert [finding.problem.partition(",")[0] for finding in found] == [
        "a step learns from 6 patches (train.batch x select.m)"
    ]


@pytest.mark.parametrize("kind", ["folder", "CSV", "folder of folders"])
def test_images_without_labels_are_checked_and_previewed(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = "new/" if kind == "folder of folders" else ""
    for i in range(3):
        picture(tmp_path / f"data/{inside}{i}.png", seed=i)
    path = tmp_path / "data"
    if kind == "CSV":
        path = tmp_path / "data" / "list.csv"
        path.write_text("image,mpp\n" + "".join(f"{i}.png,0.5\n" for i in range(3)))
    line = [str(path), "--patch.size=32", "--select.m=4", "--previews", str(tmp_path / "out")]
    line += ["--no-labels"] if inside else []
    assert run_check(line) == 0
    said = capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert "3 images can be used" in last_line(said)
    assert ("labels were not checked" in said) == bool(inside)
    assert ("warning: all images: no labels, so only the images were checked" in said) == (not inside)
    (path / inside / "0.png" if kind != "CSV" else tmp_path / "data/0.png").write_bytes(b"")
    assert run_check(line) == 1


def test_a_class_is_shown_as_it_is_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data_set(tmp_path, 8)
    path.write_text(path.read_text().replace(",a", ",[red]x[/red]"))
    assert run_check([str(path), "--patch.size=32", "--select.m=4"]) == 0
    assert "│ [red]x[/red] │" in capsys.readouterr().out


def test_a_fault_of_many_images_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data_set(tmp_path)
    for i in range(5):
        picture(tmp_path / f"{i}.png", 20, 20)
    line = [str(path), "--patch.size=32", "--select.m=4"]
    assert run_check([*line, f"--json={tmp_path / 'found.json'}"]) == 1
    assert "--json" not in capsys.readouterr().out
    assert run_check(line) == 1
    said = capsys.readouterr().out
    assert said.count("larger than the image") == 1
    assert "error: 0.png, 1.png, 2.png, ... (5 in all): the patch (32 x 32 px)" in said
    assert "--json FILE names every image" in said
    assert "errors: 5" in last_line(said)
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert {each["name"] for each in found if each["severity"] == "error"} == {f"{i}.png" for i in range(5)}
