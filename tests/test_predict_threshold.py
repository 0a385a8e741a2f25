"""A probability becomes a label at the threshold that was asked for; a rule chooses it on the validation images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import csv_rows, settings, write_toy
from hypothesis import given
from hypothesis import strategies as st

import keyhole
from keyhole.cli.main import main
from keyhole.errors import ConfigError
from keyhole.inference.thresholds import advice, decisions, threshold_lines
from keyhole.tasks.kinds import Task
from keyhole.tasks.label_text import split_labels

TASK = Task("label", "binary", ("green", "red"))
shares = st.floats(0, 1)


def with_validation(run: Path, to: Path, probabilities: list[tuple[str, float]]) -> Path:
    """A copy of a run in which the validation images have these labels and probabilities of `red`."""
    run = Path(shutil.copytree(run, to))
    path = run / "predictions" / "val.csv"
    (first, *_) = csv_rows(path)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(first))
        table.writeheader()
        for number, (label, red) in enumerate(probabilities):
            said = "red" if red > 0.5 else "green"
            given = {"image": f"{number}.png", "label.true": label, "label.predicted": said}
            table.writerow(first | given | {"label.probability.green": 1 - red, "label.probability.red": red})
    return run


UNSURE = [("green", 0.1), ("green", 0.2)] * 5 + [("red", 0.4), ("red", 0.3)] * 5
"""All are below one half, and 0.25 tells them apart."""


@given(st.lists(shares, min_size=3, max_size=3), st.lists(shares, min_size=3, max_size=3))
def test_a_label_is_said_exactly_where_its_probability_is_above_its_threshold(
    probability: list[float], above: list[float]
) -> None:
    several = Task("tags", "multilabel", ("a", "b", "c"))
    said = several.label(probability, dict(zip(several.classes, above, strict=True)))
    assert split_labels(said) == [name for name, p, t in zip("abc", probability, above, strict=True) if p > t]
    (p, *_), (t, *_) = probability, above
    assert TASK.label([1 - p, p], {"red": t}) == ("red" if p > t else "green")
    assert TASK.label([1 - p, p], {}) == TASK.label([1 - p, p])


@pytest.mark.parametrize("asked", ["balanced", "sensitive", "0.05", "0.95"])
def test_every_file_of_a_prediction_has_the_label_of_the_threshold(
    asked: str, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images, out = with_validation(toy_run, tmp_path / "run", UNSURE), tmp_path / "toy", tmp_path / "out"
    write_toy(images, count=4, seed=3)
    expected = {"balanced": 0.25, "sensitive": 0.25}.get(asked) or float(asked)
    assert main(["predict", str(run), str(images), "--out", str(out), "--threshold", asked]) == 0
    told = capsys.readouterr()
    assert ("red above 0.25: sensitivity 1.000, specificity 1.000 on the validation images" in told.err) == (
        asked in ("balanced", "sensitive")
    )
    assert "note:" not in told.err
    rows = csv_rows(out / "predictions.csv")
    assert len(rows) == 8
    for row in rows:
        red = float(row["label.probability.red"])
        written = json.loads((out / row["folder"] / "prediction.json").read_text())["tasks"]["label"]
        assert written["threshold"] == {"red": pytest.approx(expected)}
        assert row["label.predicted"] == written["label"] == ("red" if red > written["threshold"]["red"] else "green")
        line = next(line for line in told.out.splitlines() if line.startswith(f"{row['image']}  "))
        assert line.split()[1] == row["label.predicted"]
        unlikely = (red > 0.5) != (row["label.predicted"] == "red")
        assert (f"(red above {expected:.3g})" in line) == unlikely, "the threshold explains it"


def test_the_balanced_threshold_is_the_one_that_evaluate_reports(toy_run: Path, tmp_path: Path) -> None:
    reported = keyhole.evaluate(toy_run, out=tmp_path / "out").operating_points["label"].points
    for point in reported[1:]:
        rule: Any = point.threshold.rule
        chosen = keyhole.load(toy_run, threshold=rule).thresholds
        assert chosen == {"label": {"red": point.threshold}}


def test_what_cannot_be_a_threshold_says_why(toy_run: Path, toy: Path, tmp_path: Path) -> None:
    def refused(run: Path, threshold: Any, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            keyhole.load(run, threshold=threshold)

    for wrong in (1.5, -0.1, "best", True, [0.3], float("nan")):
        refused(toy_run, wrong, r"^threshold .*: expected a probability from 0 to 1, balanced or sensitive$")
    red_only = with_validation(toy_run, tmp_path / "red", [("red", 0.4)] * 3)
    refused(red_only, "balanced", "none can be chosen for red, since all or none of the labelled validation images")
    damaged = with_validation(toy_run, tmp_path / "damaged", [("red", 0.4), ("green", float("nan"))])
    refused(damaged, "balanced", "damaged .a number of label is not finite.* resume RUN writes it again")
    sections: dict[str, Any] = settings(train={"epochs": 1})
    of_classes = keyhole.train({"path": toy, "tasks": ["label=multiclass"]}, tmp_path / "classes", **sections).path
    refused(of_classes, 0.2, r"^threshold 0.2: label \(multiclass\) has none\. Leave it out\.$")


def test_one_half_is_doubted_where_the_validation_images_are_told_apart_elsewhere(
    toy_run: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsure = with_validation(toy_run, tmp_path / "unsure", UNSURE)
    assert main(["predict", str(unsure), str(toy / "red" / "1.png"), "--out", str(tmp_path / "out")]) == 0
    said = (
        "note: above 0.5, 'red' finds 0 of 10 validation images and clears 10 of 10; above 0.25 it would find 10 "
        "and clear 10. To use that: --threshold balanced"
    )
    assert said in capsys.readouterr().err
    good = [("green", 0.1)] * 10 + [("red", 0.9)] * 9 + [("red", 0.4)]
    assert advice(with_validation(toy_run, tmp_path / "few", UNSURE[:16]), (TASK,)) is not None, "few will do"
    for name, rows in (("good", good), ("very few", UNSURE[:12])):
        assert advice(with_validation(toy_run, tmp_path / name, rows), (TASK,)) is None, name
    assert advice(Path(shutil.copytree(toy_run / "best", tmp_path / "model")), (TASK,)) is None


def test_scores_that_know_nothing_are_rarely_advised_on(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    rng, told = np.random.default_rng(0), 0
    header = ["image", "path", "label.true", "label.predicted", "label.probability.green", "label.probability.red"]
    for positive, negative in ((3, 3), (3, 20), (10, 10), (20, 20)) * 25:
        with (tmp_path / "predictions" / "val.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(header)
            for label in ["red"] * positive + ["green"] * negative:
                red = float(rng.uniform(0, 0.5))
                table.writerow(["i", "i", label, "green", 1 - red, red])
        told += advice(tmp_path, (TASK,)) is not None
    assert told <= 4, "of 100"


@pytest.mark.parametrize("threshold", [np.float32(0.25), np.int64(0), 1])
def test_numbers_of_any_kind_are_thresholds(threshold: Any, tmp_path: Path) -> None:
    assert type(decisions(tmp_path, (TASK,), threshold)["label"]["red"].value) is float


def test_of_several_tasks_each_class_has_its_own_threshold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tasks = (Task("tags", "multilabel", ("a", "b", "c")), TASK, Task("kind", "multiclass", ("x", "y", "z")))
    truth = rng.random((30, 2)) < 0.5
    columns = ["image", "path", "width", "height"]
    for task in tasks:
        columns += [f"{task.name}.true", f"{task.name}.predicted"]
        columns += [f"{task.name}.probability.{name}" for name in task.classes]
    (tmp_path / "predictions").mkdir()
    with (tmp_path / "predictions" / "val.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for a, b in truth.tolist():
            tags = "|".join(name for name, there in (("a", a), ("b", b)) if there) or "|"
            binary = ["red", "red", 0.1, 0.9] if a else ["green", "green", 0.9, 0.1]
            table.writerow(["i", "i", 1, 1, tags, "", 0.3 * a, 0.4 * b, 0.1, *binary, "x", "x", 0.5, 0.3, 0.2])
    chosen = decisions(tmp_path, tasks, "balanced")
    assert {name: {label: each.value for label, each in of.items()} for name, of in chosen.items()} == {
        "tags": {"a": pytest.approx(0.15), "b": pytest.approx(0.2)},
        "label": {"red": pytest.approx(0.5)},
        "kind": {},
    }, "no image is of c"
    lines = threshold_lines(tasks, chosen)
    assert lines[0].startswith("tags a above 0.15: sensitivity 1.000")
    assert (
        lines[2]
        == "tags c above 0.5: no other threshold can be chosen, since all or none of the labelled validation images are of it"
    )
    said = advice(tmp_path, tasks)
    assert said is not None
    assert said.startswith("tags, above 0.5, 'a' finds 0 of")
