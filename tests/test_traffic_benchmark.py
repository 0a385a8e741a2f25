"""The benchmark on traffic composites: its arms are the recipe `traffic`, and see the same signs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import csv_rows
from PIL import Image

import keyhole
from keyhole.config.file import resolve
from keyhole.config.settings import AugmentConfig
from keyhole.datasets.traffic_signs import read_traffic_signs
from keyhole.images.geometry import Box
from keyhole.patches.grid import PatchGrid
from keyhole.training.augment import draw
from keyhole.util.files import csv_text

Benchmark = Callable[[str], Any]
WIDTH = 640


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two scenes, one with a red sign, as `keyhole data traffic-signs` writes them."""
    folder = tmp_path / "signs"
    folder.mkdir()
    for number in range(2):
        pixels = np.full((WIDTH * 3 // 4, WIDTH, 3), 90, np.uint8)
        pixels[100:140, 600:640] = (220, 30, 30) if number else 90
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [("image", "sign", "split", "annotation"), ("0.png", "empty", "train", ""), ("1.png", "50", "test", "")]
    (folder / "manifest.csv").write_text(csv_text(rows))
    return folder / "manifest.csv"


def test_an_arm_is_the_recipe_with_another_encoder_patch_m_and_length(benchmark: Benchmark, manifest: Path) -> None:
    module, recipe = benchmark("traffic"), resolve("traffic")
    for arm, m in module.M.items():
        config, name = module.configuration(arm, manifest, WIDTH, 15)
        assert name == f"{module.ARMS[arm]}, 15 epochs"
        assert (config.patch.size, config.patch.stride, config.select.m) == (40, None, m)
        assert (config.model.encoder, config.train.epochs, config.train.warmup) == ("lite0", 15, 1)
        kept = {"data", "memory"}
        assert config.model_dump(exclude=kept) == recipe.replace(
            patch={"size": 40},
            model={"encoder": "lite0", "pretrained": False, "batch_norm": "auto"},
            select={"m": m},
            train={"epochs": 15, "warmup": 1, "watch": "val"},
        ).model_dump(exclude=kept)
    with keyhole.open_image(manifest.parent / "0.png") as image:
        assert len(PatchGrid(image, 40, edge="drop")) == module.N
    config, name = module.configuration("m10", manifest, WIDTH, 15, ["train.encoder_lr=0.1", "select.rule=global"])
    assert (config.train.encoder_lr, config.select.rule) == (0.1, "global")
    assert name.endswith("15 epochs, train.encoder_lr=0.1, select.rule=global"), "it is another row of the table"


def test_the_resized_image_is_one_view_and_shifts_by_a_sixteenth(benchmark: Benchmark, manifest: Path) -> None:
    module = benchmark("traffic")
    config, _ = module.configuration("resized", manifest, WIDTH, 12)
    side, stride = config.patch.size, config.patch.stride
    assert config.data.path is not None
    assert (side, stride, config.select.m) == (288, 18, 1)
    assert side**2 == pytest.approx(40**2 * (10 + 192 / 5), rel=0.1), "as many pixels as M = 10 costs"
    rows = csv_rows(config.data.path)
    assert [(row["sign"], row["split"]) for row in rows] == [("empty", "train"), ("50", "test")]
    with (
        keyhole.open_image(config.data.path.parent / rows[1]["image"]) as image,
        Image.open(manifest.parent / "1.png") as whole,
    ):
        assert np.array_equal(image.read(Box(0, 0, side, side)), np.asarray(whole.resize((side, side), 2)))
        seen = set()
        for epoch in range(200):
            offset = draw(AugmentConfig(flip=False, rotate=False), 0, epoch, "1", stride, 3).offset
            ((x, y, *size),) = PatchGrid(image, side, stride, offset=offset, edge="drop").boxes(np.array([0])).tolist()
            assert size == [side, side]
            seen.update((x, y))
        assert len(PatchGrid(image, side, stride, edge="drop")) == 1, "without a shift it is the image"
    assert seen == set(range(stride))


def test_the_report_says_whether_the_target_is_reached_and_beside_all_patches(benchmark: Benchmark) -> None:
    module, result = benchmark("traffic"), benchmark("result")

    def run(arm: str, seed: int, accuracy: float, changes: str = "", data: str = "traffic composites, 9 px") -> Any:
        metrics = {module.FIGURE: result.Figure(accuracy), module.LARGEST: result.Figure(0.67)}
        if arm == "m10":
            metrics |= {module.KEPT: result.Figure(0.25), module.CHANCE: result.Figure(0.01)}
        recipe = f"{module.ARMS[arm]}, 12 epochs{changes}"
        one = result.Result(data, "composite", recipe, seed, metrics, 12, 60.0, 2.0, hardware="2cpu", commit="abc")
        return replace(one, machine="a")

    text = "\n".join(
        module.report(
            [
                *(run("m10", seed, value) for seed, value in enumerate((0.94, 0.95, 0.96))),
                *(run("all", seed, value) for seed, value in enumerate((0.93, 0.96))),
                run("m10", 0, 0.80, ", train.lr=0.1"),
                run("m10", 0, 0.99, data="potholes"),
            ]
        )
    )
    assert (
        "| IPS, M = 10, 12 epochs | 0, 1, 2 | 0.950 ± 0.010 | 0.940 | 0.670 | 0.250 ± 0.000, by chance 0.010 |" in text
    )
    assert "0.950, at the target of 0.95; +0.005 beside all 192 patches, with a spread of seeds of 0.030" in text
    assert "- IPS, M = 10, 12 epochs, train.lr=0.1: 0.800, below the target of 0.95." in text
    assert "0.99" not in text, "results of other data are not in this report"


def test_all_signs_of_the_composites_are_known_and_those_of_the_annotations_among_them(
    tmp_path: Path, benchmark: Benchmark
) -> None:
    module, traffic = benchmark("traffic_reading"), benchmark("traffic")
    if not traffic.SCENES.exists():
        pytest.skip("make_traffic_scenes.py is not there")
    subprocess.run([sys.executable, traffic.SCENES, tmp_path, "--train", "8", "--test", "2"], check=True)
    images = read_traffic_signs(tmp_path, "Set2")["train"].images

    scenes = module.compose("train", 8)

    assert [scene.label for scene in scenes] == [image.label for image in images]
    assert sum(len(scene.signs) for scene in scenes) > sum(scene.label != "empty" for scene in scenes), (
        "unlabelled ones"
    )
    for scene in scenes:
        for (left, top, right, bottom), _ in scene.signs:
            assert 0 <= left < right <= scene.pixels.shape[1]
            assert 0 <= top < bottom <= scene.pixels.shape[0]
            assert scene.patch((left + right) / 2, (top + bottom) / 2).shape == (module.PATCH, module.PATCH, 3)
