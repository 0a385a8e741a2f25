"""A run that learned nothing says so, and one that learned something does not."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import keyhole
from keyhole.cli.main import main
from keyhole.config.settings import Config, ModelConfig, TrainConfig
from keyhole.runs.run import learned_nothing
from keyhole.tasks.kinds import Task
from keyhole.tasks.learning import Learning, TaskLearning, judge_task, unevenness, what_to_try

PAIR, THREE = Task("x", "binary", ("n", "y")), Task("x", "multiclass", ("a", "b", "c"))
TAGS, SIZE = Task("x", "multilabel", ("p", "q")), Task("x", "regression", mean=50.0, std=10.0)


def answers(k: int, n: int, signal: float, noise: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Targets and probabilities of a model that knows as much as `signal` is above `noise`."""
    rng, y = np.random.default_rng(seed), np.arange(n) % k
    logits = rng.normal(size=(n, k)) * noise
    logits[np.arange(n), y] += signal
    power = np.exp(logits - logits.max(axis=1, keepdims=True))
    return y[:, None].astype(float), power / power.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("task", "n"), [(PAIR, 6), (PAIR, 18), (THREE, 18), (THREE, 60)])
def test_answers_that_know_nothing_are_told_and_others_are_not(task: Task, n: int) -> None:
    k, trials = len(task.classes), 100

    def told(signal: float, noise: float) -> float:
        verdicts = [judge_task(task, *answers(k, n, signal, noise, seed), [1.0] * n) for seed in range(trials)]
        return sum(verdict.learned is False for verdict in verdicts) / trials

    assert told(0, 0.1) > 0.75
    assert told(0, 2) > 0.5
    assert told(2, 0.7) == 0
    # right in most cases and much too sure, so that its loss is worse than guessing; 6 images may all be the others
    assert told(7.5, 5) < (0.05 if n > 6 else 0.2)


@pytest.mark.parametrize("n", [2, 4, 8, 30])
@pytest.mark.parametrize("task", [PAIR, THREE, SIZE])
def test_chance_is_rarely_called_better_than_guessing_however_few_the_images(task: Task, n: int) -> None:
    def learned(seed: int) -> bool | None:
        if task is SIZE:
            rng = np.random.default_rng(seed)
            return judge_task(task, rng.normal(size=(n, 1)), rng.normal(size=(n, 1)), [1.0] * n).learned
        return judge_task(task, *answers(len(task.classes), n, 0, 0.5, seed), [1.0] * n).learned

    assert sum(learned(seed) is True for seed in range(100)) <= 10


def test_one_pair_in_the_right_order_tells_nothing() -> None:
    found = judge_task(PAIR, np.array([[0.0], [1.0]]), np.array([[0.2, 0.8], [0.1, 0.9]]), [1.0] * 2)
    assert found.learned is None
    known = judge_task(PAIR, *answers(2, 30, 0, 2, 0), [1.0] * 30)
    assert known.learned is False
    assert Learning("the 2 test images", (found,)).learned is None
    assert Learning("the 2 test images", (found, known)).learned is None, "one task may have learned"


def test_a_model_that_ranks_well_is_not_called_ignorant_though_it_says_one_class_for_all() -> None:
    targets = (np.arange(60) < 6)[:, None].astype(float)
    p = np.linspace(0.45, 0.05, 60)
    found = judge_task(PAIR, targets, np.stack([1 - p, p], axis=1), [1.0] * 60)
    assert found.learned
    assert found.only == "n"
    lines = Learning("the 60 validation images", (found,)).lines(Config())
    assert lines[0] == "warning: on the 60 validation images, it says n for all 60 images"
    assert "balance loss" in lines[-1]


def test_labels_that_cannot_tell_give_no_verdict() -> None:
    _, p = answers(2, 8, 0, 0.1, 0)
    even = [0.01] * 8
    for targets in (np.zeros((8, 1)), np.full((8, 1), np.nan)):
        found = judge_task(PAIR, targets, p, even)
        assert (found.learned, found.only, found.even) == (None, None, True)
    one_patient = judge_task(PAIR, (np.arange(8) % 2)[:, None].astype(float), p, even, ["a"] * 8)
    assert one_patient.learned is None
    assert judge_task(SIZE, np.ones((8, 1)), np.ones((8, 1)), even).learned is None


def test_attention_is_equal_only_if_it_is_for_every_image() -> None:
    flat, peak = np.full(4, 0.25, np.float32), np.array([0.7, 0.1, 0.1, 0.1], np.float32)
    assert unevenness({"x": flat, "y": peak, "z": np.ones(1, np.float32)}) == pytest.approx(
        {"x": 0.0, "y": 1.8, "z": -1.0}
    )
    targets, p = answers(2, 6, 2, 0.7, 0)
    assert judge_task(PAIR, targets, p, [0.0] * 6).even
    assert judge_task(PAIR, targets, p, [0.0] * 5 + [1.8]).even is False
    assert judge_task(PAIR, targets, p, [-1.0] * 6).even is None, "a single patch has no choice"


