"""Metrics equal scikit-learn's under any weights, a weighting equals the resampled data, intervals cover."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from keyhole.errors import RunError
from keyhole.report.evaluation_page import GLOSSARY
from keyhole.tasks.evaluation import evaluate_task, evaluation_json, format_lines, point_metrics
from keyhole.tasks.intervals import bootstrap
from keyhole.tasks.kinds import Task
from keyhole.tasks.metrics import METRICS, metric_values

DIGIT = Task("digit", "multiclass", ("a", "b", "c"))
TUMOUR = Task("tumour", "binary", ("no", "yes"))
TAGS = Task("tags", "multilabel", ("x", "y", "z"))
AGE = Task("age", "regression")
TASKS = (DIGIT, TUMOUR, TAGS, AGE)

seeds = st.integers(0, 2**32 - 1)


def made(task: Task, n: int, seed: int, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, probabilities (coarse, so that many are equal) and whole-number weights, each class with weight."""
    rng = np.random.default_rng(seed)
    k = len(task.classes)
    if task.kind == "regression":
        targets = rng.normal(50, 10, (n, 1))
        probabilities = targets + rng.normal(0, 5, (n, 1))
    elif task.kind == "multilabel":
        targets = rng.integers(0, 2, (n, k)).astype(float)
        targets[0], targets[1] = 0, 1
        probabilities = np.clip(targets * 0.3 + rng.random((n, k)) * 0.7, 0, 1)
    else:
        targets = rng.integers(0, k, (n, 1)).astype(float)
        targets[:k, 0] = np.arange(k)
        probabilities = rng.dirichlet(np.ones(k), n) * 0.6 + 0.4 * np.eye(k)[rng.integers(0, k, n)]
    if ties and task.kind != "regression":
        probabilities = np.round(probabilities * 8) / 8
    weights = rng.integers(0, 4, n).astype(float)
    weights[: max(k, 2)] += 1
    return targets, probabilities, weights


def decided(task: Task, p: np.ndarray) -> np.ndarray:
    return p > 0.5 if task.kind == "multilabel" else np.eye(len(task.classes), dtype=bool)[p.argmax(axis=1)]


def truth(task: Task, targets: np.ndarray) -> np.ndarray:
    return (
        targets > 0.5 if task.kind == "multilabel" else np.eye(len(task.classes), dtype=bool)[targets[:, 0].astype(int)]
    )


