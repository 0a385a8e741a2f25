"""One process at a time writes a run; what killed processes leave behind goes with the next that owns it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SMALL, small_files
from processes import command

import keyhole
from keyhole.cli.main import main
from keyhole.errors import OutputError, RunError
from keyhole.runs import lock as module
from keyhole.runs.folder import FIRST
from keyhole.runs.lock import DEAD, Holder, RunLock
from keyhole.util.files import atomic_file


@pytest.fixture
def run(toy_run: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(toy_run, tmp_path / "run"))


def refusal(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which `keyhole resume` refuses a run."""
    capsys.readouterr()
    assert main(["resume", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def write_lock(run: Path, holder: Holder, age: float = 0.0) -> None:
    (run / "lock").write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(run / "lock", (time.time() - age,) * 2)


def test_a_run_that_a_process_works_on_is_refused_until_the_process_is_gone_however_it_went(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(command("holds_a_run", run), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = refusal(run, capsys)
    assert f"process {process.pid} on " in line
    assert f"kill {process.pid}" in line
    assert f"keyhole resume {run}" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    process.kill()
    process.communicate()
    assert (run / "lock").exists(), "a killed process leaves its lock"
    assert main(["resume", str(run)]) == 0
    assert not (run / "lock").exists()


def test_a_process_of_another_host_counts_as_dead_when_its_heartbeat_is_old(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLE", 0.0)
    other = dataclasses.replace(Holder.this(), host="node7", kernel="another", token="x", pid=1)
    write_lock(run, other, age=DEAD - 60)
    line = refusal(run, capsys)
    assert "process 1 on node7" in line
    assert f"wait 3 minutes or delete {run / 'lock'}" in line
    write_lock(run, other, age=DEAD + 60)
    RunLock(run).release()
    assert not (run / "lock").exists()


def test_where_flock_is_missing_the_processes_of_this_host_are_looked_up(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", missing)
    write_lock(run, dataclasses.replace(Holder.this(), token="x"))
    assert f"process {os.getpid()} on " in refusal(run, capsys)
    write_lock(run, dataclasses.replace(Holder.this(), token="x", born="1"))  # the pid was given out again
    RunLock(run).release()
    held = RunLock(run)
    assert f"process {os.getpid()} on " in refusal(run, capsys)
    held.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_a_lock_that_names_nobody_does_not_block(run: Path, text: str) -> None:
    (run / "lock").write_text(text)
    RunLock(run).release()


def test_a_full_disk_is_told_and_leaves_no_lock(run: Path) -> None:
    with small_files(0), pytest.raises(OutputError, match=r"lock: cannot be written .*Free space"):
        RunLock(run)
    assert not (run / "lock").exists()


def test_a_process_that_lost_its_lock_writes_nothing_more_and_leaves_the_other_s(run: Path) -> None:
    lock = RunLock(run)
    other = dataclasses.replace(Holder.this(), host="node7", token="x")
    write_lock(run, other)
    with pytest.raises(RunError, match=r"on node7.*took it over.*without writing"):
        lock.check()
    lock.release()
    assert Holder.read((run / "lock").read_bytes()) == other


def test_what_kills_left_is_removed_by_the_next_start_and_a_live_process_s_is_not(
    run: Path, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [_half_written(run / "last.safetensors"), _half_written(run / "best" / "model.safetensors")]
    beside = run.parent / ".other.abc_1234"
    beside.mkdir()
    for name in FIRST - {"lock"}:
        shutil.copy(run / name, beside)
    own = run.parent / ".other.users_01"
    own.mkdir()
    (own / "notes.txt").write_text("a user's own")
    alive = RunLock(beside)
    keyhole.train(toy, run.parent / "other", **SMALL)
    assert beside.is_dir()
    alive.release()
    (beside / "lock").touch()  # as of a process that was killed
    shutil.rmtree(run.parent / "other")
    keyhole.train(toy, run.parent / "other", **SMALL)
    assert not beside.exists()
    assert (own / "notes.txt").exists()
    assert all(path.exists() for path in left), "they belong to another run"
    capsys.readouterr()
    left.append(_half_written(run / "predictions" / "val.csv"))
    journals = [run / "validation.jsonl", run / "selection.safetensors"]  # kills after the last state was saved
    for path in journals:
        path.write_bytes(b"of a step that is done\n")
    with atomic_file(run / "predictions" / "test.csv") as held:
        assert main(["resume", str(run)]) == 0
        assert Path(held.name).exists(), "another process is writing it"
    assert not any(path.exists() for path in left + journals)
    assert "removed 3 unfinished files" in capsys.readouterr().err


def _half_written(path: Path) -> Path:
    """The temporary file of a process that was killed while it wrote `path`."""
    before = set(path.parent.iterdir())
    with atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        (temporary,) = set(path.parent.iterdir()) - before
        copy = path.read_bytes()
    path.write_bytes(copy)
    temporary.write_bytes(b"half")
    return temporary
