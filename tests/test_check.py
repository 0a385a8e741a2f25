"""`check`: every image opened in a process that may die, what was found, and a fix beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keyhole.config import Config, DataConfig, PatchConfig, SelectConfig
from keyhole.data import check as check_module
from keyhole.data.check import CheckReport, Finding, check
from keyhole.data.check_worker import Failed, ImageProbe, Probed, probe_here
from keyhole.errors import DataError

PATCH = {"size": 32, "stride": None, "level": None, "mpp": None, "foreground": "all"}


def picture(path: Path, width: int = 100, height: int = 80, mode: str = "RGB", seed: int = 0) -> Path:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8)).save(path)
    return path


def data_set(folder: Path, count: int = 12) -> Path:
    """A CSV with `count` good images of two classes."""
    for i in range(count):
        picture(folder / f"{i}.png", 100 + i, 80, seed=i)
    path = folder / "labels.csv"
    path.write_text("image,grade\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(count)))
    return path


def config(path: Path, **data: object) -> Config:
    return Config(
        data=DataConfig(path=path, **data),  # type: ignore[arg-type]
        patch=PatchConfig(size=32),
        select=SelectConfig(m=4),
    )


def by_name(report: CheckReport) -> dict[str, Finding]:
    return {finding.name: finding for finding in report.findings}


@pytest.fixture
def fast_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, so that a test starts one."""
    monkeypatch.setattr(check_module, "PROCESSES", 1)


@pytest.fixture(scope="module")
def probe() -> Iterator[ImageProbe]:
    probe = ImageProbe(stall=20)
    yield probe
    probe.close()


pytestmark = pytest.mark.usefixtures("fast_start")


def test_a_good_data_set_is_measured_and_nothing_is_wrong(tmp_path: Path) -> None:
    done = []
    report = check(config(data_set(tmp_path)), progress=lambda number, total: done.append((number, total)))
    assert (report.ok, report.images) == (True, 12)
    assert all(finding.severity == "warning" for finding in report.findings)
    assert done == [(number, 12) for number in range(1, 13)]
    assert (report.spreads["width"].min, report.spreads["width"].max) == (100, 111)
    assert report.spreads["patches"].total == 12 * 4 * 3
    assert report.classes["grade"]["a"] == {"train": 4, "val": 1, "test": 1}
    assert "memory" in report.memory
    again = json.loads(json.dumps(report.to_json()))
    assert again["ok"] is True
    assert again["spreads"]["height"] == {"min": 80, "median": 80, "max": 80, "total": 960}
    for table in (report.table(), report.class_table(), report.finding_table()):
        assert len({len(row) for row in table}) == 1
        assert all(isinstance(cell, str) for row in table for cell in row)
    assert ["patches", "12", "12", "12", "144"] in report.table()


def test_every_bad_image_is_a_finding_with_a_fix_and_the_others_are_measured(tmp_path: Path) -> None:
    path = data_set(tmp_path)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_text("image,grade\n")
    (tmp_path / "3.png").unlink()
    picture(tmp_path / "4.png", 20, 20)
    report = check(config(path))
    findings = by_name(report)
    assert not report.ok
    assert {name for name, finding in findings.items() if finding.severity == "error"} == {f"{i}.png" for i in range(5)}
    assert all(finding.fix and "\n" not in finding.problem + finding.fix for finding in report.findings)
    assert findings["3.png"].problem == "no such file"
    assert "--data.root" in findings["3.png"].fix
    assert "larger than the image" in findings["4.png"].problem
    assert "skip" in findings["0.png"].fix
    assert "patch" in findings["4.png"].fix
    assert (report.images, report.left_out) == (7, ())
    assert report.spreads["width"].min == 105


def test_with_skip_bad_images_are_warnings_and_missing_ones_are_listed(tmp_path: Path) -> None:
    path = data_set(tmp_path)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "3.png").unlink()
    report = check(config(path, on_bad_image="skip"))
    assert report.ok
    assert by_name(report)["1.png"].severity == "warning"
    assert [(left.name, left.reason) for left in report.left_out] == [("3.png", "no such file")]


def test_no_good_training_image_of_a_class_is_an_error_even_with_skip(tmp_path: Path) -> None:
    path = data_set(tmp_path)
    for i in range(0, 12, 2):
        (tmp_path / f"{i}.png").write_bytes(b"")
    report = check(config(path, on_bad_image="skip"))
    assert not report.ok
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert [(error.name, error.problem) for error in errors] == [("grade", "no usable training image of class 'a'")]