def ece_by_loop(certainty: np.ndarray, right: np.ndarray, weights: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for low, high in zip(np.arange(bins) / bins, np.arange(1, bins + 1) / bins, strict=True):
        inside = (certainty > low) & (certainty <= high)
        if weights[inside].sum() > 0:
            accuracy = np.average(right[inside], weights=weights[inside])
            confidence = np.average(certainty[inside], weights=weights[inside])
            total += weights[inside].sum() / weights.sum() * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("task", TASKS[:3], ids=lambda task: task.kind)
@given(seed=seeds, n=st.integers(4, 60))
@settings(deadline=None, max_examples=40)
def test_class_metrics_equal_scikit_learns_under_weights(task: Task, seed: int, n: int) -> None:
    targets, p, w = made(task, n, seed)
    got = {key: float(value[0]) for key, value in metric_values(task, task.measure(targets, p), w[None]).items()}
    y, d = truth(task, targets), decided(task, p)
    expected = {}
    for c, name in enumerate(task.classes):
        expected[name, "recall"] = sk.recall_score(y[:, c], d[:, c], sample_weight=w)
        none = ~(d[:, c] & (w > 0)).any()
        expected[name, "precision"] = math.nan if none else sk.precision_score(y[:, c], d[:, c], sample_weight=w)
        if task.kind == "multilabel":
            expected[name, "accuracy"] = sk.accuracy_score(y[:, c], d[:, c], sample_weight=w)
            expected[name, "balanced_accuracy"] = sk.balanced_accuracy_score(y[:, c], d[:, c], sample_weight=w)
            expected[name, "specificity"] = sk.recall_score(~y[:, c], ~d[:, c], sample_weight=w)
        expected[name, "auroc"] = sk.roc_auc_score(y[:, c], p[:, c], sample_weight=w)
        expected[name, "average_precision"] = sk.average_precision_score(y[:, c], p[:, c], sample_weight=w)
        expected[name, "f1"] = sk.f1_score(y[:, c], d[:, c], sample_weight=w)
        expected[name, "ece"] = ece_by_loop(np.where(d[:, c], p[:, c], 1 - p[:, c]), y[:, c] == d[:, c], w)
    for metric in ("auroc", "average_precision", "f1"):
        expected[None, metric] = np.mean([expected[name, metric] for name in task.classes])
    if task.kind == "binary":
        for metric in ("average_precision", "f1", "precision", "recall"):
            expected[None, metric] = expected["yes", metric]
        expected[None, "specificity"] = expected["no", "recall"]
    if task.kind == "multilabel":
        expected[None, "accuracy"] = sk.accuracy_score(y, d, sample_weight=w)
        for metric in ("balanced_accuracy", "ece"):
            expected[None, metric] = np.mean([expected[name, metric] for name in task.classes])
    else:
        t, chosen = targets[:, 0], p.argmax(axis=1)
        expected[None, "accuracy"] = sk.accuracy_score(t, chosen, sample_weight=w)
        expected[None, "balanced_accuracy"] = np.mean(
            sk.recall_score(t, chosen, sample_weight=w, average=None, labels=range(len(task.classes)))
        )
        expected[None, "ece"] = ece_by_loop(p.max(axis=1), t == chosen, w)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-9, nan_ok=True), key


