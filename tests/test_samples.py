"""What a run keeps of a few images is drawn after each validation, and drawing changes nothing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, Say, settings
from PIL import Image

import keyhole
from keyhole.data.item import Item
from keyhole.images.pillow import PillowImage
from keyhole.report.sample_sheet import shown_epochs
from keyhole.tasks.kinds import Task
from keyhole.training import samples
from keyhole.training.loggers import open_loggers
from keyhole.training.samples import MAX_SAMPLES, chosen


def looks(run: Path) -> dict[str, list[dict[str, Any]]]:
    read: dict[str, list[dict[str, Any]]] = json.loads((run / "samples.json").read_text())
    return read


def test_each_validation_draws_the_same_images_with_what_it_kept(toy: Path, tmp_path: Path, say: Say) -> None:
    options = [
        "--patch.size",
        "16",
        "--model.width",
        "8",
        "--model.heads",
        "2",
        "--select.m",
        "4",
        "--train.batch",
        "4",
    ]
    said = say("train", toy, *options, "--train.epochs", "1", "--out", "run")
    assert said.code == 0
    picture = tmp_path / "run" / "samples.png"
    assert f"what the model keeps of 4 validation images is drawn after each epoch: {picture}" in said.err
    assert f"samples: {picture}" in said.out
    predictor = keyhole.load("run")
    found = looks(tmp_path / "run")
    assert len(found) == MAX_SAMPLES
    assert {name.partition("/")[0] for name in found} == {"red", "green"}
    for name, (look,) in found.items():
        prediction = predictor.predict(toy / name)
        assert look["epoch"] == 1
        assert look["boxes"] == prediction.kept.boxes.tolist()
        assert look["attention"] == pytest.approx(prediction.kept.attention["label"], abs=1e-4)
        assert look["label"] == prediction.label["label"]
    with Image.open(picture) as first:
        narrow, height = first.size
    run = keyhole.resume("run", epochs=4)
    after = looks(run.path)
    assert [look["epoch"] for look in next(iter(after.values()))] == [1, 2, 4]
    assert {name: each[:1] for name, each in after.items()} == found, "what was drawn before stays"
    with Image.open(picture) as last:
        assert last.size[1] == height
        assert last.size[0] > narrow


def test_drawing_opens_no_image_and_changes_nothing_that_is_learned(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[str] = Counter()
    original = PillowImage.__init__

    def counted(image: PillowImage, path: Path) -> None:
        opened[path.name] += 1
        original(image, path)

    monkeypatch.setattr(PillowImage, "__init__", counted)
    results = []
    for most in (MAX_SAMPLES, 0):
        monkeypatch.setattr(samples, "MAX_SAMPLES", most)
        opened.clear()
        run = keyhole.train({"path": toy, "cache": 0.0}, tmp_path / str(most), **SMALL)
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "peak_gb")} for row in run.metrics]
        results.append((dict(opened), repr(rows), (run.path / "best" / "model.safetensors").read_bytes()[-4096:]))
        assert (run.path / "samples.png").is_file() == bool(most)
    assert results[0] == results[1]


def test_an_epoch_that_is_done_again_is_drawn_once_and_damage_does_not_stop_a_run(toy: Path, tmp_path: Path) -> None:
    run = keyhole.train(toy, tmp_path / "run", **settings(train={"epochs": 1}))
    first = looks(run.path)
    again = {name: [look, {**look, "epoch": 2}] for name, (look,) in first.items()}  # killed before it was saved
    (run.path / "samples.json").write_text(json.dumps(again))
    keyhole.resume(run.path, epochs=2)
    assert {tuple(look["epoch"] for look in each) for each in looks(run.path).values()} == {(1, 2)}
    (run.path / "samples.json").write_text('{"red/1.png": [{"epoch": 1}]}')
    keyhole.resume(run.path, epochs=4)
    assert [look["epoch"] for each in looks(run.path).values() for look in each] == [4] * MAX_SAMPLES
    assert "samples.json: damaged" in (run.path / "log.txt").read_text()


def test_stored_features_have_no_patches_to_show_and_no_place_for_them(toy: Path, tmp_path: Path, say: Say) -> None:
    assert say("embed", toy, "--encoder", "lite0", "--patch.size", "16", "--out", "features").code == 0
    with_patches = keyhole.train(toy, tmp_path / "images", **settings(train={"epochs": 1}))
    without = keyhole.train(
        {"path": toy, "features": tmp_path / "features"}, tmp_path / "run", select={"m": 4}, train={"epochs": 1}
    )
    with Image.open(with_patches.samples) as wide, Image.open(without.samples) as narrow:
        assert (np.asarray(wide)[:, -40:] != 255).any()
        assert narrow.height == wide.height
        assert narrow.width < wide.width


def test_without_a_validation_there_is_no_picture(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keyhole.train({"path": toy, "val": 0.0}, tmp_path / "run", **settings(train={"epochs": 1}))
    assert "is drawn after each epoch" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "samples.png").exists()


def test_tensorboard_gets_the_picture_of_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *what: Any) -> None:
            sent.append(what)

        def add_image(self, name: str, pixels: np.ndarray, epoch: int, dataformats: str) -> None:
            assert dataformats == "HWC"
            sent.append((name, pixels.shape, epoch))

        def close(self) -> None:
            sent.append(("closed",))

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    Image.new("RGB", (30, 20)).save(tmp_path / "samples.png")
    with open_loggers(["tensorboard"], tmp_path) as log_row:
        log_row({"train.loss": 0.5}, 1, {"samples": tmp_path / "samples.png"})
        log_row({"train.loss": 0.25}, 2, {})
    assert sent == [("train.loss", 0.5, 1), ("samples", (20, 30, 3), 1), ("train.loss", 0.25, 2), ("closed",)]


def test_weights_and_biases_gets_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    session = SimpleNamespace(log=lambda row, step: sent.append((step, row)), finish=lambda: sent.append("finished"))
    fake = ModuleType("wandb")
    fake.init, fake.Image = (lambda **_: session), (lambda path: f"picture {path}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_loggers(["wandb"], tmp_path) as log_row:
        log_row({"train.loss": 0.5}, 1, {"samples": Path("a.png")})
    assert sent == [(1, {"train.loss": 0.5, "samples": "picture a.png"}), "finished"]


def test_the_images_are_of_each_label_in_turn_and_epochs_are_spread() -> None:
    items = [Item(f"{k}.png", Path(f"{k}.png"), {"kind": label}) for k, label in enumerate("aaaaabbc")]
    assert [item.name for item in chosen(items, Task("kind", "multiclass", ("a", "b", "c")))] == [
        "0.png",
        "5.png",
        "7.png",
        "1.png",
    ]
    assert shown_epochs([1, 2, 4]) == [1, 2, 4]
