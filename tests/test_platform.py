"""What an operating system lacks is no reason not to work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from keyhole.util import platform


def test_training_and_prediction_work_without_what_windows_lacks(toy: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent / "processes" / "without_posix.py"
    command = [sys.executable, script, toy, tmp_path / "run", toy / "red" / "0.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("red", "blue", "green")
    assert ", peak " not in done.stderr, "a figure that is not known is not shown"


def test_a_part_of_a_file_is_read_without_pread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "file").open("rb") as file:
        found = [platform.read_at(file.fileno(), 4, offset) for offset in (2, 8)]
        monkeypatch.delattr("os.pread")
        assert [platform.read_at(file.fileno(), 4, offset) for offset in (2, 8)] == found == [b"2345", b"89"]
