"""Signals, closed streams and more epochs: a run stops where it is told to, and nothing else stops it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

from keyhole.cli.main import main
from keyhole.config.file import load_config
from keyhole.tools import doctor
from keyhole.training import loop
from keyhole.training.interrupt import Interrupt
from keyhole.util.progress import Progress
from keyhole.util.tables import read_rows


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def interrupting(work: Callable[..., Any], number: signal.Signals, after: bool = False) -> Callable[..., Any]:
    """`work`, with a real signal to this process before or after it."""

    def both(*arguments: Any, **options: Any) -> Any:
        if not after:
            signal.raise_signal(number)
        found = work(*arguments, **options)
        if after:
            signal.raise_signal(number)
        return found

    return both


@pytest.fixture(scope="module")
def longer(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs that went on to four."""
    run = copy(toy_run, tmp_path_factory.mktemp("longer") / "run")
    assert main(["resume", str(run), "--train.epochs", "4"]) == 0
    return run


def test_a_finished_run_learns_for_more_epochs(toy_run: Path, longer: Path) -> None:
    rows, before = read_rows(longer / "metrics.csv"), read_rows(toy_run / "metrics.csv")
    assert rows[:2] == before
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(before[1]["lr"]) < float(rows[2]["lr"]) > float(rows[3]["lr"]), "the schedule is that of four epochs"
    assert load_config(longer / "config.yaml").train.epochs == 4
    assert {path.name for path in (longer / "predictions").iterdir()} == {"train.csv", "val.csv"}


def test_epochs_that_are_done_cannot_be_taken_back(longer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(longer), "--train.epochs", "3"]) == 2
    assert "--train.epochs 3: the run has begun 4 epochs already" in capsys.readouterr().err
    assert main(["resume", str(longer), "--train.epochs", "4"]) == 0, "the same line again changes nothing"


def image_of(run: Path) -> Path:
    return Path(read_rows(run / "manifest.csv")[0]["image"])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_of_clusters_save_and_the_run_ends_the_same(
    toy_run: Path,
    longer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    run = copy(toy_run, tmp_path / "run")
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup, which ignores SIGHUP
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "validate_epoch", interrupting(loop.validate_epoch, number))
            assert main(["resume", str(run), "--train.epochs", "4"]) == 128 + number
    finally:
        signal.signal(number, before)
    assert f"keyhole resume {run}" in capsys.readouterr().err
    assert len(read_rows(run / "metrics.csv")) == 2
    for words in (
        ["evaluate", str(run), "--split", "val"],
        ["predict", str(run), str(image_of(run)), "--out", str(tmp_path / "out")],
    ):
        assert main(words) == 0
        said = capsys.readouterr().err
        assert "training has not ended, after 2 of 4 epochs; this is the best model so far, of epoch" in said
    assert main(["resume", str(run)]) == 0
    for name in ("last.safetensors", "best/model.safetensors"):
        expected, found = load_file(longer / name), load_file(run / name)
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert main(["evaluate", str(run), "--split", "val"]) == 0
    assert "has not ended" not in capsys.readouterr().err


def test_a_signal_after_the_last_step_says_that_the_run_is_complete(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(toy_run, tmp_path / "run")
    monkeypatch.setattr(loop, "predict_splits", interrupting(loop.predict_splits, signal.SIGTERM, after=True))
    assert main(["resume", str(run)]) == 128 + signal.SIGTERM
    assert f"the run is complete: {run}" in capsys.readouterr().err


def test_under_nohup_a_lost_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            interrupt.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_in_doctor_is_no_fault_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "machine", lambda: iter(()))
    monkeypatch.setattr(doctor, "readers", lambda folder: iter(()))
    monkeypatch.setattr(loop, "start_job", interrupting(loop.start_job, signal.SIGINT))
    assert main(["doctor"]) == 128 + signal.SIGINT
    told = capsys.readouterr()
    assert "FAIL" not in told.out
    assert "all is well" not in told.out
    assert told.err == "keyhole: interrupted\n"


def test_an_import_that_ctrl_c_broke_is_no_fault_of_the_machine() -> None:
    def work() -> str:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("half loaded")  # noqa: B904 - as libraries do

    with pytest.raises(KeyboardInterrupt):
        doctor.attempt("training", work)


def test_without_standard_streams_the_work_is_done(toy: Path, tmp_path: Path) -> None:
    flags = [f"--{name}.{key}={value}" for name, values in SMALL.items() for key, value in values.items()]
    command = [sys.executable, "-m", "keyhole", "train", str(toy), "--out", str(tmp_path / "run"), *flags]
    closed = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *command], timeout=120, check=False)
    assert closed.returncode == 0
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == SMALL["train"]["epochs"]


def test_progress_that_nobody_reads_any_more_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(4, "epoch 1/1", interval=0) as progress:
            for _ in range(4):
                progress.update(images=1)
            progress.line("a line")
        assert progress.images == 4
