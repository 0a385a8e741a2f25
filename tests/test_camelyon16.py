"""CAMELYON16: a miniature of the published tree becomes a manifest, is learned from and judged by its outlines."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import Say, csv_rows

from keyhole.datasets.camelyon16 import OFFICIAL, read_camelyon16
from keyhole.errors import DataError

SIDE, SPOT = 512, 64
GLASS, TISSUE, LESION = (242, 240, 243), (214, 150, 190), (92, 52, 160)


def write_slide(path: Path, seed: int, spot: tuple[int, int] | None) -> None:
    """A pyramidal tiled TIFF: glass with a piece of tissue, and a darker spot in it."""
    rng = np.random.default_rng(seed)
    pixels = np.full((SIDE, SIDE, 3), GLASS, np.int16)
    pixels[64:448, 64:448] = TISSUE
    if spot is not None:
        x, y = spot
        pixels[y : y + SPOT, x : x + SPOT] = LESION
    pixels = np.clip(pixels + rng.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        options = {"tile": (256, 256), "compression": "deflate", "photometric": "rgb"}
        tiff.write(pixels, subifds=1, resolution=(40000, 40000), resolutionunit="CENTIMETER", **options)
        tiff.write(pixels[::4, ::4], subfiletype=1, **options)


def write_outline(path: Path, spot: tuple[int, int]) -> None:
    """The spot as ASAP outlines it."""
    x, y = spot
    corners = [(x, y), (x + SPOT, y), (x + SPOT, y + SPOT), (x, y + SPOT)]
    points = "".join(f'<Coordinate Order="{i}" X="{px:.1f}" Y="{py:.1f}"/>' for i, (px, py) in enumerate(corners))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<?xml version="1.0"?>\n<ASAP_Annotations><Annotations><Annotation Name="Annotation 0" Type="Polygon" '
        f'PartOfGroup="_0" Color="#F4FA58"><Coordinates>{points}</Coordinates></Annotation></Annotations>'
        '<AnnotationGroups><Group Name="_0" PartOfGroup="None"/></AnnotationGroups></ASAP_Annotations>'
    )


def spots(count: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(1)
    return [(int(x) * 32, int(y) * 32) for x, y in rng.integers(2, 12, (count, 2))]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official tree with 8 normal, 8 tumor and 8 test slides, of which the even ones are tumor; do not change it."""
    root = tmp_path_factory.mktemp("camelyon") / "CAMELYON16"
    where = spots(20)
    for number in range(1, 9):
        write_slide(root / f"training/normal/normal_{number:03d}.tif", number, None)
        write_slide(root / f"training/tumor/tumor_{number:03d}.tif", 100 + number, where[number])
        write_outline(root / f"training/lesion_annotations/tumor_{number:03d}.xml", where[number])
    reference = []
    for number in range(1, 9):
        tumor = number % 2 == 0
        write_slide(root / f"testing/images/test_{number:03d}.tif", 200 + number, where[10 + number] if tumor else None)
        if tumor:
            write_outline(root / f"testing/lesion_annotations/test_{number:03d}.xml", where[10 + number])
        reference.append(f"test_{number:03d},{'Tumor,IDC,Macro' if tumor else 'Normal,None,None'}")
    (root / "testing/reference.csv").write_text("\n".join(reference) + "\n")
    (root / "testing/evaluation_masks").mkdir()
    (root / "testing/evaluation_masks/test_002.tif").write_bytes(b"II*\0")
    return root


def problems(root: Path, **options: object) -> dict[str, list[str]]:
    """What is wrong, by what is wrong, without the official slides that a small copy lacks."""
    found: dict[str, list[str]] = {}
    for problem in read_camelyon16(root, **options).problems:  # type: ignore[arg-type]
        if not problem.what.startswith("missing"):
            found.setdefault(problem.what, []).append(Path(problem.name).name)
    return found


def empty_tree(root: Path, names: Iterable[str]) -> Path:
    """Files that begin as a TIFF, at `folder/name` below the root; no pixel of them can be read."""
    for name in names:
        path = root / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"II*\0rest")
    return root


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_the_manifest_has_every_slide_with_its_label_split_and_outlines(tree: Path, tmp_path: Path, say: Say) -> None:
    code, out, _ = say("data", "camelyon16", tree, "--out", tmp_path / "deep" / "c16.csv", "--val", "0.25")

    assert code == 0
    table = csv_rows(tmp_path / "deep" / "c16.csv")
    assert all((tmp_path / "deep" / row["image"]).resolve().is_file() for row in table)
    assert not any(Path(row["image"]).is_absolute() for row in table)
    by_name = {Path(row["image"]).stem: row for row in table}
    assert len(by_name) == 24
    assert {name for name, row in by_name.items() if row["label"] == "tumor"} == {
        *(f"tumor_{i:03d}" for i in range(1, 9)),
        *(f"test_{i:03d}" for i in (2, 4, 6, 8)),
    }
    assert {name for name, row in by_name.items() if row["annotation"]} == {
        name for name, row in by_name.items() if row["label"] == "tumor"
    }
    assert all((row["split"] == "test") == name.startswith("test") for name, row in by_name.items())
    held_out = [row["label"] for row in table if row["split"] == "val"]
    assert sorted(held_out) == ["normal", "normal", "tumor", "tumor"]
    assert "normal: 8 of 159 slides (6 train, 2 val)" in out
    assert "test: 8 of 129 slides (4 normal, 4 tumor)" in out
    assert f"keyhole train {tmp_path / 'deep' / 'c16.csv'} --recipe camelyon16" in out


