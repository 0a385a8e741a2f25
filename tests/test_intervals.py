"""Intervals that hold for few images and for groups, and that never collapse where a model makes no error."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from keyhole.cli.main import main
from keyhole.tasks.evaluation import evaluate_task, format_lines
from keyhole.tasks.intervals import auroc_interval, newcombe, share_interval, wilson
from keyhole.tasks.kinds import Task

THREE = Task("x", "multiclass", ("a", "b", "c"))
DEFECT = Task("state", "binary", ("ok", "defect"))


def test_wilson_is_scipys() -> None:
    for right, n in ((0, 1), (10, 10), (3, 7), (0, 40), (399, 400)):
        known = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n, 1.959963985) == pytest.approx((known.low, known.high), abs=1e-9)


@given(st.floats(0, 1), st.integers(1, 300), st.integers(1, 300))
@settings(deadline=None, max_examples=100)
def test_newcombes_limits_solve_his_equation_and_mirror(value: float, m: int, n: int) -> None:
    low, high = newcombe(value, m, n, 1.96)
    assert 0 <= low <= value <= high <= 1
    assert low < high
    for limit in {low, high} - {0.0, 1.0}:
        big = (m + n) / 2
        spread = limit * (1 - limit) * (1 + (big - 1) * ((1 - limit) / (2 - limit) + limit / (1 + limit))) / (m * n)
        assert abs(limit - value) == pytest.approx(1.96 * np.sqrt(spread), abs=1e-6)
    other = newcombe(1 - value, m, n, 1.96)
    assert (1 - other[1], 1 - other[0]) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("m", "n", "auroc"), [(5, 5, 0.9), (5, 5, 0.99), (5, 20, 0.7), (10, 30, 0.95)])
def test_the_interval_of_auroc_covers_it_also_from_ten_images(m: int, n: int, auroc: float) -> None:
    rng, trials = np.random.default_rng(0), 400
    truth, unit = np.arange(m + n) < m, np.arange(m + n)
    apart = NormalDist().inv_cdf(auroc) * 2**0.5
    covered = 0
    for _ in range(trials):
        low, high, *_ = auroc_interval(truth, rng.normal(size=m + n) + apart * truth, unit).interval
        covered += low <= auroc <= high
        assert high - low > 0.01
    assert covered / trials >= 0.92


@pytest.mark.parametrize(("groups", "share"), [(10, 0.8), (20, 0.95)])
def test_the_interval_of_a_share_covers_it_where_images_of_a_patient_are_alike(groups: int, share: float) -> None:
    rng, trials, size, alike = np.random.default_rng(0), 400, 6, 0.6
    unit = np.repeat(np.arange(groups), size)
    covered = as_if_alone = 0
    for _ in range(trials):
        of_group = rng.beta(share * (1 - alike) / alike, (1 - share) * (1 - alike) / alike, groups)
        right = rng.random(len(unit)) < of_group[unit]
        for number, each in enumerate((unit, np.arange(len(unit)))):
            found = share_interval(right, np.ones_like(right), each)
            assert found is not None
            inside = found.low <= share <= found.high
            covered, as_if_alone = (covered + inside, as_if_alone) if number == 0 else (covered, as_if_alone + inside)
    assert covered / trials >= 0.92
    assert as_if_alone / trials < 0.85, "the images alone would promise too much"


def test_a_perfect_model_and_one_of_a_single_class_have_honest_intervals() -> None:
    n = 12
    targets = (np.arange(n) % 3)[:, None].astype(float)
    perfect = np.eye(3)[targets[:, 0].astype(int)] * 0.8 + 0.05
    constant = np.tile([0.5, 0.3, 0.2], (n, 1))
    for probability, value in ((perfect, 1.0), (constant, 1 / 3)):
        found = evaluate_task(THREE, targets, probability, rounds=200).overall
        for metric in ("accuracy", "balanced_accuracy", "auroc"):
            estimate = found[metric]
            assert estimate.low is not None
            assert estimate.high is not None
            assert estimate.high - estimate.low > 0.15, metric
            if metric != "auroc":
                assert estimate.value == pytest.approx(value)
        for metric, estimate in found.items():
            assert estimate.low is None or estimate.low < estimate.high, metric
    found = evaluate_task(THREE, targets, perfect, rounds=200).overall
    assert found["average_precision"].low is None
    assert found["average_precision"].note == "all resamples give the same value, so they show no spread"


def test_figures_of_a_binary_task_are_of_its_positive_class() -> None:
    rng = np.random.default_rng(0)
    targets = (np.arange(90) < 10)[:, None].astype(float)
    chance = rng.random(90)
    probability = np.stack([1 - chance, chance], axis=1)
    found = evaluate_task(DEFECT, targets, probability, rounds=50)
    for metric in ("average_precision", "f1", "precision", "recall"):
        assert found.overall[metric] == found.per_class["defect"][metric], metric
    assert found.overall["specificity"].value == found.per_class["ok"]["recall"].value
    assert found.overall["average_precision"].value is not None
    assert found.overall["average_precision"].value < 0.3, "a mean over both classes would be one half"
    assert found.to_json()["positive_class"] == "defect"
    assert found.to_json()["threshold"] == 0.5
    head = "state: 90 images, 10 of them defect (the positive class, above probability 0.5); 95 % intervals"
    assert format_lines([found])[0] == head


def test_the_recall_of_a_class_that_is_never_found_is_nought() -> None:
    targets = np.repeat([0.0, 1, 2], [20, 10, 4])[:, None]
    found = evaluate_task(THREE, targets, np.tile([0.5, 0.3, 0.2], (34, 1)), rounds=20)
    assert found.per_class["c"]["recall"].value == 0
    assert found.per_class["c"]["precision"].note == "no image is predicted as this class"
    assert "accuracy" not in found.per_class["c"], "0.88 of deciding c against the rest says nothing"
    assert format_lines([found])[-1] == "recall by class: a 1.000 of 20, b 0.000 of 10, c 0.000 of 4"


def test_evaluate_prints_the_positive_class_that_the_user_names_and_the_number_of_groups(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "group", "state"])
        for color in ("green", "red"):
            writer.writerows([toy / color / f"{number}.png", f"{color}{number // 3}", color] for number in range(12))
    words = "--patch.size=16 --model.encoder=small --model.width=4 --model.heads=2 --select.m=2 --run.threads=1 --train.epochs=1".split()
    words += ["--data.test=0.3", "--data.val=0.3"]
    assert main(["train", str(path), "--out", str(tmp_path / "run"), "--data.tasks", "state=binary:green", *words]) == 0
    said = capsys.readouterr().err
    assert "state (binary, positive: green)" in said
    assert "second in order" not in said, "the user has said it"
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("state: "))
    found = json.loads((tmp_path / "run" / "evaluation" / "test" / "metrics.json").read_text())["tasks"]["state"]
    assert found["positive_class"] == "green"
    groups = found["interval"]["groups"]
    assert line == (
        f"state: {found['images']} images, {found['per_class']['green']['support']} of them green "
        f"(the positive class, above probability 0.5); 95 % intervals over {groups} groups"
    )
    assert groups * 3 == found["images"]
