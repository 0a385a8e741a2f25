"""Thresholds are chosen on the validation split, and judged on the images that are evaluated."""

from __future__ import annotations

import csv
import json
import shutil
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import csv_rows, settings
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

import keyhole
from keyhole.errors import ConfigError, RunError
from keyhole.report.read_table import read_table
from keyhole.runs.run import Run
from keyhole.tasks.kinds import Task
from keyhole.tasks.operating_point import choose_thresholds

TASK = Task("label", "binary", ("green", "red"))
images = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, np.nextafter(0.1, 1), 0.3, 0.9, 1.0])), min_size=2
)


def shares(truth: np.ndarray, called: np.ndarray) -> tuple[float, float]:
    return float((called & truth).sum() / truth.sum()), float((~called & ~truth).sum() / (~truth).sum())


@given(images)
@trying(deadline=None)
def test_no_other_threshold_is_better_by_the_rule(drawn: list[tuple[bool, float]]) -> None:
    truth, score = np.array([each for each, _ in drawn]), np.array([each for _, each in drawn])
    found = choose_thresholds(truth, score)
    if truth.all() or not truth.any():
        assert not found
        return
    balanced, sensitive = found
    for each in found:
        assert shares(truth, score > each.value) == pytest.approx((each.sensitivity, each.specificity))
    every = [shares(truth, score > value) for value in (-1.0, *score)]
    assert balanced.sensitivity is not None
    assert balanced.specificity is not None
    assert balanced.sensitivity + balanced.specificity == pytest.approx(max(map(sum, every)))
    assert sensitive.sensitivity is not None
    assert sensitive.sensitivity >= 0.95
    assert sensitive.specificity == pytest.approx(max(b for a, b in every if a >= 0.95))


def wilson(found: int, n: int) -> list[float]:
    z = 1.959963984540054
    middle, half = (found / n + z**2 / 2 / n), z * sqrt(found / n * (1 - found / n) / n + z**2 / 4 / n**2)
    return [max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))]


