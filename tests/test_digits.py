"""The demo's images: what decides the class is small, hidden, true to its boxes, and nowhere else to be had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import csv_rows
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keyhole.config.settings import DataConfig
from keyhole.data.manifest import read_manifest
from keyhole.datasets import digits
from keyhole.datasets.digits import (
    CLASSES,
    COPIES,
    Rendered,
    handwriting,
    make_digits,
    render,
    scribbles,
)
from keyhole.errors import ConfigError, OutputError

SIDE = 1536


SAMPLES = handwriting()
DOODLES = scribbles(np.random.default_rng(0), 300)


def draw(number: int, split: str = "train", **options: Any) -> Rendered:
    """Image `number`, of class `CLASSES[number % 5]`."""
    samples = SAMPLES[split][CLASSES[number % len(CLASSES)]]
    return render(np.random.default_rng([number, 1]), samples, DOODLES, SIDE, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp("digits") / "set", train=10, val=5, test=6, side=SIDE, seed=3)


def test_the_manifest_is_read_as_balanced_splits_of_one_task(written: Path) -> None:
    manifest = read_manifest(DataConfig(path=written))
    assert [task.name for task in manifest.tasks] == ["label"]
    assert manifest.tasks[0].kind == "multiclass"
    assert manifest.tasks[0].classes == tuple(str(digit) for digit in CLASSES)
    assert not manifest.left_out
    for split, count in {"train": 10, "val": 5, "test": 6}.items():
        items = manifest.split(split)
        counts = Counter(item.labels["label"] for item in items)
        assert len(items) == count
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_images_are_large_grey_files(written: Path) -> None:
    for row in csv_rows(written):
        with Image.open(written.parent / row["image"]) as image:
            assert (image.size, image.mode, image.format) == ((SIDE, SIDE), "L", "JPEG")
            image.load()


def test_what_decides_the_class_covers_under_one_percent_and_never_overlaps(written: Path) -> None:
    boxes = csv_rows(written.with_name("boxes.csv"))
    for row in csv_rows(written):
        own = [box for box in boxes if box["image"] == row["image"]]
        assert COPIES[0] <= len(own) <= COPIES[1]
        assert {box["label"] for box in own} == {row["label"]}
        cover = np.zeros((SIDE, SIDE), dtype=int)
        for box in own:
            x, y, width, height = (int(box[name]) for name in ("x", "y", "width", "height"))
            assert min(x, y) >= 0
            assert max(x + width, y + height) <= SIDE
            cover[y : y + height, x : x + width] += 1
        assert cover.max() == 1
        assert cover.mean() < 0.01


def test_boxes_hold_all_of_a_digit_and_no_more() -> None:
    for number in range(5):
        pixels, boxes = draw(number, clutter=(0, 0), strokes=(0, 0))
        dark = pixels < 190
        for x, y, width, height in boxes:
            inside = dark[y : y + height, x : x + width]
            assert inside[:, : width // 3].any()
            assert inside[:, -(width // 3) :].any()
            assert inside[: height // 4].any()
            assert inside[-(height // 4) :].any()
            dark[y : y + height, x : x + width] = False
        assert not dark.any()


def test_same_seed_same_bytes_and_another_seed_others(written: Path, tmp_path: Path) -> None:
    again = make_digits(tmp_path / "again", train=10, val=5, test=6, side=SIDE, seed=3)
    other = make_digits(tmp_path / "other", train=1, val=1, test=0, side=SIDE, seed=4)

    def contents(manifest: Path) -> dict[str, bytes]:
        folder = manifest.parent
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert contents(again) == contents(written)
    first = "images/train-0000.jpg"
    assert contents(other)[first] != contents(written)[first]


def test_no_handwriting_sample_is_in_two_splits() -> None:
    samples = handwriting(tuple(range(10)))
    seen = {
        split: [image.tobytes() for part in by_digit.values() for image in part] for split, by_digit in samples.items()
    }
    assert sum(map(len, seen.values())) == 1797
    train, val, test = (set(images) for images in seen.values())
    assert train.isdisjoint(val)
    assert train.isdisjoint(test)
    assert val.isdisjoint(test)


@pytest.mark.parametrize("measure", ["total", "darkest", "mean"])
def test_clutter_has_the_ink_of_digits(measure: str) -> None:
    """Area under the curve of digits against doodles by ink alone: 0.5 tells nothing, 0 or 1 everything."""
    rng = np.random.default_rng(0)
    by_ink = {"total": np.sum, "darkest": np.max, "mean": lambda ink: np.mean(ink[ink > 0])}[measure]
    digit = [by_ink(digits.enlarged(rng, sample)) for part in SAMPLES["train"].values() for sample in part]
    doodle = [by_ink(digits.enlarged(rng, source)) for source in DOODLES]
    assert 0.25 < roc_auc_score([1] * len(digit) + [0] * len(doodle), digit + doodle) < 0.75


def test_a_thumbnail_and_grey_values_do_not_tell_the_class_but_the_digits_do() -> None:
    """Chance is 0.20; of 100 guesses, more than 33 are right once in a thousand times."""
    with ThreadPoolExecutor(2) as pool:
        train = list(pool.map(draw, range(200)))
        test = list(pool.map(lambda number: draw(number, "test"), range(1000, 1100)))
    classes = np.arange(200) % len(CLASSES), np.arange(1000, 1100) % len(CLASSES)

    def from_afar(image: Rendered) -> np.ndarray:
        thumbnail = np.asarray(Image.fromarray(image.pixels).resize((32, 32), Image.Resampling.BOX), dtype=float)
        thumbnail_grey = np.histogram(thumbnail, 64, (0, 256))[0]
        grey = np.bincount(image.pixels.ravel() // 4, minlength=64) / image.pixels.size
        return np.concatenate([thumbnail.ravel(), thumbnail_grey, grey])

    def closely(image: Rendered) -> np.ndarray:
        crops = [Image.fromarray(image.pixels[y : y + h, x : x + w]).resize((8, 8)) for x, y, w, h in image.boxes]
        return np.mean([np.asarray(crop, dtype=float).ravel() for crop in crops], axis=0)

    def accuracy(look: Callable[[Rendered], np.ndarray]) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit([look(image) for image in train], classes[0])
        return float(model.score([look(image) for image in test], classes[1]))

    assert accuracy(from_afar) <= 0.33
    assert accuracy(closely) >= 0.95


def test_a_data_set_is_never_overwritten(written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(OutputError, match="exists and is not empty"):
        make_digits(written.parent, train=1, val=0, test=0)
    assert written.read_bytes() == before


def test_the_manifest_comes_last_so_that_half_a_set_is_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Rendered:
        raise OutputError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(digits, "render", broken)
        with pytest.raises(OutputError, match="disk full"):
            make_digits(tmp_path, train=2, val=0, test=0)
    assert not (tmp_path / "manifest.csv").exists()
    assert make_digits(tmp_path, train=2, val=0, test=0).exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"side": 512}, "side"),
        ({"train": -1}, "train"),
        ({"train": 0, "val": 0, "test": 0}, "train"),
        ({"seed": -1}, "seed"),
    ],
)
def test_an_argument_out_of_range_is_named_in_one_line(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        make_digits(tmp_path / "set", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="file"):
        make_digits(tmp_path / "file", train=1, val=0, test=0)
