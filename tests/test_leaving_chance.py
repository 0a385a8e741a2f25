"""The benchmark of leaving chance: its variants are settings, and a run is begun once, with the settings it says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import csv_rows, settings
from PIL import Image

import keyhole
from keyhole.util.files import csv_text

Benchmark = Callable[[str], Any]


def test_every_variant_is_a_setting_of_every_data_set(benchmark: Benchmark, toy: Path) -> None:
    module = benchmark("leaving_chance")
    variants = yaml.safe_load(module.VARIANTS.read_text())
    assert {each["from"] for each in variants.values()} == {"recipe", "init"}
    for name in module.SETTINGS:
        for variant in variants.values():
            if variant["from"] == "recipe":
                config = module.base(Path("manifest.csv"), name, tuple(variant.items()), None)
                assert config.train.explore == variant["train.explore"]
                longer = module.base(Path("manifest.csv"), name, tuple(variant.items()), 2 * config.train.epochs)
                assert longer.train.warmup == 2 * config.train.warmup
    init = module.base(
        toy, "demo", (("from", "init"), ("model.encoder", "small"), ("train.clip", 0.5), ("train.epochs", 12)), None
    )
    assert (init.train.clip, init.train.epochs, init.patch.size, init.augment.flip) == (0.5, 12, 16, False)


def test_the_whole_image_costs_what_init_proposes(benchmark: Benchmark, tmp_path: Path) -> None:
    module = benchmark("leaving_chance")
    variants = yaml.safe_load(module.VARIANTS.read_text())
    manifest, rng = tmp_path / "images" / "manifest.csv", np.random.default_rng(0)
    manifest.parent.mkdir()
    for number in range(16):
        Image.fromarray(rng.integers(0, 255, (640, 640), np.uint8)).save(manifest.parent / f"{number}.png")
    manifest.write_bytes(csv_text([("image", "label"), *((f"{n}.png", str(n % 2)) for n in range(16))]).encode())
    init, *resized = (
        module.base(manifest, "demo", tuple(variants[name].items()), 4)
        for name in ("init", "resized to the memory of init", "resized to the time of init")
    )
    memory, time = (config.patch.size**2 for config in resized)
    learned = init.select.m * init.patch.size**2
    assert memory == pytest.approx(learned, rel=0.5)  # sides are multiples of 32
    assert time > memory
    assert all((config.select.m, config.train.explore, config.model.encoder) == (1, 8, "small") for config in resized)


def test_leaving_chance_is_above_guessing_until_the_end(benchmark: Benchmark, toy_run: Path, tmp_path: Path) -> None:
    module = benchmark("leaving_chance")
    run = shutil.copytree(toy_run, tmp_path / "run")
    setting = replace(module.SETTINGS["demo"], chance=0.5)
    epochs = [0.9, 0.5, 1.0, 1.0]
    rows = [csv_rows(run / "metrics.csv")[0] | {"val.label.accuracy": str(each)} for each in epochs]

    def left(count: int) -> int | None:
        table = [list(rows[0]), *(list(row.values()) for row in rows[:count])]
        (run / "metrics.csv").write_bytes(csv_text(table).encode())
        found: int | None = module.epoch_of_leaving(run, setting)
        return found

    with (run / "manifest.csv").open("a") as file:  # as many images as make 0.9 differ from guessing
        last = csv_rows(run / "manifest.csv")[-1]
        file.writelines(",".join((last | {"split": "val"}).values()) + "\n" for _ in range(100))
    assert [left(count) for count in (1, 2, 3, 4)] == [1, None, 3, 3]


def test_a_run_is_trained_once_and_not_taken_for_one_with_other_settings(
    benchmark: Benchmark, toy: Path, tmp_path: Path
) -> None:
    training, run = benchmark("training"), tmp_path / "run"
    config = keyhole.Config().replace(data={"path": str(toy)}, **settings(train={"epochs": 1}))
    training.train_and_evaluate(config, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert run / "evaluation" / "test" / "metrics.json" in before
    training.train_and_evaluate(config, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    with pytest.raises(SystemExit, match=r"begun with another train\.lr"):
        training.train_and_evaluate(config.replace(train={"lr": 0.5}), run)
    failed: list[str] = []
    with training.going_on(failed):
        training.train_and_evaluate(config.replace(data={"path": str(tmp_path / "none")}), tmp_path / "other")
    assert "keyhole train ended with 2" in failed[0]
    assert "none" in (tmp_path / "other.log").read_text()