def test_the_operating_point_is_what_the_two_tables_say(toy_run: Path, tmp_path: Path) -> None:
    keyhole.evaluate(toy_run, out=tmp_path / "out")
    val, test = csv_rows(toy_run / "predictions" / "val.csv"), csv_rows(tmp_path / "out" / "predictions.csv")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["operating_points"]["label"]
    default, balanced, _ = found["points"]
    assert default["threshold"] == {"rule": "default", "value": 0.5, "sensitivity": None, "specificity": None}
    assert found["note"] == f"Chosen on {len(val)} validation images."

    def column(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        red = np.array([row["label.true"] == "red" for row in rows])
        return red, np.array([float(row["label.probability.red"]) for row in rows])

    truth, score = column(val)
    ranked = np.sort(np.unique(score))
    candidates = [0.0, *((ranked[:-1] + ranked[1:]) / 2), 1.0]
    sums = [sum(shares(truth, score > value)) for value in candidates]
    best = [value for value, each in zip(candidates, sums, strict=True) if each == max(sums)]
    assert balanced["threshold"]["value"] == pytest.approx(best[0], abs=1e-12) or best[0] == 0.0

    truth, score = column(test)
    called = score > balanced["threshold"]["value"]
    for name, right, of in (("sensitivity", called, truth), ("specificity", ~called, ~truth)):
        assert balanced[name]["value"] == (right & of).sum() / of.sum()
        assert [balanced[name]["low"], balanced[name]["high"]] == pytest.approx(wilson((right & of).sum(), of.sum()))


def test_a_run_without_validation_images_says_so(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    rows = csv_rows(toy_run / "manifest.csv")
    with (tmp_path / "data.csv").open("w", newline="") as file:
        table = [[row["image"], row["label"], row["split"].replace("val", "train")] for row in rows]
        csv.writer(file).writerows([["image", "label", "split"], *table])
    sections: dict[str, Any] = settings(train={"epochs": 1, "watch": "test"})
    run = keyhole.train({"path": tmp_path / "data.csv", "val": 0.0}, tmp_path / "run", **sections)
    watched = keyhole.evaluate(run.path).operating_points["label"]
    assert watched.note == "No threshold could be chosen: the run has no validation split (train.watch test)."
    assert [point.threshold.rule for point in watched.points] == ["default"]

    model = shutil.copytree(run.path / "best", tmp_path / "model")
    alone = keyhole.evaluate(model, toy, out=tmp_path / "out").operating_points["label"]
    assert "a model without its run" in alone.note


def test_a_copy_of_the_best_model_has_the_thresholds_of_its_run_and_of_no_other(
    toy: Path, toy_run: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(toy_run / "best", tmp_path / "model"))
    judged = [keyhole.evaluate(each, toy, out=tmp_path / each.name) for each in (toy_run, model)]
    of_run, of_copy = (each.operating_points["label"] for each in judged)
    assert of_copy == of_run
    assert [point.threshold.rule for point in of_copy.points] == ["default", "balanced", "sensitive"]
    for rule in ("balanced", "sensitive"):
        of_run, of_copy = (keyhole.load(each, threshold=rule).thresholds for each in (toy_run, model))
        assert of_copy == of_run != {}

    path = model / "thresholds.json"
    told = json.loads(path.read_text())
    for content, said in (
        (json.dumps(told | {"epoch": told["epoch"] + 1}), "is of another model; copy it again"),
        (json.dumps(told | {"run": "another"}), "is of another model; copy it again"),
        (path.read_text()[:-20], "is damaged .* copy it again"),
        (json.dumps(told | {"thresholds": {"label": {"red": [{"rule": "balanced"}]}}}), "is damaged .* copy it again"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=f"threshold balanced: {path} {said}. Give a probability instead"):
            keyhole.load(model, threshold="balanced")
    path.unlink()
    with pytest.raises(ConfigError, match=r"a model without its run, and no thresholds.json"):
        keyhole.load(model, threshold="balanced")
    assert keyhole.load(model, threshold=0.3).thresholds["label"]["red"].value == 0.3


def test_resuming_writes_thresholds_that_are_gone_and_those_of_a_better_model(toy_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    path = run / "best" / "thresholds.json"
    before = path.read_bytes()
    path.unlink()
    keyhole.resume(run)
    assert path.read_bytes() == before
    keyhole.resume(run, epochs=3)
    assert json.loads(path.read_text())["epoch"] == keyhole.Run(run).best["epoch"]


def test_tables_hold_labels_and_groups_and_are_read_back_as_they_were(toy_run: Path, tmp_path: Path) -> None:
    rows = csv_rows(toy_run / "manifest.csv")
    with (tmp_path / "data.csv").open("w", newline="") as file:
        table = [[row["image"], row["label"], row["split"], f"patient {i // 2}"] for i, row in enumerate(rows)]
        csv.writer(file).writerows([["image", "label", "split", "group"], *sorted(table, key=lambda row: row[2])])
    other = keyhole.evaluate(toy_run, tmp_path / "data.csv", split="val", out=tmp_path / "out")
    answers = read_table(other.path / "predictions.csv", [TASK], "Again.")
    assert answers.groups is not None
    assert set(answers.groups) <= {f"patient {i}" for i in range(len(rows))}
    assert answers.at([1]).images == answers.images[1:2]
    written = json.loads((other.path / "metrics.json").read_text())["tasks"]["label"]
    assert written["interval"]["groups"] == len(set(answers.groups))

    own = read_table(toy_run / "predictions" / "train.csv", [TASK], "Again.")
    assert own.groups is None
    assert set(own.truth["label"]) == {"green", "red"}
    assert Run(toy_run).best["tasks"][0]["classes"] == ["green", "red"]
    cut = tmp_path / "cut.csv"
    text = (toy_run / "predictions" / "train.csv").read_text()
    for damaged, said in (
        (text.replace("label.true", "label.truth"), "has no column 'label.true'. Again."),
        (text.replace("red,red", "blue,red"), r"damaged \(label: unknown class 'blue'"),
        (text[:-9], "its last row is not whole. Again."),
        (text.splitlines()[0] + "\n", "holds no predictions. Again."),
    ):
        cut.write_text(damaged)
        with pytest.raises(RunError, match=f"^{cut}: .*{said}"):
            read_table(cut, [TASK], "Again.")


def test_an_older_table_without_labels_gives_no_threshold_and_says_what_to_do(toy_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    path = run / "predictions" / "val.csv"
    path.write_text(path.read_text().replace("label.true", "label.was"))
    found = keyhole.evaluate(run).operating_points["label"]
    assert "has no column 'label.true'. Delete it; keyhole resume RUN writes it again" in found.note
    path.unlink()
    keyhole.resume(run)
    assert keyhole.evaluate(run).operating_points["label"].note.startswith("Chosen on")
