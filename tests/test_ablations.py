"""The ablations: every change is a setting, and what is said of the paper's claims follows from the figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Benchmark = Callable[[str], Any]
M = {"2": 0.5, "5": 0.78, "10": 0.8, "20": 0.81, "64": 0.82}


@pytest.fixture
def point(benchmark: Benchmark) -> Callable[..., Any]:
    """Makes the runs of a value, one for each accuracy."""
    result, report = benchmark("result"), benchmark("ablations_report")

    def make(value: str, *accuracies: float) -> Any:
        runs = [
            result.Result(
                *("canvases", "generated", value, seed),
                {f"{task}.accuracy": result.Figure(each) for task in report.TASKS},
                *(3, 1.5, 0.4),
            )
            for seed, each in enumerate(accuracies)
        ]
        return report.Point(value, runs)

    return make


def test_every_change_is_a_setting_and_the_base_has_the_patches_that_the_report_says(benchmark: Benchmark) -> None:
    module, chance = benchmark("ablations"), benchmark("leaving_chance")
    variant = yaml.safe_load(chance.VARIANTS.read_text())["advised"]
    base = chance.base(Path("manifest.csv"), "canvases", tuple(variant.items()), None)
    assert (400 // base.patch.size) ** 2 == module.PATCHES
    configs = [base.replace(**benchmark("training").sections(each)) for each in module.changes_of(None)]
    assert all(a != b for number, a in enumerate(configs) for b in configs[:number])
    assert base in configs


def test_a_small_m_loses_little_or_not(benchmark: Benchmark, point: Callable[..., Any]) -> None:
    report = benchmark("ablations_report")
    said = report.small_loss([point(value, each, each) for value, each in M.items()])
    assert "confirmed" in said
    assert "+0.320 with M = 2" in said
    assert "M = 5 is the smallest that loses at most 0.05" in said
    assert "contradicted" in report.small_loss([point("5", 0.5), point("20", 0.8), point("64", 0.81)])
    assert "stayed at chance" in report.small_loss([point("5", 0.1), point("64", 0.12)])
    assert "not measured" in report.small_loss([point("5", 0.5)])


def test_accuracy_depends_on_i_if_its_values_differ_by_more_than_the_seeds(
    benchmark: Benchmark, point: Callable[..., Any]
) -> None:
    independent = benchmark("ablations_report").independent
    assert "confirmed" in independent("streaming", [point("2", 0.7, 0.8), point("54", 0.72, 0.86)])
    assert "contradicted" in independent("streaming", [point("2", 0.7, 0.71), point("54", 0.78, 0.8)])
    assert "confirmed" in independent("global", [point("2", 0.7, 0.8), point("54", 0.7, 0.8)])
    assert "two seeds" in independent("streaming", [point("2", 0.7), point("54", 0.78)])


def test_memory_is_flat_if_it_grows_by_no_more_than_the_logits(benchmark: Benchmark) -> None:
    report = benchmark("ablations_report")
    measured = report.peaks()
    assert measured[-1][0] >= 1000 * measured[0][0]
    assert "confirmed" in report.flat_memory(measured)
    assert "contradicted" in report.flat_memory([(1_000, 700), (1_000_000, 900)])


def test_the_same_figures_give_the_same_plot_and_every_value_has_a_row(
    benchmark: Benchmark, point: Callable[..., Any], tmp_path: Path
) -> None:
    module, report = benchmark("ablations"), benchmark("ablations_report")
    found = {factor: [point(value, 0.5, 0.6) for value in factor.values] for factor in module.FACTORS}
    one, other = (report.draw(found, [(10, 5), (100, 6)], tmp_path / name / "x_2cpu.svg") for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    lines = report.report(found, "advised", one)
    rows = [line for line in lines if line.startswith("| ") and "± " in line]
    assert len(rows) == sum(len(factor.values) for factor in module.FACTORS)
