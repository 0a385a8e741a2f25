"""What a run tells of the memory and the time that it takes, on the path of the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from keyhole.cli.main import main

SHORT = ("--patch.size=16", "--model.width=4", "--select.m=4", "--train.batch=4", "--train.epochs=1")
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
    command += ["--patch.size=160", "--model.width=16", "--select.m=16", "--data.cache=0", "--data.test=0"]
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
