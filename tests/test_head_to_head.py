"""What the head-to-head says of its runs follows from their curves and the pace of each arm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("head_to_head_report")


def arm(report: Any, name: str, curves: list[list[float]], seconds: list[float]) -> Any:
    runs = {seed: dict.fromkeys(report.TITLES, curve) for seed, curve in enumerate(curves)}
    return report.Arm(name, runs, seconds)


def test_an_arm_reaches_another_where_its_mean_stays_above_in_every_task(report: Any) -> None:
    slow = arm(report, "published", [[0.1, 0.2, 0.4, 0.5], [0.1, 0.2, 0.2, 0.3]], [10.0])
    fast = arm(report, "advised", [[0.5, 0.3, 0.4, 0.6], [0.5, 0.3, 0.4, 0.6]], [6.0, 5.0, 7.0])
    assert fast.reaches(slow) == 3, "the first epoch was above too, but the second was not"
    assert fast.reaches(fast) == 4
    assert slow.reaches(fast) is None
    text = " ".join(report.sentences({"published": slow, "advised": fast}))
    assert "a share of 0.45, which is more than a third" in text
    assert "ends above each seed of the published procedure in majority, max, top, multi" in text
    assert "do not reach" in " ".join(report.sentences({"published": fast, "advised": slow}))
    short = arm(report, "advised-short", [[0.6, 0.6]], [6.0])
    both = report.sentences({"published": slow, "advised": fast, "advised-short": short})
    assert len(both) == 2
    assert "a share of 0.15, which is at most a third" in both[1]


def test_one_task_that_stays_behind_is_enough(report: Any) -> None:
    slow = arm(report, "published", [[0.1, 0.5]], [10.0])
    fast = arm(report, "advised", [[0.9, 0.9]], [1.0])
    fast.runs[0]["multi"] = [0.1, 0.4]
    assert fast.reaches(slow) is None


def test_the_recipe_is_compared_with_the_range_of_the_seeds(report: Any) -> None:
    published = arm(report, "published", [[0.5], [0.7]], [1.0])
    inside, outside = (arm(report, "recipe", [[value]], [1.0]) for value in (0.6, 0.75))
    assert "within the range" in report.sentences({"published": published, "recipe": inside})[0]
    assert "outside the range" in report.sentences({"published": published, "recipe": outside})[0]


def test_plot_and_table_show_every_arm(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PLOTS", tmp_path)
    arms = [arm(report, name, [[0.1, 0.5], [0.2, 0.4]], [2.0, 3.0]) for name in report.LABELS]
    rows = report.table(arms)
    assert len(rows) == 2 + len(arms)
    assert ".450 (.400 to .500)" in rows[2]
    first = report.draw(arms, "plot.svg").read_bytes()
    assert first == report.draw(arms, "plot.svg").read_bytes()
    assert all(label.encode() in first for label in report.LABELS.values())
