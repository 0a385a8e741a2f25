"""A selection that fails says so once, with what to change; one that works says nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import settings

import keyhole
from keyhole.config.settings import AugmentConfig, Config, ModelConfig, PatchConfig, TrainConfig
from keyhole.training.doubts import Doubts

CHANCE = 2.3


def doubts(comparable: bool = True, explore: float = 0.0, patch: PatchConfig | None = None, **train: Any) -> Doubts:
    model = ModelConfig(encoder="small")
    config = Config(model=model, train=TrainConfig(explore=explore, lr=1e-3, **train), patch=patch or PatchConfig())
    return Doubts(config, {"train": CHANCE, "val": CHANCE}, comparable)


def epochs(loss: Sequence[float], **figures: float) -> list[dict[str, float | None]]:
    """Rows of metrics.csv."""
    return [
        {"epoch": number, "train.loss": each, "val.loss": each}
        | {name.replace("_", "."): x for name, x in figures.items()}
        for number, each in enumerate(loss, start=1)
    ]


BLANK = {"kept_blank": 0.95, "kept_changed": 0.1, "kept_gain": 0.0}
STILL = {"kept_blank": 0.0, "kept_changed": 0.0, "kept_gain": 0.0}
WELL = {"kept_blank": 0.1, "kept_changed": 0.1, "kept_gain": 1.0}


@pytest.mark.parametrize("figures", [BLANK, STILL])
def test_blank_or_unchanging_patches_at_chance_are_a_collapse_after_three_epochs(figures: dict[str, float]) -> None:
    (text,) = doubts().new(epochs([2.3] * 4, **figures), []).values()
    assert text.startswith("the selection has collapsed: ")
    assert ("--patch.foreground non-empty" in text) == (figures is BLANK)
    assert "--train.explore 15" in text
    assert not doubts().new(epochs([2.3] * 3, **figures), []), "the first epoch warms up"
    assert not doubts().new(epochs([2.3, 2.3, 2.3, 2.0], **figures), []), "it learns"
    assert not doubts(explore=8).new(epochs([2.3] * 6, **figures), []), "until epoch 4 all patches are random"
    assert not doubts(epochs=100).new(epochs([2.3] * 9, **figures), []), "a long run may take longer"
    assert "foreground" not in str(doubts(patch=PatchConfig(foreground="tissue")).new(epochs([2.3] * 4, **figures), []))


def test_a_loss_that_stays_at_chance_is_told_once_and_not_beside_a_collapse() -> None:
    found = doubts(epochs=20).new(epochs([2.4] * 6, **WELL), [])
    assert list(found) == ["stagnation"]
    assert (
        "after 5 epochs at the full rate the training loss is 2.400, as that of guessing (2.300)" in found["stagnation"]
    )
    assert not doubts(epochs=20).new(epochs([2.4] * 6, **WELL), ["stagnation"])
    assert not doubts(epochs=20).new(epochs([2.4] * 5, **WELL), [])
    assert not doubts(epochs=40).new(epochs([2.4] * 6, **WELL), []), "a long run may take longer"
    assert list(doubts(epochs=20).new(epochs([2.4] * 6, **BLANK), [])) == ["collapse"]
    assert not doubts(epochs=20).new(epochs([2.4] * 6, **BLANK), ["collapse"])
    assert not doubts(epochs=20).new(epochs([2.4] * 6, **STILL), ["stagnation"]), "at the end the rate is zero"
    assert list(doubts(epochs=20).new(epochs([2.4] * 6), [])) == ["stagnation"], "without a watched split"


def test_good_answers_that_any_patches_give_are_doubted() -> None:
    arbitrary = WELL | {"kept_gain": 0.01}
    (text,) = doubts().new(epochs([0.5] * 4, **arbitrary), []).values()
    assert text.startswith("random patches answer as well (loss 0.510) as the kept ones (0.500)")
    assert "--select.m 8" in text
    assert not doubts().new(epochs([0.5] * 4, **WELL), [])
    assert not doubts().new(epochs([2.0] * 4, **arbitrary), []), "the answers are not good"
    assert not doubts(comparable=False).new(epochs([0.5] * 4, **arbitrary), [])
    assert not doubts(explore=6).new(epochs([0.5] * 8, **arbitrary), []), "it learned from random patches until epoch 6"
    assert doubts(explore=6).new(epochs([0.5] * 9, **arbitrary), [])


def test_a_loss_that_rises_on_watched_images_while_that_of_training_falls_is_learning_by_heart() -> None:
    def rows(train: Sequence[float], val: Sequence[float], split: str = "val") -> list[dict[str, float | None]]:
        return [row | {f"{split}.loss": loss} for row, loss in zip(epochs(train, **WELL), val, strict=True)]

    falling, rising = [2.0, 1.5, 1.0, 0.6, 0.4, 0.3], [2.0, 1.4, 1.0, 1.3, 1.4, 1.5]
    (text,) = doubts().new(rows(falling, rising), []).values()
    assert text.startswith(
        "the training images are learned by heart: since epoch 3 the training loss fell from 1.000 to 0.300, and the "
        "validation loss rose from 1.000 to 1.500. Try: more images; "
    )
    assert text.endswith("fewer epochs: --train.epochs 3")
    assert not doubts().new(rows(falling, rising), ["by heart"])
    assert not doubts().new(rows(falling[:5], rising[:5]), []), "two epochs are few"
    assert not doubts().new(rows(falling, [2.0, 1.4, 1.0, 1.1, 1.1, 1.1]), []), "it has hardly risen"
    assert not doubts().new(rows([2.0, 1.5, 1.0, 0.9, 0.8, 0.7], rising), []), "training has hardly fallen"
    assert not doubts().new(rows(falling, [float("nan")] * 6), []), "nothing is watched"
    config = Config(train=TrainConfig(watch="test", explore=0, lr=1e-3), augment=AugmentConfig(shift=False))
    watched = Doubts(config, {"train": CHANCE, "test": CHANCE}, True)
    (text,) = watched.new(rows(falling, rising, "test"), []).values()
    assert "the test loss rose" in text
    assert "--augment.shift" in text


# Runs that really fail


@pytest.fixture(scope="module")
def data(benchmark: Callable[[str], Any]) -> Any:
    """What writes the pictures."""
    return benchmark("health")


def warnings(run: keyhole.Run) -> list[str]:
    lines = (run.path / "log.txt").read_text().splitlines()
    beginnings = "the selection", "nothing is", "random patches", "the training images"
    return [text for line in lines if (text := line.partition(" warning: ")[2]).startswith(beginnings)]


STEADY = {"flip": False, "rotate": False, "shift": False, "color": 0.0}


def test_a_run_that_keeps_black_patches_says_so_once_and_what_it_advises_helps(
    data: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten classes, random weights, no exploring, a seed whose scores prefer black: nothing can be learned from it."""
    train = {"epochs": 4, "batch": 8, "lr": 1e-3, "explore": 0.0, "seed": 6}
    sections = settings(train=train, model={"width": 4, "heads": 1}, select={"m": 2, "chunk": None}, augment=STEADY)
    black = data.canvases(tmp_path / "data")
    run = keyhole.train(black, tmp_path / "run", **sections)
    (text,) = warnings(run)
    assert text.startswith("the selection has collapsed: 100% of the kept patches have one colour, the kept patches ")
    assert capsys.readouterr().err.count(f"warning: {text}") == 1
    assert [row["kept.blank"] for row in run.metrics] == [1, 1, 1, 1]
    run = keyhole.resume(run.path, epochs=5)
    assert len(warnings(run)) == 1, "a resumed run knows what it has told"
    better = keyhole.train(black, tmp_path / "better", **sections | {"patch": {"size": 16, "foreground": "non-empty"}})
    assert not warnings(better)
    assert better.metrics[-1]["train.loss"] < run.metrics[-1]["train.loss"] - 0.1


def test_a_run_on_labels_that_the_images_do_not_show_says_that_nothing_is_learned(data: Any, tmp_path: Path) -> None:
    sections = settings(train={"epochs": 6, "lr": 3e-4}, select={"m": 2}, model={"width": 4, "heads": 2})
    (text,) = warnings(keyhole.train(data.noise(tmp_path / "data"), tmp_path / "run", **sections))
    assert text.startswith("nothing is being learned: after 5 epochs at the full rate the training loss is 1.")


def test_a_label_that_every_patch_shows_is_told_and_one_that_few_show_is_not(
    data: Any, toy: Path, tmp_path: Path
) -> None:
    """Bright and dark noise, as from two scanners; then squares of two colours in noise."""
    sections = settings(train={"epochs": 7}, select={"m": 2}, augment=STEADY)
    run = keyhole.train(data.scanners(tmp_path / "data"), tmp_path / "run", **sections)
    (text,) = warnings(run)
    assert text.startswith("random patches answer as well")
    found = keyhole.train(toy, tmp_path / "toy", **settings(train={"epochs": 7, "explore": 3.0}, augment=STEADY))
    assert found.metrics[-1]["val.loss"] < 0.3, "it learns"
    assert not warnings(found)
