"""The comparison of accuracies: canvases are what their labels say, and a difference is called what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyhole.cli.options import read
from keyhole.cli.train import TrainOptions

Benchmark = Callable[[str], Any]


def test_labels_of_a_canvas_follow_from_where_its_digits_are(benchmark: Benchmark) -> None:
    mnist = benchmark("megapixel_mnist")
    # a digit is a square of one grey below that of any line, so that it can be found again
    pixels = np.broadcast_to(100 + np.arange(10, dtype=np.uint8)[:, None, None], (10, 28, 28))
    digits = mnist.Digits(pixels, np.arange(10))
    whole = 28 * 28
    for seed in range(5):
        canvas, (majority, largest, top, present) = mnist.draw_canvas(np.random.default_rng(seed), digits, 1500)
        found = {digit: np.argwhere(canvas == 100 + digit) for digit in range(10)}
        # noise is drawn smoothly: single pixels of a line's edge may have a digit's grey, a whole square never has
        shown = {digit: len(places) // whole for digit, places in found.items()}
        assert sorted(shown.values()) == [0] * 7 + [1, 1, 3], "five digits, none covered by another or by noise"
        assert shown[majority] == 3
        assert largest == max(digit for digit, count in shown.items() if count)
        assert present == "|".join(str(digit) for digit, count in shown.items() if count)
        assert top == first_from_above(canvas, [digit for digit, count in shown.items() if count])


def first_from_above(canvas: np.ndarray, digits: list[int]) -> int:
    """The digit whose full-width row comes first."""
    rows = {digit: int(np.argmax((canvas == 100 + digit).sum(axis=1) >= 28)) for digit in digits}
    return min(rows, key=lambda digit: rows[digit])


def test_the_same_seed_gives_the_same_canvases(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnist = benchmark("megapixel_mnist")
    monkeypatch.setattr(mnist, "MNIST", tmp_path / "none")  # the digits that the package carries are there everywhere
    written = [mnist.write_canvases(tmp_path / name, {"train": 2, "test": 1}, 500) for name in ("one", "two")]
    assert written[0].read_text() == written[1].read_text()
    names = sorted(path.name for path in (tmp_path / "one" / "images").iterdir())
    assert len(names) == 3
    for name in names:
        one, two = ((tmp_path / folder / "images" / name).read_bytes() for folder in ("one", "two"))
        assert one == two


def test_splits_share_no_handwriting(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mnist = benchmark("megapixel_mnist")
    monkeypatch.setattr(mnist, "MNIST", tmp_path / "none")
    digits = mnist.source_digits()
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
