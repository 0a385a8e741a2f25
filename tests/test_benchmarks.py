"""`benchmarks/run`: every part of it exists, one that fails stops no other, and what failed is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import script
from processes import command

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "benchmarks" / "run"


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with its results in a folder of the test and this interpreter for its parts."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = script(RUN)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def part(*words: str) -> tuple[str, ...]:
    """What the interpreter is given for a part that is a file of the tests."""
    return tuple(command("benchmark_part", *words)[1:])


def test_one_that_fails_stops_no_other_and_is_named(runner: Any, capfd: pytest.CaptureFixture[str]) -> None:
    parts = {
        "broken": runner.Part("fails", part("fails"), None),
        "sound": runner.Part("writes", part("writes", "sound.md"), None),
    }
    assert runner.main([], parts) == 1
    out, err = capfd.readouterr()
    assert re.search(r"^broken +failed with exit code 3$", out, re.MULTILINE)
    assert re.search(r"^sound .*; sound\.md$", out, re.MULTILINE)
    assert err == "failed: broken\n"


def test_what_ran_well_is_no_failure_and_a_quick_run_says_what_it_leaves_out(
    runner: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "long": runner.Part("takes hours", part("fails"), None),
        "short": runner.Part("has a quick form", part("fails"), part("prints", "rough")),
    }
    assert runner.main(["--quick"], parts) == 0
    out, err = capfd.readouterr()
    assert "rough" in out
    assert re.search(r"^long +left out: no quick form$", out, re.MULTILINE)
    assert not err


def test_every_part_is_a_file_with_the_options_it_is_given(runner: Any) -> None:
    for each in runner.PARTS.values():
        for given in (each.command, each.quick or ()):
            (file,) = [word for word in given if word.endswith(".py")] or ["tests"]
            assert (ROOT / file).exists(), file
            if file.startswith("benchmarks"):
                text = (ROOT / file).read_text()
                assert not [word for word in given if word.startswith("--") and f'"{word}"' not in text]


def test_every_benchmark_that_writes_a_result_is_a_part(runner: Any) -> None:
    scripts = [path for path in RUN.parent.glob("*.py") if re.search(r"write_result\(|_cpu_|cpu_\{", path.read_text())]
    others = {"machine", "against", "potholes_by_road", "by_part"}  # these need two checkouts, or a download
    assert {path.stem for path in scripts} - others <= set(runner.PARTS)


def test_it_runs_as_a_command(tmp_path: Path) -> None:
    done = subprocess.run([RUN, "--list"], cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ)
    assert "selection" in done.stdout
    wrong = subprocess.run([RUN, "--only", "nothing"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "nothing" in wrong.stderr


def test_the_list_of_scripts_has_them_all() -> None:
    listed = set(re.findall(r"`(\w+\.py)`", (RUN.parent / "README.md").read_text()))
    runnable = {path.name for path in RUN.parent.glob("*.py") if "__main__" in path.read_text()}
    assert runnable <= listed
    assert all((RUN.parent / name).is_file() for name in listed)
