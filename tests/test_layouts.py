"""What folders mean: classes, splits, and what systems and keyhole itself leave among the images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import Say, csv_rows
from data_sets import left, read, touch
from PIL import Image

from keyhole.config.settings import DataConfig
from keyhole.data.listing import expand_images
from keyhole.data.manifest import read_for_tasks
from keyhole.errors import DataError
from keyhole.tasks.kinds import Task


def pictures(folder: Path, count: int = 6) -> Path:
    """Real images of two classes."""
    draw = np.random.default_rng(0)
    for number, label in enumerate(("cat", "dog")):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = draw.integers(0, 60, (64, 64, 3), np.uint8)
            pixels[8:40, 8:40, number] = 220
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def each(*folders: str, images: int = 3) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(images)]


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("train", "valid", "test"),
        ("train_set", "dev", "test-images"),
        ("1_Train", "2_Valid", "3_Test"),
    ],
)
@pytest.mark.parametrize("order", ["split/class", "class/split"])
def test_folders_named_like_splits_are_splits_in_either_order(
    names: tuple[str, ...], order: str, tmp_path: Path
) -> None:
    touch(tmp_path, *each(*(f"{s}/{c}" if order == "split/class" else f"{c}/{s}" for s in names for c in "ab")))
    if order == "split/class":
        touch(tmp_path, "other/c/0.png")
    manifest = read(tmp_path)
    assert left(manifest) == ({"other/c/0.png": "not under train, val or test"} if order == "split/class" else {})
    assert manifest.tasks == (Task("label", "binary", ("a", "b")),)
    assert Counter(item.split for item in manifest.items) == {"train": 6, "val": 6, "test": 6}
    assert all(item.labels["label"] in item.name.split("/") for item in manifest.items)


def test_a_test_split_without_classes_is_left_out_and_said(tmp_path: Path) -> None:
    touch(tmp_path, *each("train/a", "train/b", "test"), "train/loose.png")
    manifest = read(tmp_path, val=0.0)
    assert manifest.tasks[0].classes == ("a", "b")
    assert Counter(item.split for item in manifest.items) == {"train": 6}
    assert left(manifest)["test/0.png"] == "in the split test, but not in a class folder: it has no label"
    assert len(manifest.left_out) == 4
    assert any(
        "are left out: 3 in test, 1 in train" in note or "1 in train, 3 in test" in note for note in manifest.notes
    )


def test_a_class_may_be_called_like_a_split_beside_other_classes(tmp_path: Path) -> None:
    touch(tmp_path, *each("train", "bus", "car"))
    assert read(tmp_path).tasks[0].classes == ("bus", "car", "train")
    touch(tmp_path, *each("two/valid", "two/invalid"))
    assert read(tmp_path / "two").tasks[0].classes == ("invalid", "valid")


NEARLY = {
    "splits without classes": (each("train", "test"), r"train and test|test and train.* hold images and no class"),
    "one split without classes": (each("train"), "train is named like a split, but holds images and no class folders"),
    "splits without classes beside a folder": (each("train", "test", "more"), "hold images and no class folders"),
    "a split beside classes": (each("train/steam", "train/diesel", "bus"), "train is named like a split .* beside bus"),
    "no training": (each("val/a", "val/b", "test/a"), "no folder train with class folders"),
    "splits in one class alone": (each("a/train", "a/test", "b"), "a holds the splits .*, but b does not"),
    "folds": (each("fold1/a", "fold1/b", "fold2/a", "fold2/b"), "fold1, fold2 are named like folds"),
    "a folder around the classes": (
        each("data/a", "data/b"),
        r"the only folder .* is data, .* a, b\. .* give .*/data$",
    ),
    "a folder around the splits": (each("data/train/a", "data/test/a"), "the only folder .* is data"),
    "one class": (each("a"), "all images are in one class folder, 'a'"),
    "one image a class": (each("a", "b", "c", images=1), "each of the 3 class folders holds one image"),
    "too few to share out": (each("a", "b", images=1), "give folders train, val and test"),
    "a class outside training": (each("train/a", "train/b", "val/a", "val/c"), "no 'c', other splits have 'c'"),
}


@pytest.mark.parametrize("case", NEARLY)
def test_nearly_split_folders_are_refused_with_the_way_out_in_the_words_of_folders(case: str, tmp_path: Path) -> None:
    names, message = NEARLY[case]
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path)
    said = str(error.value)
    assert str(tmp_path) in said
    assert not any(word in said for word in ("column `", "data.tasks", " row", "\n"))


def test_the_same_folders_in_every_class_are_noted(tmp_path: Path) -> None:
    touch(tmp_path, *each("site1/benign", "site1/malign", "site2/benign", "site2/malign"))
    note = next(note for note in read(tmp_path).notes if "are not classes" in note)
    assert "the classes are site1, site2; the folders benign, malign" in note


def test_one_class_or_one_split_alone_can_be_evaluated(tmp_path: Path) -> None:
    touch(tmp_path, *each("one/a", "held/test/a", "held/test/b"))
    task = Task("label", "binary", ("a", "b"))
    assert len(read_for_tasks(DataConfig(path=tmp_path / "one"), [task]).items) == 3
    assert {item.split for item in read_for_tasks(DataConfig(path=tmp_path / "held"), [task]).items} == {"test"}


SYSTEM = ["@eaDir", "#recycle", ".thumbnails", "lost+found", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"]


def test_folders_of_systems_are_left_out_and_listed_wherever_they_are(tmp_path: Path) -> None:
    touch(tmp_path, *each("a", "b"), *each(*SYSTEM, *(f"a/{name}/0.png" for name in SYSTEM), images=1))
    manifest = read(tmp_path)
    assert len(manifest.items) == 6
    assert set(left(manifest)) == {f"{where}{name}/" for where in ("", "a/") for name in SYSTEM}
    images, others = expand_images([tmp_path])
    assert len(images) == 6
    assert len(others) == 2 * len(SYSTEM)


def test_masks_among_the_images_are_not_a_class(tmp_path: Path) -> None:
    touch(tmp_path, *each("a", "b", "masks/a", "masks/b"))
    manifest = read(tmp_path, masks=tmp_path / "masks")
    assert manifest.tasks[0].classes == ("a", "b")
    assert left(manifest) == {"masks/": "the folder of --data.masks"}
    assert all(item.mask is not None for item in manifest.items)


def test_what_keyhole_writes_is_never_taken_for_images(say: Say, tmp_path: Path) -> None:
    photos = pictures(tmp_path / "photos")
    small = ["--patch.size=32", "--select.m=2"]
    model = ["--model.encoder=small", "--model.width=4", "--train.epochs=1", "--run.threads=1", "--run.device=cpu"]
    looked = [*small, "--patch.foreground=non-empty", "--run.threads=1"]
    assert say("check", photos, *looked, "--previews", photos / "keyhole-check")[0] == 0
    assert say("check", photos, *looked, "--previews", photos / "cat")[0] == 0
    run = photos / "runs" / "one"
    done = say("train", photos, *small, *model, "--out", run)
    assert done.code == 0, done.all
    assert "left out" in done.all
    assert say("evaluate", run, "--device=cpu", "--out", photos / "scores")[0] == 0
    assert say("predict", run, photos / "cat", "--out", photos / "answers", "--device=cpu")[0] == 0
    assert say("predict", run, photos / "dog", "--out", photos / "dog" / "answers", "--device=cpu")[0] == 0
    assert say("init", photos, "--out", photos / "keyhole.yaml")[0] == 0

    manifest = read(photos)
    originals = {f"{label}/{i}.png" for label in ("cat", "dog") for i in range(6)}
    assert {item.name for item in manifest.items} == originals
    assert manifest.tasks[0].classes == ("cat", "dog")
    reasons = left(manifest)
    assert {name: reason for name, reason in reasons.items() if name.count("/") == 1 and name.endswith("/")} == {
        "keyhole-check/": "previews of keyhole check",
        "runs/": "only output of keyhole",
        "scores/": "an evaluation of keyhole",
        "answers/": "predictions of keyhole",
    }
    assert not any("not an image" in reason for name, reason in reasons.items() if name.endswith(".csv"))
    # A second run sees the same images, and so does whatever takes any folder.
    done = say("predict", run, photos, "--out", tmp_path / "all", "--device=cpu")
    assert done.code == 0
    assert len(csv_rows(tmp_path / "all" / "predictions.csv")) == len(originals)
    done = say("check", photos, *small, "--run.threads=1", "--json", "-")
    assert json.loads(done.all[done.all.index("{") : done.all.rindex("}") + 1])["images"] == len(originals)


def test_a_demonstration_beside_the_classes_is_not_a_class(tmp_path: Path) -> None:
    touch(tmp_path, *each("a", "b"), "demo/images/images/0.png", "demo/images/manifest.csv", "demo/images/boxes.csv")
    manifest = read(tmp_path)
    assert manifest.tasks[0].classes == ("a", "b")
    assert left(manifest) == {"demo/": "a demonstration of keyhole"}
    assert len(expand_images([tmp_path / "demo"])[0]) == 1