@given(seed=seeds, n=st.integers(2, 60))
@settings(deadline=None, max_examples=40)
def test_regression_metrics_equal_scikit_learns_under_weights(seed: int, n: int) -> None:
    targets, values, w = made(AGE, n, seed)
    got = metric_values(AGE, AGE.measure(targets, values), w[None])
    assert got[None, "mae"][0] == pytest.approx(sk.mean_absolute_error(targets, values, sample_weight=w), abs=1e-9)
    assert got[None, "r2"][0] == pytest.approx(sk.r2_score(targets, values, sample_weight=w), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@given(seed=seeds)
@settings(deadline=None, max_examples=15)
def test_a_weighting_is_the_data_drawn_so_often(task: Task, seed: int) -> None:
    targets, p, w = made(task, 30, seed)
    drawn = np.repeat(np.arange(30), w.astype(int))
    resampled = point_metrics(task, targets[drawn], p[drawn])
    weighted = metric_values(task, task.measure(targets, p), w[None])
    for metric, value in resampled.items():
        assert weighted[None, metric][0] == pytest.approx(value, abs=1e-9), metric


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_metrics_do_not_depend_on_the_order_of_images_and_missing_labels_do_not_count(task: Task) -> None:
    targets, p, _ = made(task, 50, 1)
    order = np.random.default_rng(0).permutation(50)
    assert point_metrics(task, targets[order], p[order]) == pytest.approx(point_metrics(task, targets, p))
    holes = np.concatenate([targets, np.full((7, targets.shape[1]), np.nan)])
    more = np.concatenate([p, np.full((7, p.shape[1]), np.nan)])
    result = evaluate_task(task, holes, more, rounds=20)
    assert (result.n, result.missing) == (50, 7)
    expected = evaluate_task(task, targets, p, rounds=20)
    assert result.overall == expected.overall
    assert result.per_class == expected.per_class


def test_the_95_percent_interval_of_accuracy_is_the_binomial_one() -> None:
    n, share = 400, 0.8
    targets = np.zeros((n, 1))
    targets[: n // 2] = 1
    right = np.arange(n) % 5 != 0
    p = np.eye(2)[np.where(right, targets[:, 0], 1 - targets[:, 0]).astype(int)]
    accuracy = evaluate_task(TUMOUR, targets, p, seed=3, rounds=4000).overall["accuracy"]
    assert accuracy.value == pytest.approx(share)
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    assert accuracy.low == pytest.approx(share - half, abs=0.004)
    assert accuracy.high == pytest.approx(share + half, abs=0.004)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        right = rng.random(150) < 0.7
        targets = rng.integers(0, 2, (150, 1)).astype(float)
        p = np.eye(2)[np.where(right, targets[:, 0], 1 - targets[:, 0]).astype(int)]
        measure = TUMOUR.measure(targets, p)
        estimate = bootstrap(lambda w, m=measure: {"accuracy": m(w).share_right}, 150, seed=trial, rounds=200)
        low, high = estimate["accuracy"].low, estimate["accuracy"].high
        assert low is not None
        assert high is not None
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_groups_are_drawn_whole() -> None:
    # Ten copies of each patient say no more than one: the interval is that of 30 images, not of 300.
    targets, p, _ = made(DIGIT, 30, 2)
    many = evaluate_task(DIGIT, targets.repeat(10, 0), p.repeat(10, 0), [f"p{i // 10}" for i in range(300)], rounds=500)
    few = evaluate_task(DIGIT, targets, p, rounds=500)
    assert many.groups == 30
    for metric, estimate in few.overall.items():
        got = many.overall[metric]
        limits = (got.value, got.low, got.high), (estimate.value, estimate.low, estimate.high)
        if estimate.method == "bootstrap":
            assert limits[0] == pytest.approx(limits[1]), metric
        else:  # the spread between 30 groups is an estimate, which widens the interval a little
            assert limits[0] == pytest.approx(limits[1], abs=0.03), metric
            assert got.low < estimate.low, metric  # type: ignore[operator]
    free = evaluate_task(DIGIT, targets.repeat(10, 0), p.repeat(10, 0), rounds=500).overall["accuracy"]
    grouped = many.overall["accuracy"]
    assert free.high - free.low < 0.6 * (grouped.high - grouped.low)  # type: ignore[operator]


def test_images_of_no_group_stand_alone() -> None:
    targets, p, _ = made(DIGIT, 30, 2)
    assert evaluate_task(DIGIT, targets, p, [None] * 30).groups is None
    assert evaluate_task(DIGIT, targets, p, ["a", "a", ""] + [None] * 27, rounds=5).groups == 29


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others() -> None:
    targets, p, _ = made(DIGIT, 40, 0)
    first, again, other = (evaluate_task(DIGIT, targets, p, seed=seed).overall for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_what_is_undefined_is_none_with_a_reason() -> None:
    p = np.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    result = evaluate_task(TUMOUR, np.zeros((3, 1)), p, rounds=50)
    assert result.overall["accuracy"].value == pytest.approx(2 / 3)
    for metric in ("auroc", "average_precision", "balanced_accuracy"):
        estimate = result.overall[metric]
        assert (estimate.value, estimate.low) == (None, None)
        assert estimate.note == "no class that only some of the images have"
    assert result.per_class["yes"]["f1"].note == "no image is of this class"
    assert result.per_class["no"]["auroc"].note == "all images are of this class"
    assert math.isnan(point_metrics(TUMOUR, np.zeros((3, 1)), p)["auroc"])
    flat = evaluate_task(AGE, np.full((4, 1), 3.3), np.ones((4, 1)), rounds=50).overall
    assert flat["r2"].note == "all values are equal"
    assert flat["mae"].value == pytest.approx(2.3)


def test_a_class_that_no_image_has_is_left_out_of_the_mean_and_named() -> None:
    targets, p, _ = made(DIGIT, 40, 0)
    targets[targets == 2] = 1
    auroc = evaluate_task(DIGIT, targets, p, rounds=50)
    expected = np.mean([sk.roc_auc_score(targets[:, 0] == c, p[:, c]) for c in (0, 1)])
    assert auroc.overall["auroc"].value == pytest.approx(expected)
    assert auroc.overall["auroc"].note == "mean over 2 of 3 classes, without c"


def test_rounds_without_a_class_are_dropped_counted_and_too_many_leave_no_interval() -> None:
    targets, p, _ = made(TUMOUR, 60, 0)
    targets[:] = 0
    targets[0] = 1
    lone = evaluate_task(TUMOUR, targets, p, rounds=400).overall["auroc"]
    assert lone.low is not None, "AUROC needs no resamples"
    assert lone.method == "Newcombe"
    precision = evaluate_task(TUMOUR, targets, p, rounds=400).overall["average_precision"]
    assert precision.low is not None
    assert precision.note is not None
    lost = int(precision.note.split("undefined in ")[1].split()[0])
    assert lost == pytest.approx(400 * math.exp(-1), abs=40)
    three = Task("x", "multiclass", tuple("abcd"))
    targets[:4, 0] = [0, 1, 2, 3]
    scarce = evaluate_task(three, targets, np.random.default_rng(0).dirichlet(np.ones(4), 60), rounds=200)
    assert scarce.overall["average_precision"].value is not None
    assert scarce.overall["average_precision"].low is None
    assert "of 200 resamples" in str(scarce.overall["average_precision"].note)
    assert scarce.overall["accuracy"].low is not None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
@pytest.mark.parametrize("n", [0, 1])
def test_no_or_one_image_is_no_crash(task: Task, n: int) -> None:
    targets, p, _ = made(task, 5, 0)
    result = evaluate_task(task, targets[:n], p[:n], rounds=10)
    point_metrics(task, targets[:n], p[:n])
    assert result.n == n
    for estimate in result.overall.values():
        assert estimate.low is None
        assert estimate.note


@pytest.mark.parametrize("task", TASKS[:2], ids=lambda task: task.kind)
def test_confusion_counts_every_image_once(task: Task) -> None:
    targets, p, _ = made(task, 50, 4)
    result = evaluate_task(task, targets, p, rounds=5)
    assert result.confusion is not None
    np.testing.assert_array_equal(result.confusion, sk.confusion_matrix(targets[:, 0], p.argmax(axis=1)))
    assert result.confusion.sum(axis=1).tolist() == list(result.support.values())


def test_multilabel_confusion_is_one_table_per_label() -> None:
    targets, p, _ = made(TAGS, 50, 4)
    confusion = evaluate_task(TAGS, targets, p, rounds=5).confusion
    np.testing.assert_array_equal(confusion, sk.multilabel_confusion_matrix(targets > 0.5, p > 0.5))


def test_evaluation_is_strict_json_and_lines_for_people() -> None:
    results = [evaluate_task(task, *made(task, 30, 0)[:2], rounds=20) for task in TASKS]
    results.append(evaluate_task(Task("empty", "binary", ("0", "1")), np.full((2, 1), np.nan), np.ones((2, 2)) / 2))
    data = json.loads(json.dumps(evaluation_json(results, split="test"), allow_nan=False))
    assert data["split"] == "test"
    assert data["tasks"]["empty"]["overall"]["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
        "note": "no image has a label",
        "method": None,
    }
    assert data["tasks"]["digit"]["per_class"]["a"].keys() == {
        "support", "recall", "precision", "f1", "auroc", "average_precision", "ece",
    }  # fmt: skip
    assert set(data["tasks"]["age"]["overall"]) == {"mae", "r2"}
    lines = format_lines(results[:1])
    value = results[0].overall["accuracy"]
    assert lines[0] == "digit: 30 images; 95 % intervals"
    assert lines[1] == f"accuracy {value.value:.3f} [{value.low:.3f} {value.high:.3f}]"
    assert format_lines(results)[-1] == "empty ece undefined (no image has a label)"


def test_output_that_is_no_number_names_the_task() -> None:
    targets, p, _ = made(DIGIT, 10, 0)
    p[3] = np.nan
    with pytest.raises(RunError, match="digit: the output of the model is NaN for 1 of 10 images"):
        point_metrics(DIGIT, targets, p)


def test_the_report_explains_every_metric() -> None:
    assert {metric.name for metric in METRICS} <= GLOSSARY.keys()
