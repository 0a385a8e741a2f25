"""What is shown of a prediction comes from that prediction: the kept pixels, each image looked at once."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

import keyhole
from keyhole.config.settings import Config, ModelConfig, PatchConfig, SelectConfig
from keyhole.data.item import Item
from keyhole.engine import Engine
from keyhole.images.pillow import PillowImage
from keyhole.inference.evaluate import evaluate
from keyhole.inference.predictor import describe
from keyhole.nn import build_classifier
from keyhole.report import contact_sheet as sheet
from keyhole.report.pictures import MAX_PATCHES, most_attended, small_patches
from keyhole.runs.checkpoint import save_model
from keyhole.tasks.kinds import Task

TASK = Task("label", "binary", ("no", "yes"))
SIDE = sheet.PATCH_SIDE - 8
"""Patches of this many pixels are on the sheet as they are."""


def model_folder(folder: Path, m: int = 4, **patch: Any) -> Path:
    """A model with fresh weights that attends to some patches more than to others."""
    config = Config(
        patch=PatchConfig(**{"size": SIDE, **patch}),
        model=ModelConfig(encoder="small", width=4, heads=2),
        select=SelectConfig(m=m, chunk=16),
    )
    torch.manual_seed(0)
    model = build_classifier(config.model, (TASK,), config.patch.size)
    with torch.no_grad():
        model.pool.query.mul_(50)
    folder.mkdir()
    save_model(folder, model, describe(config, (TASK,)))
    return folder


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def pyramid(path: Path, seed: int, mpp: float) -> np.ndarray:
    """A TIFF of two levels that have nothing in common, so that the level read is seen in the pixels; the second."""
    first, second = noise(1080, 1080, seed), noise(540, 540, seed + 100)
    common: dict[str, Any] = {"tile": (64, 64), "compression": "deflate", "photometric": "rgb"}
    with tifffile.TiffWriter(path) as file:
        file.write(first, subifds=0, resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER", **common)
        file.write(second, subfiletype=1, **common)
    return second


def flat(path: Path, seed: int, mpp: float) -> np.ndarray:
    pixels = noise(402, 402, seed)
    tifffile.imwrite(
        path,
        pixels,
        tile=(64, 64),
        compression="deflate",
        photometric="rgb",
        resolution=(1e4 / mpp, 1e4 / mpp),
        resolutionunit="CENTIMETER",
    )
    return pixels


def turned(path: Path, seed: int, mpp: float) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(402, 536, seed)).save(path, exif=exif)
    with Image.open(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture))


def speck(path: Path, seed: int, mpp: float) -> np.ndarray:
    pixels = noise(670, 670, seed)
    pixels[:268] = 255
    Image.fromarray(pixels).save(path)
    return pixels


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


CASES: dict[str, tuple[Callable[[Path, int, float], np.ndarray], str, dict[str, Any], str]] = {
    "mpp of the CSV, not of the file": (flat, "tif", {"mpp": 0.5}, "0.5"),
    "mpp of the file": (pyramid, "tif", {"mpp": 0.5}, ""),
    "a level": (pyramid, "tif", {"level": 1}, ""),
    "a turned photograph": (turned, "jpg", {}, ""),
    "patches renumbered by a mask": (speck, "png", {"foreground": "non-empty"}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sheet_shows_the_pixels_of_the_kept_boxes(case: str, tmp_path: Path) -> None:
    write, suffix, patch, mpp = CASES[case]
    read = {f"{n}.{suffix}": write(tmp_path / f"{n}.{suffix}", n, 0.25) for n in range(2)}
    model = model_folder(tmp_path / "model", **patch)
    data = write_csv(tmp_path / "d.csv", [{"image": name, "label": "yes", "mpp": mpp} for name in read])

    found = evaluate(model, data, out=tmp_path / "out")

    with Image.open(found.path / "contact_sheet.png") as picture:
        drawn = np.asarray(picture)
    predictor, shown = keyhole.load(model), []
    for name, pixels in read.items():
        prediction = predictor.predict(tmp_path / name, mpp=float(mpp) if mpp else None)
        assert len(prediction.kept) == 4
        boxes = prediction.kept.boxes / prediction.patch["scale"]
        order = np.argsort(-prediction.kept.attention["label"], kind="stable")
        crops = [white_beyond(pixels, *boxes[i].round().astype(int).tolist()) for i in order]
        shown.append((prediction.label["label"] == "yes", crops))
    for row, (_, crops) in enumerate(sorted(shown, key=lambda each: each[0])):  # wrong ones first
        for place, crop in enumerate(crops):
            x = sheet.PATCHES_LEFT + place * (sheet.PATCH_SIDE + sheet.PATCH_GAP) + 4
            y = sheet.HEAD + row * (sheet.ROW + 2 * sheet.GAP) + sheet.GAP + 4
            np.testing.assert_array_equal(drawn[y : y + SIDE, x : x + SIDE], crop)


def white_beyond(pixels: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    padded = np.full((height, width, 3), 255, np.uint8)
    inside = pixels[y : y + height, x : x + width]
    padded[: inside.shape[0], : inside.shape[1]] = inside
    return padded


def test_evaluate_opens_each_image_once(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    original = PillowImage.__init__

    def counted(image: PillowImage, path: Path) -> None:
        opened[str(path)] += 1
        original(image, path)

    monkeypatch.setattr(PillowImage, "__init__", counted)
    found = evaluate(model_folder(tmp_path / "model", size=16), relabelled(toy, tmp_path), out=tmp_path / "out")

    assert found.metrics[0].n == 24
    assert len(opened) == 24
    assert set(opened.values()) == {1}
    with Image.open(found.path / "contact_sheet.png") as picture:
        assert picture.height == sheet.HEAD + 16 * (sheet.ROW + 2 * sheet.GAP) + sheet.MARGIN // 2


def relabelled(toy: Path, folder: Path) -> Path:
    images = sorted(toy.rglob("*.png"))
    rows = [{"image": str(image), "label": "yes" if image.parent.name == "red" else "no"} for image in images]
    return write_csv(folder / "d.csv", rows)


def test_kept_pixels_that_are_not_held_are_read_from_the_same_source(toy: Path, tmp_path: Path) -> None:
    predictor = keyhole.load(model_folder(tmp_path / "model", size=16))
    whole = predictor.predict(toy / "red" / "0.png").pictures
    engine = Engine(predictor.model, predictor.config.select)
    engine.plan = replace(engine.plan, hold=0)
    item = Item("0.png", toy / "red" / "0.png", {})
    with closing(engine):
        ((_, prediction),) = predictor.predict_items([item], description=None, engine=engine, pictures=lambda *_: True)
    again = prediction.pictures
    assert whole is not None
    assert again is not None
    np.testing.assert_array_equal(whole.patches, again.patches)
    np.testing.assert_array_equal(whole.thumbnail, again.thumbnail)


def test_a_prediction_of_many_large_patches_carries_few_small_pictures(tmp_path: Path) -> None:
    Image.fromarray(noise(1600, 1600, 0)).save(tmp_path / "a.png", compress_level=0)
    predictor = keyhole.load(model_folder(tmp_path / "model", m=100, size=150))
    prediction = predictor.predict(tmp_path / "a.png")

    pictures = prediction.pictures
    assert len(prediction.kept) == 100
    assert pictures is not None
    assert pictures.patches.shape == (MAX_PATCHES, 142, 142, 3)
    assert pictures.thumbnail.nbytes + pictures.patches.nbytes < 8e6
    attention = prediction.kept.attention["label"]
    assert attention[pictures.place].min() >= np.sort(attention)[-MAX_PATCHES]
    assert predictor.predict(tmp_path / "a.png", pictures=False).pictures is None


def test_the_most_attended_of_every_task_are_shown() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.dirichlet(np.ones(500)).astype(np.float32) for name in "ab"}
    kept = keyhole.report.prediction.KeptPatches(
        np.arange(500), np.zeros((500, 4), np.int64), np.zeros(500, np.float32), weights
    )
    place = most_attended(kept)
    assert len(place) == MAX_PATCHES
    for each in weights.values():
        assert set(np.argsort(-each)[:8]) <= set(place.tolist())
    assert small_patches(np.zeros((3, 20, 20, 1), np.uint8)).shape == (3, 20, 20, 1)


def test_a_damaged_image_is_shown_by_its_scores(tmp_path: Path) -> None:
    pixels = noise(640, 640, 0)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), compression="deflate", photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset = file.pages[0].dataoffsets[5]
    with (tmp_path / "a.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    model = model_folder(tmp_path / "model", size=64)
    data = write_csv(tmp_path / "d.csv", [{"image": "a.tif", "label": "yes"}])

    found = evaluate(model, data, out=tmp_path / "out")

    assert found.metrics[0].n == 1
    assert (found.path / "contact_sheet.png").is_file()
    prediction = keyhole.load(model).predict(tmp_path / "a.tif")
    assert prediction.unreadable is not None
    assert prediction.pictures is not None
    assert "damaged image" in prediction.pictures.note
    assert prediction.pictures.patches.shape == (4, 64, 64, 3)
