"""The comparison of accuracies: canvases are what their labels say, and a difference is called what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyhole.cli.options import read
from keyhole.cli.train import TrainOptions

Benchmark = Callable[[str], Any]


def test_splits_share_no_handwriting(benchmark: Benchmark, tmp_path: Path) -> None:
    digits = benchmark("canvases").digits(tmp_path / "none")
    seen = {split: {each.tobytes() for each in part.pixels} for split, part in digits.items()}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert all(set(part.labels) == set(range(10)) for part in digits.values())


def test_a_difference_wider_than_the_spread_is_not_called_within(benchmark: Benchmark) -> None:
    accuracy = benchmark("accuracy")
    assert accuracy.compared({0: 0.90, 1: 0.92, 2: 0.91}, {0: 0.91, 1: 0.91, 2: 0.92}) == ("-0.0033", "yes")
    assert accuracy.compared({0: 0.90, 1: 0.91, 2: 0.90}, {0: 0.93, 1: 0.93, 2: 0.94})[1] == "no"
    assert accuracy.compared({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}) == ("+0.0000", "yes")
    assert accuracy.compared({0: 0.9, 1: 0.9}, {0: 0.9, 2: 0.9}) == ("-", "-"), "other seeds are not to be compared"


@pytest.mark.parametrize("name", ["DEMO", "MEGAPIXEL", "PUBLISHED"])
def test_flags_of_a_study_are_a_setting_that_can_be_trained_in_full_and_in_short(
    name: str, benchmark: Benchmark
) -> None:
    runs = benchmark("accuracy_runs")
    study = getattr(runs, name)
    for each in (study, runs.shortened(study)):
        for path in runs.PATHS:
            words = [*each.flags, *runs.path_flags(path, "cpu")]
            config = read(TrainOptions, words, "keyhole train").settings
    assert config.train.epochs == 1
