"""Law 7: a run that was killed, at any moment, ends with the same weights as one that was not, to the bit on CPU.

Real processes of `keyhole train`, really killed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_toy
from processes import TIMEOUT, kill, wait_for
from safetensors.torch import load_file

from keyhole.runs.checkpoint import read_info
from keyhole.util.tables import read_rows

FLAGS = (
    "--patch.size 16 --model.encoder small --model.width 8 --model.heads 2 --select.m 4 --select.chunk 16 --train.epochs 4 --train.batch 2 "
    "--train.lr 0.003 --train.explore 2 --run.threads 2 --run.save-minutes 0.00001"
).split()


def keyhole(*arguments: object) -> subprocess.Popen[str]:
    """A process of the command line; one thread of arithmetic, since two cores run many tests."""
    return subprocess.Popen(
        [sys.executable, "-m", "keyhole", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return output


def step(run: Path) -> int:
    return int(read_info(run / "last.safetensors")["step"]) if run.exists() else -1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("data") / "toy", count=14, side=96)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(keyhole("train", data, "--out", run, *FLAGS))
    return run


def assert_same(whole: Path, run: Path) -> None:
    for name in ("last.safetensors", "best/model.safetensors"):
        expected, found = load_file(whole / name), load_file(run / name)
        assert expected.keys() == found.keys()
        different = [key for key in expected if not torch.equal(expected[key], found[key])]
        assert not different, f"{name}: {different[:5]}"
    timeless = {"seconds", "peak_gb"}
    for expected_row, found_row in zip(read_rows(whole / "metrics.csv"), read_rows(run / "metrics.csv"), strict=True):
        assert {k: v for k, v in expected_row.items() if k not in timeless} == {
            k: v for k, v in found_row.items() if k not in timeless
        }
    for split in ("train", "val"):
        assert (whole / "predictions" / f"{split}.csv").read_text() == (
            run / "predictions" / f"{split}.csv"
        ).read_text()


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(data: Path, whole: Path, tmp_path: Path) -> None:
    run, rng = tmp_path / "run", random.Random(0)
    last = step(whole)
    process = keyhole("train", data, "--out", run, *FLAGS)
    for target in (0, last // 3, 2 * last // 3, last):  # at the first moment it exists, in mid-epoch, at the end
        wait_for(process, lambda target=target: step(run) >= target)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.03))
        if process.poll() is None:
            kill(process)
        process = keyhole("resume", run)
    finish(process)
    assert_same(whole, run)
    assert not [path for path in run.iterdir() if path.name.startswith(".") and path.is_dir()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(data: Path, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = keyhole("train", data, "--out", run, *FLAGS, "--run.save-minutes", "1000")
    wait_for(process, lambda: (run / "metrics.csv").exists())
    process.send_signal(number)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    assert f"keyhole resume {run}" in output
    assert "Traceback" not in output
    finish(keyhole("resume", run))
    assert_same(whole, run)


def test_resuming_a_finished_run_changes_nothing(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != "log.txt"}
    finish(keyhole("resume", whole))
    assert {path: path.read_bytes() for path in before} == before
