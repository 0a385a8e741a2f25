"""Runs side by side: differences on the same images, images that changed, settings that differ."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Say, csv_rows, settings
from test_report import checked, figures

import keyhole
from keyhole.errors import RunError
from keyhole.report.page import METRIC_NAMES
from keyhole.tasks.kinds import Task
from keyhole.tasks.paired import compare_task


@pytest.fixture(scope="module")
def runs(toy: Path, toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two evaluated runs on the same splits; the second learned for an epoch, with another rate."""
    folder = tmp_path_factory.mktemp("pair")
    first = Path(shutil.copytree(toy_run, folder / "first", ignore=shutil.ignore_patterns("evaluation")))
    second = keyhole.train(toy, folder / "second", **settings(train={"epochs": 1, "lr": 1e-3}, select={"m": 2})).path
    for run in (first, second):
        keyhole.evaluate(run)
    return first, second


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / f"copy of {run.name}"))


def test_a_difference_is_that_of_the_same_images_in_every_resample(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = keyhole.compare(runs, out=tmp_path / "out")
    tables = [csv_rows(run / "evaluation" / "test" / "predictions.csv") for run in runs]
    right = np.array([[row["label.predicted"] == row["label.true"] for row in table] for table in tables], float)
    rng, n = np.random.default_rng(0), right.shape[1]
    apart = right[1] - right[0]
    drawn = [np.bincount(rng.integers(0, n, n), minlength=n) @ apart / n for _ in range(1000)]
    (accuracy,) = [each for each in found.metrics if each.metric == "accuracy"]
    (difference,) = accuracy.differences
    assert difference.value == pytest.approx(apart.mean())
    if np.ptp(drawn) > 0:
        assert [difference.low, difference.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]))
    for run, value in zip(runs, accuracy.values, strict=True):
        written = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())["tasks"]["label"]["overall"]
        assert [value.value, value.low, value.high] == [written["accuracy"][name] for name in ("value", "low", "high")]