def test_warnings_tell_what_would_not_stop_a_run_but_spoil_it(tmp_path: Path) -> None:
    for i in range(26):
        picture(tmp_path / f"{i}.png", 70, 70, "L" if i == 5 else "RGB", seed=min(i, 23))
    grade = ["b" if i in (4, 24) else "a" for i in range(26)]
    group = ["p" if i in (0, 25) else f"p{i}" for i in range(26)]
    rows = [f"{i}.png,{grade[i]},{'train' if i < 24 else 'val'},{group[i]},{1 if i else 0.5}" for i in range(26)]
    path = tmp_path / "l.csv"
    path.write_text("image,grade,split,group,mpp\n" + "\n".join(rows))
    settings = config(path)
    report = check(replace(settings, select=SelectConfig(m=9)), deep=True)
    assert report.ok
    problems = [finding.problem for finding in report.findings]
    assert any("23 training images of 'a', but 1 of 'b'" in problem for problem in problems)
    assert any("select.m (=9) keeps every patch (at most 9 per image)" in problem for problem in problems)
    assert any("from 0.5 to 1 microns per pixel" in problem for problem in problems)
    assert any("1 grey images among colour ones: 5.png" in problem for problem in problems)
    assert by_name(report)["p"].problem.startswith("group with images in more than one split")
    assert by_name(report)["23.png"].problem == "same content as 24.png, 25.png, with another grade, in train and val"


def test_a_data_set_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("picture,grade\n")
    with pytest.raises(DataError, match="no column `image`"):
        check(config(tmp_path / "l.csv"))


# The process that may die


def test_the_other_process_sees_what_we_see(tmp_path: Path, probe: ImageProbe) -> None:
    path = picture(tmp_path / "a b\nö.png", 90, 70, "L")
    found = probe.probe(path, 0.25, PATCH)
    assert found == probe_here(str(path), 0.25, PATCH)
    assert found == Probed(size=(90, 70), levels=1, mpp=0.25, channels=1, patches=9, level_bytes=6300)  # type: ignore[arg-type]


def test_an_image_that_kills_the_process_is_named_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = picture(tmp_path / "good.png"), picture(tmp_path / "bad.png")
    with_reader(tmp_path, monkeypatch, "print('out of range', file=sys.stderr, flush=True); os.abort()")
    probe = ImageProbe(stall=20)
    try:
        died = probe.probe(bad, None, PATCH)
        assert isinstance(died, Failed)
        assert died.trouble == "died"
        assert died.problem == "reading it ended the process (signal 6), saying: out of range"
        assert isinstance(probe.probe(good, None, PATCH), Probed)
    finally:
        probe.close()


def test_an_image_that_stalls_is_given_up_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = picture(tmp_path / "good.png"), picture(tmp_path / "bad.png")
    with_reader(tmp_path, monkeypatch, "time.sleep(1000)")
    probe = ImageProbe(stall=3)
    try:
        assert probe.probe(bad, None, PATCH) == Failed("no data for 3 s", "stalled")
        assert isinstance(probe.probe(good, None, PATCH), Probed)
    finally:
        probe.close()


def with_reader(folder: Path, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    """Makes processes started from here do `action` when they open a file called bad.png."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(
        "import os, sys, time, keyhole.images.image as image\n"
        "opened = image.open_image\n"
        "def open_image(path):\n"
        f"    if str(path).endswith('bad.png'): {action}\n"
        "    return opened(path)\n"
        "image.open_image = open_image\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))


@pytest.mark.parametrize("name", ["page_loop.tif", "giant_tile.tif"])
def test_the_known_hostile_files_are_findings(name: str, shared: Path, tmp_path: Path) -> None:
    path = data_set(tmp_path, 11)
    shutil.copy(shared / "data/hostile" / name, tmp_path / name)
    path.write_text(path.read_text() + f"{name},b\n")
    report = check(config(path))
    assert [finding.name for finding in report.findings if finding.severity == "error"] == [name]


def test_the_process_ends_with_its_input_and_never_imports_torch() -> None:
    code = "import sys, keyhole.data.check_worker as worker; worker.main(); assert 'torch' not in sys.modules"
    request = json.dumps({"path": "none.png", "image_mpp": None, "limit": 5, **PATCH})
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=f"{{}}\n{request}\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    greeting, answer = map(json.loads, done.stdout.splitlines())
    assert greeting == {}
    assert answer["trouble"] == "image"


def test_a_killed_probe_lets_its_waiter_go(tmp_path: Path) -> None:
    probe = ImageProbe(stall=60)
    assert isinstance(probe.probe(picture(tmp_path / "good.png"), None, PATCH), Probed)
    process = probe._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.3, probe.kill).start()
    failed = probe.probe(tmp_path / "good.png", None, PATCH)
    assert isinstance(failed, Failed)
    assert failed.trouble == "died"
    probe.close()