def test_numbers_and_labels_are_judged_too() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(50, 10, (30, 1))
    even = [1.0] * 30
    constant = judge_task(SIZE, targets, np.full((30, 1), 50.0), even)
    assert constant.learned is False
    assert constant.only == "nearly the same number (50)"
    assert judge_task(SIZE, targets, rng.normal(50, 10, (30, 1)), even).learned is False
    assert judge_task(SIZE, targets, targets + rng.normal(0, 3, (30, 1)), even).learned
    assert judge_task(SIZE, targets, 500 + targets, even).learned, "off by a constant, but it follows the target"
    labels = rng.integers(0, 2, (30, 2)).astype(float)
    assert judge_task(TAGS, labels, np.full((30, 2), 0.5), even).learned is False
    assert judge_task(TAGS, labels, 0.2 + 0.6 * labels, even).learned


RANDOM = ModelConfig(encoder="small")


def test_what_to_try_fits_the_settings() -> None:
    nothing = Learning("", (TaskLearning("x", 9, 1.1, 1.0, False, None, True),))
    fresh = "; ".join(what_to_try(nothing, Config(model=RANDOM, train=TrainConfig(lr=1e-4, explore=0))))
    assert "--train.explore" in fresh
    assert "--train.lr 0.001" in fresh
    assert "--model.encoder lite0" in fresh
    assert "--select.m 64" in fresh
    assert "--train.lr" not in "; ".join(what_to_try(nothing, Config(model=RANDOM))), "the default already is that rate"
    told = Config(model=ModelConfig(encoder="resnet18", pretrained=True), train=TrainConfig(lr=1e-3))
    ready = "; ".join(what_to_try(nothing, told))
    assert "--train.explore 10, so that attention learns from patches that it did not choose" in ready
    assert "another rate than --train.lr 0.001" in ready
    assert "a --patch.size" in ready
    explored = told.replace(train={"explore": 10.0})
    assert "--train.explore" not in "; ".join(what_to_try(nothing, explored))
    started = told.replace(model={"start": "runs/one"})  # exploring would forget its attention
    assert "--train.explore" not in "; ".join(what_to_try(nothing, started))
    sharp = Learning("", (TaskLearning("x", 9, 1.1, 1.0, False, None, False),))
    assert "--train.explore" not in "; ".join(what_to_try(sharp, told))
    features = "; ".join(what_to_try(nothing, Config(model=ModelConfig(feature_width=8))))
    assert "explore" not in features
    assert "--patch.size" not in features


# On the path that production takes


def noise(folder: Path) -> Path:
    """Photographs that say nothing of their class."""
    import PIL.Image

    rng = np.random.default_rng(0)
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label"])
        for number in range(36):
            pixels = rng.integers(0, 255, (32, 32, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", "abc"[number % 3]])
    return folder / "t.csv"


def test_a_run_that_learned_nothing_says_so_at_its_end_in_evaluate_and_in_predict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--patch.size=16 --model.encoder=small --model.width=4 --model.heads=2 --select.m=2 --run.threads=1 --train.epochs=1".split()
    words += ["--data.val=0.3", "--data.test=0.3", "--train.explore=4"]
    run = tmp_path / "run"
    assert main(["train", str(noise(tmp_path)), "--out", str(run), *words]) == 0
    out = capsys.readouterr().out.splitlines()
    warning = "warning: the model has learned nothing that shows on the {} images"
    count = (run / "predictions" / "val.csv").read_text().count("\n") - 1
    assert warning.format(f"{count} validation") in out
    assert out[-1].startswith("try next: ")
    assert "explore" not in out[-1]
    facts = out[-2]
    assert "guessing gives 1.0" in facts
    assert "it gives all kept patches of an image the same attention" in facts, "exploring holds it uniform at first"
    assert json.loads((run / "learning.json").read_text())["learned"] is False
    assert warning.format(f"{count} validation") in (run / "log.txt").read_text()

    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    assert warning.format(f"{found['tasks']['label']['images']} test") in out
    assert out[-1].startswith("try next: ")
    assert found["learning"]["learned"] is False

    image = tmp_path / "0.png"
    assert main(["predict", str(run), str(image), "--out", str(tmp_path / "answers")]) == 0
    told = capsys.readouterr().err
    assert warning.format(f"{count} validation") in told.splitlines()
    assert "--threshold" not in told
    written = (run / "learning.json").read_text()
    (run / "learning.json").write_text(json.dumps(json.loads(written) | {"epoch": 7}))
    assert learned_nothing(run) is None, "a resumed run has a later model"
    (run / "learning.json").write_text(written)

    assert main(["resume", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("try next: ")


def test_a_run_that_learned_says_nothing_of_the_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red and blue photographs, and one number of either: nothing is easier."""
    import PIL.Image

    rng = np.random.default_rng(0)
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "size"])
        for number in range(32):
            pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
            pixels[..., 2 * (number % 2)] += 180
            PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            writer.writerow([f"{number}.png", "ab"[number % 2], number % 2 * 10 + round(rng.random(), 3)])
    words = "--patch.size=16 --model.encoder=small --model.width=8 --model.heads=2 --select.m=4 --run.threads=1 --train.lr=1e-2".split()
    words += ["--train.epochs=10", "--train.batch=4", "--data.val=0.25", "--data.test=0.25", f"--data.root={tmp_path}"]
    assert main(["train", str(tmp_path / "t.csv"), "--out", str(tmp_path / "run"), *words]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "learned nothing" not in out
    assert "guessing" not in out
    assert keyhole.Run(tmp_path / "run").learning["learned"] is True
