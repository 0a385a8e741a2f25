"""The tests that need a GPU, in a session of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from on_gpu.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
TO_END = 8.0
"""Seconds that a session is given to report, when its time is over."""
NO_TESTS = 5
"""Exit code of pytest where nothing was selected."""


def tests(bench: Bench) -> None:
    """Only files that have such tests are loaded; one that cannot be loaded counts as failed, and the others run."""
    files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if "mark.cuda" in path.read_text())
    files = files[:1] if bench.dry else files
    found = bench.scratch / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "-p",
        "no:cacheprovider",
        f"--junitxml={found}",
        "-v",
        "-rfEs",
    ]
    command += ["-p", "no:logging"]  # where a test fails, dynamo's thousands of lines would be shown
    command += ["-W", "default"]  # of other versions, what a module warns of while it is imported is no error
    command += ["--continue-on-collection-errors", "--tb=short", "--durations=5", *map(str, files)]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if bench.dry else {})
    session = subprocess.Popen(command, cwd=ROOT, env=env)
    try:
        code = session.wait(max(1.0, bench.left - TO_END))
    except subprocess.TimeoutExpired:  # asked to, it reports of those that have run
        session.send_signal(signal.SIGINT)
        code = session.wait()
    if not found.exists():
        raise RuntimeError(f"pytest ended with exit code {code} before it had run a test")
    wrong, shown = counted(found, code)
    bench.figure("tests", 0 if bench.dry and code in (0, NO_TESTS) else wrong, f"{shown}, {len(files)} files")


def counted(report: Path, code: int) -> tuple[float, str]:
    """How many tests failed, in numbers and words; not a number where some have not run, or none.

    Args:
        report: JUnit's XML.
        code: with which pytest ended.
    """
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ET.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    wrong = counts["failures"] + counts["errors"]
    shown = f"{wrong} of {counts['tests']}, {counts['skipped']} skipped"
    if code not in (0, 1, NO_TESTS):
        shown += f", the others have not run (exit code {code})"
    ran = code in (0, 1) and counts["tests"] > counts["skipped"]
    return wrong if ran else float("nan"), shown
