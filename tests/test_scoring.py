"""The figure that names the best model, and numbers that keep their digits from the CSV to predictions.csv."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import csv_rows

import keyhole
from keyhole.cli.main import main
from keyhole.nn import task_loss
from keyhole.tasks.kinds import Task
from keyhole.training.score import choose_metric, is_better, metric_value

SETTINGS = "--patch.size=16 --model.encoder=small --model.width=4 --model.heads=2 --select.m=2 --run.threads=1".split()
NAN = float("nan")


def table(path: Path, toy: Path, rows: Sequence[tuple[str, ...]], columns: Sequence[str]) -> Path:
    """A CSV over the toy images: a file, a split and the labels in each row."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split", *columns])
        writer.writerows([toy / name, *rest] for name, *rest in rows)
    return path


def files(split: str, count: int, start: int = 0) -> list[tuple[str, str, str]]:
    return [
        (f"{color}/{number}.png", split, color) for color in ("green", "red") for number in range(start, start + count)
    ]


def test_a_metric_that_validation_does_not_define_is_said_once_and_the_loss_takes_its_place(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = files("train", 4) + [row for row in files("val", 3, 4) if row[2] == "red"] + files("test", 1, 8)
    path = table(tmp_path / "t.csv", toy, rows, ["label"])
    run = tmp_path / "run"
    words = ["train", str(path), "--out", str(run), "--train.metric", "auroc", "--train.epochs=2", *SETTINGS]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.err.count("auroc is not defined by the validation labels of label") == 1
    best = json.loads((run / "best" / "model.json").read_text())
    assert best["metric"] == "loss"
    losses = [row["val.loss"] for row in keyhole.Run(run).metrics]
    assert best["value"] == min(losses)
    assert best["epoch"] == 1 + losses.index(min(losses))
    assert f"loss {min(losses):.4f} on the validation split" in said.out


def test_one_undefined_task_does_not_make_the_mean_undefined(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def second(split: str, number: int) -> str:
        return "x" if split == "val" or number % 2 else "y"

    rows = [
        (*row, second(row[1], place))
        for place, row in enumerate(files("train", 4) + files("val", 2, 4) + files("test", 1, 8))
    ]
    path = table(tmp_path / "t.csv", toy, rows, ["label", "other"])
    run = tmp_path / "run"
    words = ["train", str(path), "--out", str(run), "--train.metric", "auroc", "--train.epochs=1", *SETTINGS]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert said.count("auroc is not defined by the validation labels of other: the mean is over the other tasks") == 1
    best = json.loads((run / "best" / "model.json").read_text())
    assert best["metric"] == "auroc"
    assert best["value"] == keyhole.Run(run).metrics[0]["val.label.auroc"]


def test_the_mean_over_tasks_leaves_out_what_is_undefined() -> None:
    tasks = [Task(name, "binary", ("n", "y")) for name in "abc"] + [Task("size", "regression")]
    row = {"val.a.f1": 0.5, "val.b.f1": 1.0, "val.c.f1": NAN, "val.size.mae": 3.0}
    assert metric_value("f1", row, tasks) == 0.75
    assert metric_value("b.f1", row, tasks) == 1.0
    assert math.isnan(metric_value("c.f1", row, tasks))
    assert math.isnan(metric_value("f1", {}, tasks))


def test_an_epoch_without_the_metric_is_never_better_than_one_with_it() -> None:
    best: tuple[float, float] | None = None
    chosen = 0
    epochs = [(NAN, 0.9), (NAN, 0.8), (0.6, 2.0), (NAN, 0.1), (0.7, 3.0), (0.7, 4.0)]
    for epoch, (value, loss) in enumerate(epochs, start=1):
        if is_better("auroc", value, loss, best):
            best, chosen = (value, loss), epoch
        if epoch == 2:
            assert chosen == 2, "of undefined ones the lower loss is better"
    assert chosen == 5
    assert is_better("loss", 0.4, 0.4, (0.5, 0.5)), "lower is better"
    assert not is_better("label.mae", 0.6, 0.4, (0.5, 0.5))
    assert is_better("auroc", 0.9, 0.4, (0.9, 0.5)), "of equal ones the lower loss is better"
    assert is_better("", NAN, NAN, (0.0, 0.0)), "without validation the last epoch is the best"


def test_auto_takes_a_metric_that_the_validation_split_defines_and_of_mixed_kinds_the_loss() -> None:
    tasks = [Task("a", "binary", ("n", "y")), Task("size", "regression")]
    assert choose_metric("auto", tasks[:1], {"a": torch.tensor([[0.0], [1.0]])}) == ("auroc", [])
    assert choose_metric("auto", tasks[:1], {"a": torch.tensor([[1.0], [1.0]])}) == ("loss", [])
    assert choose_metric("auto", tasks[:1], None) == ("", [])
    val = {"a": torch.tensor([[0.0], [1.0]]), "size": torch.tensor([[1.0], [2.0]])}
    assert choose_metric("auto", tasks, val) == ("loss", [])
    assert choose_metric("auto", tasks[1:], val) == ("mae", [])
    assert choose_metric("size.r2", tasks, val) == ("size.r2", [])
    val["size"] = torch.tensor([[2.0], [2.0]])
    name, said = choose_metric("size.r2", tasks, val)
    assert name == "loss"
    assert "r2 is not defined by the validation labels of size" in said[0]


# Digits


SECONDS = 1.7e9 + np.array([0.25, 100.5, 201.75, 303.125])
"""Numbers that float32 cannot tell apart."""


def test_targets_keep_their_digits_until_they_are_standardised() -> None:
    task = Task("time", "regression")
    targets = np.concatenate([task.encode(repr(value)) for value in SECONDS.tolist()])
    np.testing.assert_array_equal(targets, SECONDS)
    task = task.fit(targets)
    assert task.std == pytest.approx(SECONDS.std())
    exact = (SECONDS - SECONDS.mean()) / SECONDS.std()
    loss = task_loss(task, torch.zeros(4, 1), torch.from_numpy(targets)[:, None])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float((exact**2).mean()), rel=1e-6)
    shown = [task.label([value]) for value in SECONDS]
    assert len(set(shown)) == 4
    assert float(shown[1]) == pytest.approx(SECONDS[1], abs=1e-2)


def test_large_targets_are_standardised_and_their_error_is_the_true_one(toy: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (name, split, repr(1.7e9 + 40.0 * (color == "red") + float(rng.normal())))
        for name, split, color in files("train", 6) + files("val", 2, 6) + files("test", 3, 8)
    ]
    path = table(tmp_path / "t.csv", toy, rows, ["time"])
    run = tmp_path / "run"
    assert main(["train", str(path), "--out", str(run), "--train.epochs=1", *SETTINGS]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert keyhole.Run(run).best["tasks"][0]["std"] == pytest.approx(20, rel=0.1)
    folder = run / "evaluation" / "test"
    found = csv_rows(folder / "predictions.csv")
    true = np.array([float(row["time.true"]) for row in found])
    predicted = np.array([float(row["time.predicted"]) for row in found])
    overall = json.loads((folder / "metrics.json").read_text())["tasks"]["time"]["overall"]
    assert overall["mae"]["value"] == pytest.approx(np.abs(true - predicted).mean(), rel=1e-12)
    assert len(set(predicted)) == len(predicted), "six digits would make all of them 1.7e+09"


def test_probabilities_in_the_table_are_those_of_the_prediction_to_the_last_digit(toy_run: Path, toy: Path) -> None:
    from keyhole.report.table import table_row

    prediction = keyhole.load(toy_run).predict(toy / "red" / "0.png")
    row = table_row(prediction)
    cells = dict(zip(row.header, row.cells, strict=True))
    for name, probability in prediction.probability["label"].items():
        assert float(cells[f"label.probability.{name}"]) == probability
