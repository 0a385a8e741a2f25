"""The table of all results comes from recorded runs: seeds are joined, runs of other machines stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import keyhole

Benchmark = Callable[[str], Any]


@pytest.fixture
def one(benchmark: Benchmark) -> Any:
    module = benchmark("result")
    metrics = {"label.auroc": module.Figure(0.9, 0.85, 0.94)}
    return module.Result("tiny", "generated", "plain", 0, metrics, 3, 1.5, 0.4, hardware="2cpu", commit="abc")


def test_a_result_is_read_as_it_was_written(one: Any, benchmark: Benchmark, tmp_path: Path) -> None:
    one.write(tmp_path)
    assert benchmark("result").read(tmp_path) == one


def test_a_run_becomes_a_result(toy_run: Path, benchmark: Benchmark, tmp_path: Path) -> None:
    toy_run = shutil.copytree(toy_run, tmp_path / "run")
    evaluation = keyhole.evaluate(toy_run)
    accuracy = evaluation.metrics[0].overall["accuracy"]
    found = benchmark("result").of_run(toy_run, data="toy", kind="generated", recipe="toy", metrics=["accuracy"])
    assert found.metrics == {
        f"{evaluation.metrics[0].task.name}.accuracy": (accuracy.value, accuracy.low, accuracy.high)
    }
    assert found.epochs == len(keyhole.Run(toy_run).metrics)
    assert found.commit
    made = replace(found, commit="earlier", date="2026-01-01")
    made.write(toy_run)
    again = benchmark("result").of_run(toy_run, data="toy", kind="generated", recipe="toy", metrics=["accuracy"])
    assert again == made, "a run is not made again when it is read again"
    assert found.peak_gb > 0


def test_seeds_are_joined_and_the_same_run_is_replaced(one: Any, benchmark: Benchmark, tmp_path: Path) -> None:
    results, figure = benchmark("results"), benchmark("result").Figure
    records, table = tmp_path / "results", tmp_path / "results.md"

    def run(seed: int, value: float, **other: Any) -> None:
        folder = tmp_path / "runs" / f"{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        replace(one, seed=seed, metrics={"label.auroc": figure(value)}, **other).write(folder)

    run(0, 0.5)
    run(1, 0.8)
    results.main([str(tmp_path / "runs")], records, table)
    run(0, 0.6)
    results.main([str(tmp_path / "runs" / "0")], records, table)
    assert "| plain | 0, 1 | label.auroc 0.700 ± 0.141 | 3 | 1.5 | 0.40 | 2cpu |" in table.read_text()
    run(0, 0.9, hardware="h200")
    results.main([str(tmp_path / "runs" / "0")], records, table)
    assert "| plain | 0, 1 | label.auroc 0.700 ± 0.141 | 3 | 1.5 | 0.40 | 2cpu |" in table.read_text()
    assert "| plain | 0 | label.auroc 0.900 | 3 | 1.5 | 0.40 | h200 |" in table.read_text()
    before = table.read_text()
    results.main([], records, table)
    assert table.read_text() == before
    assert len(results.recorded(records)) == 3


def test_the_table_of_the_repository_is_that_of_its_records(benchmark: Benchmark) -> None:
    results = benchmark("results")
    assert results.TABLE.read_text() == results.table_of(results.recorded()), "run python benchmarks/results.py"