def test_pairing_narrows_the_interval_and_groups_widen_it() -> None:
    rng = np.random.default_rng(0)
    task = Task("tumor", "binary", ("no", "yes"))
    truth = np.repeat(rng.integers(0, 2, 40), 5)  # five images of a patient are alike
    hard = np.repeat(rng.random(40) < 0.3, 5)
    luck = rng.random(200) < 0.4

    def probability(wrong: np.ndarray) -> np.ndarray:
        positive = np.where(truth == wrong, 0.2, 0.8)
        return np.stack([1 - positive, positive], axis=1)

    pair = [probability(hard), probability(hard & ~luck)]
    groups = [str(i // 5) for i in range(200)]
    paired = compare_task(task, truth[:, None].astype(float), pair)[0]
    grouped = compare_task(task, truth[:, None].astype(float), pair, groups)[0]
    (apart,), (wide,) = paired.differences, grouped.differences
    assert apart.low is not None
    assert apart.high is not None
    assert paired.verdict(0) == "better"
    lowest, highest = (
        getattr(paired.values[1], end) - getattr(paired.values[0], other)
        for end, other in (("low", "high"), ("high", "low"))
    )
    assert lowest < apart.low < apart.high < highest
    assert wide.low is not None
    assert wide.low <= apart.low
    assert len(compare_task(task, np.full((200, 1), np.nan), pair)) == 0


def test_a_run_beside_itself_differs_in_nothing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = keyhole.compare([runs[0], copied(runs[0], tmp_path), runs[0]], out=tmp_path / "out")
    assert all(
        difference.value == 0
        for each in found.metrics
        for difference in each.differences
        if each.values[0].value is not None
    )
    assert not found.settings
    assert not found.cases["label"]
    assert len(set(found.names)) == 3
    page = checked((found.path / "compare.html").read_text())
    assert "0 of" in page.text
    assert "No difference is larger than chance explains." in page.text


def test_the_command_writes_a_page_and_tables_and_says_the_same(runs: tuple[Path, Path], say: Say) -> None:
    first, second = runs
    out = say("compare", first, second)
    assert out.code == 0
    folder = Path("comparison-first-second")
    rows = csv_rows(folder / "compare.csv")
    assert {row["run"] for row in rows} == {"first", "second"}
    assert not any(row["minus_first"] for row in rows if row["run"] == "first")
    (accuracy,) = [row for row in rows if row["metric"] == "accuracy" and row["run"] == "second"]
    (line,) = [line for line in out.out.splitlines() if line.startswith("accuracy")]
    assert f"{float(accuracy['minus_first']):+.3f}" in line
    for name, values in {"select.m": "4 | 2", "train.lr": "0.003 | 0.001", "train.epochs": "2 | 1"}.items():
        assert f"{name}: {values}" in out.out
    text = (folder / "compare.html").read_text()
    page = checked(text)
    assert str(first.parent) not in text
    assert len(figures(text)) == 1
    assert ["train.lr", "0.003", "0.001"] in page.rows
    drawn = {row["metric"] for row in rows if row["minus_first"]}
    assert "ece" in drawn
    for metric in {row["metric"] for row in rows}:
        name = METRIC_NAMES.get(metric, metric)
        assert (f">{name}<" in figures(text)[0]) == (metric in drawn - {"ece"}), metric
    assert ">\N{LEFTWARDS ARROW} calibration error<" in figures(text)[0]
    cases = csv_rows(folder / "cases.csv")
    changed = [row["image"] for row in cases if row["label.first.predicted"] != row["label.second.predicted"]]
    shown = [row[0] for row in page.rows if row[0] in {row["image"] for row in cases}]
    assert sorted(shown) == sorted(changed)
    assert f"{len(changed)} image" in out.out
    assert len(cases) == len(csv_rows(first / "predictions" / "test.csv"))
    assert say("compare", first, second, "--split", "val", "--out", "val").code == 0
    assert len(csv_rows(Path("val/cases.csv"))) == len(csv_rows(first / "predictions" / "val.csv"))


def test_what_cannot_be_compared_is_refused_with_what_to_do(
    runs: tuple[Path, Path], toy: Path, tmp_path: Path, say: Say
) -> None:
    first, second = runs
    assert "two runs or more: keyhole compare RUN RUN..." in say("compare", first).refusal()
    assert "there is no such folder" in say("compare", first, "nowhere").refusal()
    assert "neither a run nor an evaluation" in say("compare", first, toy).refusal()
    bare = copied(second, tmp_path)
    shutil.rmtree(bare / "evaluation")
    (bare / "predictions" / "test.csv").unlink()
    assert (
        f"has no predictions for its test split. Make them: keyhole evaluate {bare}"
        in say("compare", first, bare).refusal()
    )
    shutil.copytree(second / "evaluation", bare / "evaluation")
    metrics = bare / "evaluation" / "test" / "metrics.json"
    found = json.loads(metrics.read_text())
    for broken, said in (
        ("{", "damaged, or of an earlier version"),
        (json.dumps(found | {"tasks": {}}), "no task of the same name, kind and classes"),
        (metrics.read_text().replace('"over": "images"', '"over": "groups"'), "has no column 'group'"),
    ):
        metrics.write_text(broken)
        assert said in say("compare", first, bare).refusal()
    metrics.write_text(json.dumps(found))
    table = metrics.with_name("predictions.csv")
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0], *(f"other/{row}" for row in rows[1:])]) + "\n")
    assert "no image is in all of them. Train them on the same splits" in say("compare", first, bare).refusal()


def test_doubts_about_what_is_compared_are_told(runs: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = runs
    other = copied(second, tmp_path)
    folder = other / "evaluation" / "test"
    metrics, table = folder / "metrics.json", folder / "predictions.csv"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"epoch": 7}))
    rows = csv_rows(table)
    rows[0]["label.true"] = "red" if rows[0]["label.true"] == "green" else "green"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[:-1])
    (other / "config.yaml").unlink()
    found = keyhole.compare([first, other], out=tmp_path / "out")
    said = " ".join(found.notes)
    assert "is of the model of epoch 7; the best is that of epoch 1 now" in said
    assert f"settings are not compared: {other / 'config.yaml'}: no such configuration file" in said
    assert "first: 1 image that not all runs have" in said
    assert "1 image with other labels in one of the runs" in said
    assert len(found.tables[0]) == len(rows) - 2

    names = {row["name"]: row["sha256"] for row in csv_rows(other / "manifest.csv")}
    manifest = (other / "manifest.csv").read_text()
    moved, name = rows[1]["path"], rows[1]["image"]
    (other / "manifest.csv").write_text(manifest.replace(names[name], "0" * 64))
    table.write_text(table.read_text().replace(moved, f"/elsewhere/{name}"))
    with pytest.raises(RunError, match=f"{name}: is another file in first"):
        keyhole.compare([first, other], out=tmp_path / "out")
    (other / "manifest.csv").write_text(manifest)
    keyhole.compare([first, other], out=tmp_path / "out")