def test_another_seed_holds_out_others_and_the_same_the_same(tree: Path) -> None:
    def held_out(seed: int) -> set[str]:
        return {slide.name for slide in read_camelyon16(tree, 0.25, seed).slides if slide.split == "val"}

    assert held_out(1) == held_out(1)
    assert len({frozenset(held_out(seed)) for seed in range(5)}) > 1


def test_nothing_is_overwritten_that_says_something_else(tree: Path, tmp_path: Path, say: Say) -> None:
    out = tmp_path / "c16.csv"
    assert say("data", "camelyon16", tree, "--out", out)[0] == 0
    assert say("data", "camelyon16", tree, "--out", out)[0] == 0
    code, _, err = say("data", "camelyon16", tree, "--out", out, "--val", "0.5")
    assert code == 2
    assert "says something else" in err


def test_the_whole_official_tree_lacks_nothing_but_outlines(tmp_path: Path) -> None:
    folders = {"normal": "training/normal", "tumor": "training/tumor", "test": "testing/images"}
    root = empty_tree(tmp_path, (f"{folders[name.partition('_')[0]]}/{name}" for name in OFFICIAL))
    tests = [name for name in OFFICIAL if name.startswith("test")]
    reference = [f"{name},{'Tumor,IDC,Micro' if i < 49 else 'Normal,None,None'}" for i, name in enumerate(tests)]
    (root / "testing/reference.csv").write_text("\n".join(reference))

    found = read_camelyon16(root)

    assert len(found.slides) == 399
    assert found.lines()[:3] == [
        "normal: 159 of 159 slides (135 train, 24 val)",
        "tumor: 111 of 111 slides (95 train, 16 val)",
        "test: 129 of 129 slides (80 normal, 49 tumor)",
    ]
    assert {problem.what for problem in found.problems} == {"a tumor slide without lesion outlines (.xml)"}


def test_the_aws_copy_in_any_case_of_letters_is_read_alike(tmp_path: Path) -> None:
    names = ["Normal_001", "normal_002", "Tumor_001", "tumor_002", "Test_001", "test_002"]
    root = empty_tree(tmp_path, (f"Images/{name}" for name in names))
    empty_tree(tmp_path, (f"{folder}/{name}" for folder in ("masks", "background_tissue") for name in names))
    for name in ("Tumor_001", "tumor_002", "test_002"):
        write_outline(tmp_path / f"Annotations/{name}.xml", (0, 0))
    (tmp_path / "evaluation").mkdir()
    table = ["image,type,center,class", *(f"{name.lower()}.tif,x,1,negative" for name in names if name[0] in "Nn")]
    table += [
        "tumor_001.tif,x,0,macro",
        "tumor_002.tif,x,0,micro",
        "test_001.tif,x,1,negative",
        "test_002.tif,x,0,macro",
    ]
    (tmp_path / "evaluation/reference.csv").write_text("\n".join(table))

    found = read_camelyon16(root)

    assert {slide.name: slide.labels["label"] for slide in found.slides if slide.split == "test"} == {
        "test_001": "normal",
        "test_002": "tumor",
    }
    assert [slide.name for slide in found.slides if slide.annotation] == ["test_002", "tumor_001", "tumor_002"]
    assert all("Images" in str(slide.image) for slide in found.slides)
    assert problems(root) == {}


