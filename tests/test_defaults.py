"""The rate, exploring and the mean of the weights follow from the encoder, in every way to start a run, and are numbers once it exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

import keyhole
from keyhole.cli.main import main
from keyhole.config.auto import settle_learning
from keyhole.config.file import recipes, resolve
from keyhole.config.settings import Config, ModelConfig, TrainConfig
from keyhole.nn import SmallEncoder

TINY = "--patch.size 16 --model.encoder small --model.width 4 --model.heads 2 --select.m 4 --train.epochs 2 --train.batch 8 --run.threads 2"


def learned_with(run: Path) -> tuple[float, float, float]:
    train: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())["train"]
    return train["lr"], train["explore"], train["average"]


def test_a_run_from_random_weights_explores_whether_or_not_init_was_called(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(toy), *TINY.split(), "--out", str(tmp_path / "flags")]) == 0
    assert "lr 0.001, explore 1, average 0.99: the encoder starts from random weights" in capsys.readouterr().err
    assert learned_with(tmp_path / "flags") == (1e-3, 1.0, 0.99)

    file = tmp_path / "keyhole.yaml"
    assert main(["init", str(toy), "--model.encoder=small", "--out", str(file)]) == 0
    assert "0.001, since the encoder starts from random weights" in " ".join(file.read_text().replace("#", "").split())
    line = ["train", "--config", str(file), *TINY.split(), "--train.warmup", "1", "--out", str(tmp_path / "init")]
    assert main(line) == 0
    assert learned_with(tmp_path / "init") == (1e-3, 1.0, 0.99)

    weights = tmp_path / "encoder.safetensors"
    save_file(SmallEncoder(width=4).state_dict(), weights)
    line = ["train", str(toy), *TINY.split(), "--model.weights", str(weights), "--out", str(tmp_path / "given")]
    assert main(line) == 0
    assert "lr 0.0003, explore 0, average 0: the encoder starts from given weights" in capsys.readouterr().err
    assert learned_with(tmp_path / "given") == (3e-4, 0.0, 0.0)

    model = {"encoder": "small", "width": 4, "heads": 2}
    settings: dict[str, Any] = {"patch": {"size": 16}, "model": model, "select": {"m": 4}, "run": {"threads": 2}}
    run = keyhole.train(toy, tmp_path / "python", train={"epochs": 2, "explore": 0.0}, **settings)
    assert learned_with(run.path) == (1e-3, 0.0, 0.99)  # what is given stays as it is given


@pytest.mark.parametrize(
    ("model", "features", "expected"),
    [
        (ModelConfig(), False, (3e-4, 0.0, 0.0)),
        (ModelConfig(encoder="small"), False, (1e-3, 15.0, 0.99)),
        (ModelConfig(encoder="resnet18"), False, (1e-3, 15.0, 0.99)),
        (ModelConfig(encoder="resnet18", pretrained=True), False, (3e-4, 0.0, 0.0)),
        (ModelConfig(weights=Path("w.safetensors")), False, (3e-4, 0.0, 0.0)),
        (ModelConfig(), True, (3e-4, 0.0, 0.0)),
    ],
)
def test_what_the_defaults_follow_from(
    model: ModelConfig, features: bool, expected: tuple[float, float, float]
) -> None:
    settled, lines = settle_learning(Config(model=model), features)
    assert (settled.train.lr, settled.train.explore, settled.train.average) == expected
    assert len(lines) == 1
    assert settle_learning(settled, features) == (settled, [])
    own = Config(model=model, train=TrainConfig(lr=0.5, explore=3, average=0.5))
    assert settle_learning(own, features) == (own, [])
    endless = Config(model=model, train=TrainConfig(lr=0.5, explore=3, average=0.5, epochs=2))
    assert "train.explore (=3) is not over within train.epochs (=2)" in settle_learning(endless, features)[1][0]


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_says_its_own_rate_and_exploring_or_follows_the_encoder(name: str) -> None:
    config = resolve(name)
    published = name in ("traffic", "megapixel-mnist", "camelyon16", "camelyon16-features")
    if published:
        assert config.train.lr in (3e-4, 1e-3)
        assert config.train.explore == 0
    else:
        settled, _ = settle_learning(config, features=False)
        assert settled.train.lr == 1e-3
        assert settled.train.explore >= config.train.epochs / 2
