"""The demo: its settings are those of `keyhole train`, and what it promises holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keyhole.config.file import resolve
from keyhole.errors import OutputError
from keyhole.tools.demo import demo, demo_config, free_folder


def test_the_demo_trains_as_keyhole_train_with_its_recipe(tmp_path: Path) -> None:
    config = demo_config(tmp_path, seed=3)
    recipe = resolve("demo")
    assert (config.patch, config.model, config.select, config.augment) == (
        recipe.patch,
        recipe.model,
        recipe.select,
        recipe.augment,
    )
    assert config.train.seed == 3


def test_a_second_demo_does_not_lose_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_folder() == Path("demo")
    Path("demo").mkdir()
    assert free_folder() == Path("demo-2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(OutputError, match="exists and is not empty"):
        demo(tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_reaches_its_accuracy_without_a_network(tmp_path: Path, seed: int) -> None:
    """The whole command, as `make demo` runs it; a few minutes a seed."""
    command = [sys.executable, "-m", "keyhole", "demo", "--seed", str(seed), "--out", "out"]
    offline = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = re.fullmatch(r"accuracy (0\.\d{3}|1\.000) \[(\d\.\d{3}) (\d\.\d{3})\]", lines[-3])
    assert found, lines[-3:]
    assert float(found[1]) >= 0.90
    assert lines[-2].startswith("contact sheet: ")
    assert (tmp_path / lines[-2].removeprefix("contact sheet: ")).read_bytes().startswith(b"\x89PNG")
    assert "200 unseen images" in done.stdout