def test_all_that_does_not_fit_is_said(tree: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    (root / "training/tumor/tumor_001.tif").write_bytes(b"")
    (root / "training/tumor/tumor_002.tif").write_bytes(b"<html>not found</html>")
    (root / "training/lesion_annotations/tumor_003.xml").unlink()
    (root / "training/lesion_annotations/tumor_004.xml").write_text("<ASAP_Annotations>")
    write_outline(root / "training/lesion_annotations/tumor_050.xml", (0, 0))
    write_outline(root / "testing/lesion_annotations/test_001.xml", (0, 0))
    shutil.copy(root / "training/normal/normal_001.tif", root / "testing/images/normal_001.tif")
    shutil.copy(root / "training/normal/normal_001.tif", root / "training/normal/tumor_060.tif")
    shutil.copy(root / "training/normal/normal_001.tif", root / "training/normal/normal_086.tif")
    shutil.copy(root / "training/normal/normal_001.tif", root / "testing/images/test_049.tif")
    shutil.copy(root / "training/normal/normal_001.tif", root / "testing/images/test_099.tif")
    (root / "training/normal/normal_002.tif").unlink()
    (root / "training/normal/normal_002.tif").symlink_to(root / "nowhere.tif")
    with (root / "testing/reference.csv").open("a") as file:
        file.write("test_090,Tumor,IDC,Micro\ntest_005;Normal\n")
    with zipfile.ZipFile(root / "training/lesion_annotations.zip", "w") as archive:
        archive.writestr("lesion_annotations/tumor_003.xml", "")

    found = problems(root)

    expected = {
        "an empty file": "tumor_001.tif",
        "not a TIFF": "tumor_002.tif",
        "a tumor slide without lesion outlines": "tumor_003",
        "its lesion outlines are not used": "tumor_004",
        "lesion outlines without a slide": "tumor_050.xml",
        "a normal slide with lesion outlines": "test_001",
        "there is another file of normal_001": "normal_001.tif",
        "its name says tumor, its folder normal": "tumor_060.tif",
        "it holds a tumor": "normal_086",
        "a duplicate": "test_049",
        "a test slide without a row": "test_099",
        "a link that leads nowhere": "normal_002.tif",
        "a row in reference.csv without a slide": "test_090",
        "expected a slide and its label": "reference.csv, line 10",
    }
    for what, name in expected.items():
        assert [names for said, names in found.items() if said.startswith(what)] == [[name]], what
    # outlines of slides that are not used are without a slide too
    leftover = [what for what in found if not any(what.startswith(known) for known in expected)]
    assert leftover == []
    notes = read_camelyon16(root).notes
    assert any("1 lesion outlines are still zipped" in note for note in notes)
    usable = {slide.name: slide for slide in read_camelyon16(root).slides}
    assert len(usable) == 24 - 3
    assert usable["tumor_004"].annotation is None
    assert usable["test_001"].annotation is None


def test_what_is_missing_is_counted_and_written_beside_the_manifest(tree: Path, tmp_path: Path, say: Say) -> None:
    code, out, _ = say("data", "camelyon16", tree, "--out", tmp_path / "c16.csv")
    assert code == 0
    assert "problem: normal_009, normal_010, normal_011, normal_012, normal_013, ... (375 in all): missing" in out
    table = csv_rows(tmp_path / "c16-problems.csv")
    assert len(table) == 375
    assert table[0] == {"name": "normal_009", "problem": "missing: an official slide that is not here"}


def test_a_folder_without_anything_usable_is_an_error_of_one_line(tmp_path: Path, say: Say) -> None:
    root = tmp_path / "root"
    for content in ((), ("images/slide_1",), ("testing/images/test_001",)):
        empty_tree(root, content).mkdir(exist_ok=True)
        code, _, err = say("data", "camelyon16", root, "--out", tmp_path / "a.csv")
        assert code == 2
        assert "no usable slide of CAMELYON16" in err
        assert len(err.strip().splitlines()) == 1
    assert "no such folder" in say("data", "camelyon16", tmp_path / "none")[2]
    assert not (tmp_path / "a.csv").exists()


def test_a_folder_whose_name_is_no_text_is_an_error_of_one_line(tmp_path: Path, say: Say) -> None:
    root = empty_tree(Path(f"{tmp_path}/\udcff"), ["images/normal_001", "images/tumor_001"])
    code, _, err = say("data", "camelyon16", root, "--out", tmp_path / "a.csv")
    assert code == 2
    assert "not valid text" in err
    assert not (tmp_path / "a.csv").exists()


def test_without_a_reference_no_test_slide_is_used(tmp_path: Path) -> None:
    found = read_camelyon16(empty_tree(tmp_path, ["images/normal_001", "images/tumor_001", "images/test_001"]))
    assert {slide.split for slide in found.slides} == {"train"}
    assert any("no reference.csv" in note for note in found.notes)


def test_two_references_that_disagree_are_an_error_until_one_is_named(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("test_001,Tumor,IDC,Macro\n")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "slides").symlink_to(tree)
    (tmp_path / "root" / "reference.csv").write_text(other.read_text())

    with pytest.raises(DataError, match="test_001 is normal, but tumor in"):
        read_camelyon16(tmp_path / "root")
    found = read_camelyon16(tmp_path / "root", reference=other)

    assert [slide.name for slide in found.slides if slide.split == "test"] == ["test_001"]
    assert found.slides[8].labels["label"] == "tumor"
    with pytest.raises(DataError, match="no such file"):
        read_camelyon16(tree, reference=tmp_path / "none.csv")


def test_links_that_go_in_circles_are_walked_once(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "slides").symlink_to(tree)
    assert len(read_camelyon16(tmp_path).slides) == 24


def test_too_few_slides_to_hold_some_out_is_said(tmp_path: Path) -> None:
    root = empty_tree(tmp_path, ["training/normal/normal_001", "training/tumor/tumor_001"])
    found = read_camelyon16(root)
    assert [slide.split for slide in found.slides] == ["train", "train"]
    assert any(problem.name == "validation" for problem in found.problems)


# --- end to end ------------------------------------------------------------------------------------------------------

SHRUNK = (
    "--memory=auto --model.heads=2 --model.hidden=64 --train.epochs=8 --train.batch=4 --train.lr=3e-3 "
    "--train.warmup=1 --select.m=4 --run.threads=2 --run.device=cpu"
).split()


def judged(run: Path) -> dict[str, float]:
    metrics = json.loads((run / "evaluation/test/metrics.json").read_text())
    lesions = metrics["lesions"]
    assert lesions["images"] == 4
    return {
        "auroc": metrics["tasks"]["label"]["overall"]["auroc"]["value"],
        "attention": lesions["attention_in_lesions"]["label"]["value"],
        "kept": lesions["kept_touching_a_lesion"]["value"],
        "looked_at": lesions["looked_at_touching_a_lesion"]["value"],
    }


def test_the_image_path_learns_from_the_tree_and_finds_the_lesions(tree: Path, tmp_path: Path, say: Say) -> None:
    assert say("data", "camelyon16", tree, "--out", tmp_path / "c16.csv")[0] == 0
    small = "--model.encoder=small --model.no-pretrained --model.width=8 --patch.size=64 --patch.stride=64".split()

    code, _, err = say("train", tmp_path / "c16.csv", "--recipe=camelyon16", "--out", tmp_path / "run", *SHRUNK, *small)
    assert code == 0, err
    code, out, err = say("evaluate", tmp_path / "run")
    assert code == 0, err

    assert "attention in annotated regions" in out
    found = judged(tmp_path / "run")
    assert found["auroc"] == 1
    assert found["kept"] > 2 * found["looked_at"] > 0
    assert found["attention"] > found["looked_at"]
    assert [row["regions"] for row in csv_rows(tmp_path / "run/evaluation/test/lesions.csv")] == ["1"] * 4


def write_features(path: Path, seed: int, spot: tuple[int, int] | None) -> None:
    """As CLAM writes them: a row per 64 px of tissue, whose first numbers say whether it touches the spot."""
    import h5py

    rng = np.random.default_rng(seed)
    coords = np.array([(x, y) for y in range(64, 448, 64) for x in range(64, 448, 64)])
    features = rng.normal(0, 1, (len(coords), 24)).astype(np.float32)
    if spot is not None:
        features[(np.abs(coords - spot) < 64).all(axis=1), :4] += 5
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features
        dataset = file.create_dataset("coords", data=coords)
        dataset.attrs.update({"patch_size": 64, "patch_level": 0})


def test_the_feature_path_learns_without_the_slides_and_finds_the_lesions(tree: Path, tmp_path: Path, say: Say) -> None:
    root, archive = tmp_path / "root", tmp_path / "features"
    where = spots(20)
    for number in range(1, 9):
        write_features(archive / f"h5_files/normal_{number:03d}.h5", number, None)
        write_features(archive / f"h5_files/tumor_{number:03d}.h5", 100 + number, where[number])
        spot = where[10 + number] if number % 2 == 0 else None
        write_features(archive / f"h5_files/test_{number:03d}.h5", 200 + number, spot)
    root.mkdir()
    for name in ("training/lesion_annotations", "testing/lesion_annotations", "testing/reference.csv"):
        (root / name.replace("/", "-")).symlink_to(tree / name)
    (root / "testing-reference.csv").rename(root / "reference.csv")

    code, out, err = say("data", "camelyon16", root, "--features", archive, "--out", tmp_path / "c16.csv")
    assert code == 0, err
    assert f"keyhole train {tmp_path / 'c16.csv'} --recipe camelyon16-features" in out
    table = csv_rows(tmp_path / "c16.csv")
    assert len(table) == 24
    assert all((tmp_path / row["features"]).is_file() and not (tmp_path / row["image"]).exists() for row in table)

    options = ["--recipe=camelyon16-features", "--model.dim=32"]
    code, _, err = say("train", tmp_path / "c16.csv", *options, "--out", tmp_path / "run", *SHRUNK, "--select.chunk=16")
    assert code == 0, err
    code, out, err = say("evaluate", tmp_path / "run")
    assert code == 0, err

    assert "attention in annotated regions" in out
    found = judged(tmp_path / "run")
    assert found["auroc"] > 0.9
    assert found["kept"] > 2 * found["looked_at"] > 0
