"""What a run tells of the memory and the time that it takes, on the path of the command line."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import keyhole
from keyhole.cli.main import main
from keyhole.config.settings import DataConfig
from keyhole.training import trial
from keyhole.training.duration import Costs, Estimate, Work
from keyhole.util.progress import Progress

SHORT = (
    "--patch.size=16",
    "--model.encoder=small",
    "--model.width=4",
    "--select.m=4",
    "--train.batch=4",
    "--train.epochs=1",
)
SHORT += ("--train.warmup=0",)


def told(toy: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What `keyhole train` prints."""
    assert main(["train", str(toy), "--out", str(out), *SHORT, *options]) == 0
    return capsys.readouterr().err


def test_equal_ends_of_a_range_are_said_once_and_nothing_is_rounded_to_0_gb(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(toy, tmp_path / "run", capsys, "--data.cache=0")
    assert "images with 16 patches of 16 px, " in said  # all are of 64 px
    assert "images are read from their files each time, as data.cache 0 asks: " in said
    assert " 0.0 GB" not in said


RUN = Path(__file__).parents[1] / "benchmarks" / "host_memory_run.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_without_a_budget_the_predicted_peak_is_the_measured_one_and_nothing_grows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        place = tmp_path / "data" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        width, height = (int(side) for side in rng.integers(1800, 2600, 2))
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        PIL.Image.fromarray(coarse).resize((width, height)).save(place / f"{number}.jpg")
    command = [sys.executable, str(RUN), str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    command += [
        "--patch.size=160",
        "--model.encoder=small",
        "--model.width=16",
        "--select.m=16",
        "--data.cache=0",
        "--data.test=0",
    ]
    command += ["--train.epochs=4", "--train.warmup=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    measured, *after = map(int, done.stdout.splitlines()[-1].split())
    predicted = size(re.findall(r"predicted peak ([\d.]+ \wB)", done.stderr)[0])
    assert abs(predicted - measured) < 0.15 * measured, done.stderr
    assert after[-1] < 1.02 * after[1], after
    said = size(re.findall(r"peak ([\d.]+ \wB)", done.stderr)[-1])
    assert 0.9 * measured < said < 1.1 * measured, "the last line of progress says the true peak"


def size(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_the_time_is_told_before_the_start(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--train.epochs=3000", "--train.patience=1", "--train.lr=1e-9", "--train.explore=0", "--model.dropout=0")
    said = told(toy, tmp_path / "long", capsys, *options).splitlines()
    line = next(number for number, text in enumerate(said) if text.startswith("time: "))
    assert line < next(number for number, text in enumerate(said) if text.startswith("epoch 1/3000: "))
    assert re.fullmatch(
        r"time: (about|under) .* an epoch, .* for the run of 3000 epochs: an estimate from .*", said[line]
    )
    assert said[line] in (tmp_path / "long" / "log.txt").read_text()
    assert "time: " not in told(toy, tmp_path / "short", capsys), "a run of a second needs no estimate"


WORK = Work(train_images=100, train_patches=5000, val_images=20, val_patches=1000, m=10, epochs=30)
COSTS = Costs(image=0.02, patch=0.001, encode=0.002, learn=0.005, threads=2)


def test_an_estimate_is_the_sum_of_its_parts() -> None:
    estimate = Estimate(WORK, COSTS)
    assert estimate.training(0) == pytest.approx((100 * 0.02 + 5000 * 0.001) / 2 + 5000 * 0.002 + 1000 * 0.005)
    assert estimate.validation() == pytest.approx((20 * 0.02 + 1000 * 0.001) / 2 + 1200 * 0.002)
    assert estimate.epoch() == pytest.approx(estimate.training(0) + estimate.validation())
    assert estimate.run() == pytest.approx(30 * estimate.epoch() + estimate.predicting())
    assert estimate.run(start=29) == pytest.approx(estimate.epoch() + estimate.predicting())
    saved = Estimate(WORK, replace(COSTS, save=0.5))
    assert saved.epoch() == pytest.approx(estimate.epoch() + 0.5)
    assert saved.run() == pytest.approx(estimate.run() + 30 * 0.5)
    assert saved.after(29, saved.training(29)) == pytest.approx(estimate.after(29, estimate.training(29)) + 0.5)
    short = Estimate(replace(WORK, train_images=9, train_patches=9, val_images=0, val_patches=0, epochs=300), COSTS)
    assert str(short.line("a trial")).startswith("time: under a second an epoch, ")


@pytest.mark.parametrize(("builds", "taken", "expected"), [(True, [26.0, 0.5], 0.5), (False, [0.2, 0.1], 0.1)])
def test_what_the_first_of_two_builds_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, builds: bool, taken: list[float], expected: float
) -> None:
    now, steps = [0.0], iter(taken)
    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(steps)

    assert trial._seconds(work, torch.device("cpu"), builds) == pytest.approx(expected)


def test_slow_work_of_a_cpu_is_done_once() -> None:
    calls = []
    trial._seconds(lambda: calls.append(trial.time.sleep(1.1 * trial.MIN_SECONDS)), torch.device("cpu"), builds=False)
    assert len(calls) == 1


def test_epochs_that_score_nothing_and_images_in_memory_cost_less() -> None:
    blind = Estimate(replace(WORK, blind=10.5), COSTS)
    plain = Estimate(WORK, COSTS)
    assert blind.training(9) < blind.training(10) < blind.training(11) == plain.training(11)
    resident = Estimate(replace(WORK, resident=True), COSTS)
    assert resident.training(0, first=True) == plain.training(0)
    assert resident.training(1) == pytest.approx(plain.training(1) - 100 * 0.02 / 2)
    beside = Estimate(WORK, replace(COSTS, overlap=True))
    assert beside.training(0) == pytest.approx(5000 * 0.002 + 1000 * 0.005), "reading hides behind a GPU"


def test_what_is_left_follows_what_epochs_really_take() -> None:
    estimate = Estimate(WORK, COSTS)
    expected = estimate.run() - estimate.training(0)
    assert estimate.after(0, estimate.training(0)) == pytest.approx(expected)
    assert estimate.after(0, 3 * estimate.training(0)) == pytest.approx(3 * expected)
    last = estimate.after(29, estimate.training(29))
    assert last == pytest.approx(estimate.validation() + estimate.predicting())


def test_the_progress_line_says_what_is_left_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("keyhole.util.progress.time.monotonic", lambda: now[0])
    with Progress(40, "epoch 1/3", io.StringIO(), after=lambda seconds: 2 * seconds) as progress:
        now[0] = 110.0
        progress.update(images=10)
        assert progress.status().endswith(", 0:00:30 left and 0:01:50 of the run")


def test_check_tells_the_time_or_in_one_line_why_not(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def checked(*options: str) -> list[str]:
        assert main(["check", str(toy), *SHORT[:-2], *options]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: ")]

    assert checked("--train.epochs=3") == []
    (line,) = checked("--train.epochs=100000")
    assert re.fullmatch(
        r"time: (about|under) .* an epoch, .* for the run of 100000 epochs: an estimate from reading .*", line
    )
    (line,) = checked("--train.epochs=100000", "--model.encoder=resnet81")
    assert line.startswith("time: not estimated, since the model cannot be built or tried (")


def test_nothing_is_said_of_decoded_images_where_there_are_only_features(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("image,label\n" + "".join(f"{k}.svs,{'ab'[k % 2]}\n" for k in range(6)))
    for k in range(6):
        torch.save(torch.ones(30, 16), tmp_path / f"{k}.pt")
    data = DataConfig(path=tmp_path / "labels.csv", features=tmp_path)
    report = keyhole.check(keyhole.Config(data=data), select={"m": 4})
    assert report.images == 6
    assert report.memory == ""
    assert not report.work.resident
