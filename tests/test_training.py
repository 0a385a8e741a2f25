"""Training: what it learns from, what it leaves alone, what it writes, and that a seed decides everything."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Say, csv_rows, settings, small_files, write_toy
from safetensors.torch import load_file, save_file

import keyhole
from keyhole.config.file import load_config
from keyhole.config.settings import AugmentConfig, Config, TrainConfig
from keyhole.errors import ImageError, NonFiniteLoss, OutputError
from keyhole.inference.evaluate import evaluate
from keyhole.runs.checkpoint import write_tensors
from keyhole.runs.run import find_run
from keyhole.training.augment import color_matrix, draw
from keyhole.training.schedule import learning_rate
from keyhole.training.setup import new_model, new_optimizer


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The run folder


def test_the_run_folder_holds_what_a_run_needs_to_be_understood(toy_run: Path) -> None:
    files = {str(path.relative_to(toy_run)) for path in toy_run.rglob("*") if path.is_file()}
    assert files >= {
        "config.yaml",
        "manifest.csv",
        "left_out.csv",
        "environment.json",
        "metrics.csv",
        "best/model.safetensors",
        "best/model.json",
        "last.safetensors",
        "predictions/train.csv",
        "predictions/val.csv",
        "log.txt",
    }
    manifest = csv_rows(toy_run / "manifest.csv")
    assert len(manifest) == 24
    assert all(len(row["sha256"]) == 64 and int(row["bytes"]) > 0 for row in manifest)
    assert {row["split"] for row in manifest} == {"train", "val", "test"}
    assert [row["epoch"] for row in csv_rows(toy_run / "metrics.csv")] == ["1", "2"]
    assert json.loads((toy_run / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    counts = {split: sum(row["split"] == split for row in manifest) for split in ("train", "val")}
    assert {split: len(csv_rows(toy_run / "predictions" / f"{split}.csv")) for split in counts} == counts
    assert not [path for path in toy_run.parent.iterdir() if path.name.startswith(".")], "nothing temporary is left"


def test_the_resolved_configuration_gives_the_same_run_again(toy_run: Path, tmp_path: Path) -> None:
    config = load_config(toy_run / "config.yaml")
    assert config.patch.size == 16
    again = keyhole.train(config.data.path, tmp_path / "again", config=toy_run / "config.yaml")
    assert same(toy_run, again.path)


def test_neither_threads_nor_cache_nor_reading_ahead_change_a_run(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    other = settings(run={"threads": 5, "ahead": 1})
    assert same(toy_run, keyhole.train({"path": toy, "cache": 0}, tmp_path / "other", **other).path)


def test_another_seed_gives_another_run(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    other = keyhole.train(toy, tmp_path / "other", **settings(train={"seed": 1}))
    assert not same(toy_run, other.path)


def test_training_leaves_the_random_state_of_its_caller_alone(toy: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    keyhole.train(toy, tmp_path / "run", **settings(train={"epochs": 1}))
    assert torch.equal(before, torch.get_rng_state())


# What is learned from


def test_it_learns(tmp_path: Path) -> None:
    data = write_toy(tmp_path / "data", count=40)
    run = keyhole.train(data, tmp_path / "run", **settings(train={"epochs": 8}, augment={"color": 0.0}))
    found = evaluate(run.path).metrics[0].overall["accuracy"].value
    assert found is not None
    assert found >= 0.9


def test_the_test_split_is_never_looked_at(tmp_path: Path) -> None:
    data = write_toy(tmp_path / "data", count=4)
    names = [f"{color}/{number}.png" for color in ("red", "green") for number in range(4)]
    splits = dict(zip(range(4), ("train", "train", "val", "test"), strict=True))
    text = "image,label,split\n" + "".join(f"{n},{n.split('/')[0]},{splits[int(n[-5])]}\n" for n in names)
    (data / "data.csv").write_text(text)
    for color in ("red", "green"):
        (data / color / "3.png").write_bytes(b"no image at all")
    run = keyhole.train(data / "data.csv", tmp_path / "run", **SMALL)
    with pytest.raises(ImageError, match=r"3\.png"):
        evaluate(run.path)


def mixed(tmp_path: Path) -> Path:
    """One task of each kind, labels missing here and there."""
    write_toy(tmp_path / "data", count=10)
    lines = ["image,color,side,marks,amount"]
    for number in range(10):
        for place, color in enumerate(("red", "green")):
            side = "" if number == 3 else ("a", "b", "c")[(number + place) % 3]
            marks = "" if number == 4 else ("x", "y", "x|y", "|")[(number + 2 * place) % 4]
            amount = "" if number == 5 else f"{number * 1.5 + place:.2f}"
            lines.append(f"{color}/{number}.png,{color},{side},{marks},{amount}")
    (tmp_path / "data" / "data.csv").write_text("\n".join(lines))
    return tmp_path / "data" / "data.csv"


def test_tasks_of_every_kind_are_learned_at_once(tmp_path: Path) -> None:
    run = keyhole.train(mixed(tmp_path), tmp_path / "run", **settings(train={"balance": "loss", "metric": "loss"}))
    kinds = {task["name"]: task["kind"] for task in run.best["tasks"]}
    assert kinds == {"color": "binary", "side": "multiclass", "marks": "multilabel", "amount": "regression"}
    assert "val.amount.mae" in run.metrics[0]
    metrics = {result.task.name: result for result in evaluate(run.path, split="train").metrics}
    assert metrics["side"].missing + metrics["side"].n == metrics["color"].n
    prediction = keyhole.load(run.path).predict(tmp_path / "data" / "red" / "0.png")
    assert set(prediction.probability["side"]) == {"a", "b", "c"}
    assert set(prediction.probability["amount"]) == {"value"}


def test_a_frozen_encoder_stays_as_it_was(toy: Path, tmp_path: Path) -> None:
    start = {name[len("model.") :]: value for name, value in started(toy, tmp_path / "a", freeze=True).items()}
    run = keyhole.train(toy, tmp_path / "b", **settings(model={"freeze": True}))
    after = load_file(run.path / "best" / "model.safetensors")
    assert all(torch.equal(start[name], after[name]) for name in after if name.startswith("encoder."))
    assert not torch.equal(start["pool.query"], after["pool.query"])


def test_exploring_holds_attention_uniform_first_and_lets_it_learn_then(toy: Path, tmp_path: Path) -> None:
    name = "model.pool.key_proj.weight"
    first = keyhole.train(toy, tmp_path / "first", **settings(train={"explore": 8}))
    assert not weights(first.path)[name].any()
    then = keyhole.train(toy, tmp_path / "then", **settings(train={"explore": 2}))
    assert weights(then.path)[name].any()
    images = len(csv_rows(then.path / "predictions" / "train.csv"))
    first_half, second_half = (row["patches"] for row in then.metrics)
    assert first_half == images * 4  # while all are drawn, nothing else is read
    assert second_half >= images * (16 + 4)


def started(toy: Path, out: Path, **model: Any) -> dict[str, torch.Tensor]:
    """The weights a run begins with: those of a run with a rate of next to nothing."""
    run = keyhole.train(toy, out, **settings(model=model, train={"lr": 1e-30, "weight_decay": 0.0, "epochs": 1}))
    return weights(run.path)


def test_given_encoder_weights_are_taken(toy: Path, tmp_path: Path) -> None:
    model = {
        name.removeprefix("model.encoder."): value
        for name, value in started(toy, tmp_path / "a", freeze=True).items()
        if name.startswith("model.encoder.")
    }
    save_file({name: value + 1 for name, value in model.items()}, tmp_path / "encoder.safetensors")
    taken = started(toy, tmp_path / "b", freeze=True, weights=str(tmp_path / "encoder.safetensors"))
    assert all(torch.equal(taken[f"model.encoder.{name}"], value + 1) for name, value in model.items())


def test_a_loss_that_is_no_number_stops_with_the_images_named(toy: Path, tmp_path: Path) -> None:
    model = {n: v for n, v in started(toy, tmp_path / "a").items() if n.startswith("model.encoder.")}
    broken = {name.removeprefix("model.encoder."): torch.full_like(v, torch.nan) if v.is_floating_point() else v
              for name, v in model.items()}  # fmt: skip
    save_file(broken, tmp_path / "encoder.safetensors")
    given = settings(model={"weights": str(tmp_path / "encoder.safetensors")})
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, step 0: the loss is nan.*(red|green)/\d+\.png"):
        keyhole.train(toy, tmp_path / "run", **given)
    assert "nan" in (tmp_path / "run" / "log.txt").read_text()


# Images that break


# Settings


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    config = Config(train=TrainConfig(epochs=10, lr=1.0, warmup=2, final_lr=0.01))
    rates = [learning_rate(config, step, 5) for step in range(50)]
    peak = rates.index(max(rates))
    assert 0 < rates[0] < rates[peak] <= 1
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in pairwise(rates[peak:]))
    assert learning_rate(config, 50, 5) == pytest.approx(0.01)


def test_the_rate_is_the_published_one() -> None:
    """lr s / W while s < W, then lr (q + 0.001 (1 - q)) with q = (1 + cos(pi (s - W) / (S - W))) / 2."""
    config = Config(train=TrainConfig(epochs=150, lr=3e-4, warmup=10, final_lr=0.001))
    steps = 47
    w, total = 10 * steps, 150 * steps
    for s in (1, 2, w - 1, w, w + 1, total // 2, total - 1, total):
        q = (1 + math.cos(math.pi * (s - w) / (total - w))) / 2
        expected = 3e-4 * s / w if s < w else 3e-4 * (q + 0.001 * (1 - q))
        assert learning_rate(config, s - 1, steps) == pytest.approx(expected, rel=1e-12)


def test_everything_decays_where_all_is_asked_for(toy_run: Path) -> None:
    config = load_config(toy_run / "config.yaml").replace(train={"decay": "all"})
    model = new_model(config, keyhole.load(toy_run).tasks, torch.device("cpu"))
    groups = new_optimizer(config, model).param_groups
    assert {group["weight_decay"] for group in groups} == {config.train.weight_decay}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_test_split_can_be_watched_and_then_chooses_nothing(toy: Path, tmp_path: Path, say: Say) -> None:
    words = "--patch.size 16 --model.encoder small --model.width 8 --model.heads 2 --select.m 4 --train.warmup 0 --run.threads 2".split()
    code, out, err = say("train", toy, *words, "--train.epochs", "3", "--train.watch", "test", "--out", "run")
    assert code == 0, err
    run = find_run(tmp_path / "run")
    assert run.best["epoch"] == 3
    assert all(0 <= row["test.label.auroc"] <= 1 and "val.loss" not in row for row in run.metrics)
    assert "the last epoch is kept" in out + err
    assert "test loss" in out + err
    code, out, err = say("train", toy, *words, "--train.watch", "test", "--train.patience", "2", "--out", "other")
    assert code == 2
    assert "train.patience (=2) would choose by the test split" in err
    code, out, err = say("train", toy, *words, "--data.test", "0", "--train.watch", "test", "--out", "other")
    assert code == 2
    assert f"train.watch test: {toy} has no test images" in err


def test_norms_and_biases_are_not_decayed_and_the_encoder_has_its_rate(toy_run: Path) -> None:
    config = load_config(toy_run / "config.yaml")
    predictor = keyhole.load(toy_run)
    model = new_model(config, predictor.tasks, torch.device("cpu"))
    groups = new_optimizer(config, model).param_groups
    for group in groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_new_model_leaves_the_random_state_of_gpus_alone(toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tasks = load_config(toy_run / "config.yaml"), keyhole.load(toy_run).tasks
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    first, second = (new_model(config, tasks, torch.device("cpu")).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded


def test_augmentation_follows_from_seed_epoch_and_image_alone() -> None:
    config = AugmentConfig()
    first = draw(config, 0, 3, "a.png", 50, 3)
    again = draw(config, 0, 3, "a.png", 50, 3)
    assert (first.view, first.offset) == (again.view, again.offset)
    assert torch.equal(first.color, again.color)  # type: ignore[arg-type]
    others = [draw(config, 0, epoch, "a.png", 50, 3) for epoch in range(20)]
    assert len({other.offset for other in others}) > 10
    assert {other.view.turns for other in others} == {0, 1, 2, 3}
    assert all(-50 < offset <= 0 for other in others for offset in other.offset)
    still = draw(AugmentConfig(flip=False, rotate=False, shift=False, color=0.0), 0, 3, "a.png", 50, 3)
    assert still == type(still)()


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_as_their_names_say(channels: int) -> None:
    identity = color_matrix(np.zeros(4), channels)
    torch.testing.assert_close(identity[:, :-1], torch.eye(channels), atol=1e-6, rtol=0)
    torch.testing.assert_close(identity[:, -1], torch.zeros(channels), atol=1e-6, rtol=0)
    grey = torch.full((channels,), 0.5)
    for factors in ([0, 0.3, 0, 0], [0, 0, 0.3, 0], [0, 0, 0, 0.3]):  # contrast, saturation, hue leave mid-grey alone
        matrix = color_matrix(np.array(factors, float), channels)
        torch.testing.assert_close(matrix[:, :-1] @ grey + matrix[:, -1], grey, atol=2e-3, rtol=0)
    bright = color_matrix(np.array([0.2, 0, 0, 0]), channels)
    torch.testing.assert_close(bright[:, :-1] @ grey + bright[:, -1], grey * 1.2)


def test_early_stopping_ends_the_learning(toy: Path, tmp_path: Path) -> None:
    still = {"epochs": 30, "patience": 2, "lr": 1e-30, "weight_decay": 0.0, "metric": "accuracy"}
    run = keyhole.train(toy, tmp_path / "run", **settings(train=still, model={"freeze": True}))
    assert len(run.metrics) < 30
    assert "stopped early" in (run.path / "log.txt").read_text()


# Files that fail


def test_a_full_disk_leaves_the_old_state(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.ones(10)}, {"step": 1})
    before = path.read_bytes()
    with small_files(20_000), pytest.raises(OutputError, match="could not be written"):
        write_tensors(path, {"a": torch.ones(100_000)}, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
