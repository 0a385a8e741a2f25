"""Fixtures shared by all tests."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from keyhole.cli.main import main

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SHARED = Path(__file__).resolve().parents[2] / "shared"
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
COLORS = {"green": (40, 220, 40), "red": (220, 40, 40)}

# the smallest settings that train: patches of 16 px, one narrow encoder, seconds on one core
SMALL: dict[str, dict[str, Any]] = {
    "patch": {"size": 16},
    "model": {"encoder": "small", "width": 8, "heads": 2},
    "select": {"m": 4, "chunk": 16},
    "train": {"epochs": 2, "batch": 4, "lr": 3e-3, "explore": 0.0},
    "run": {"threads": 2},
}


# Tests on a GPU: see on_device.py.


LONG_TESTS = Path(__file__).with_name("long_tests.txt")
"""Tests that take more than half a second of a core each; `make quick` leaves them out."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: is listed in tests/long_tests.txt; `make quick` leaves it out")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long. On a device, show warnings and do not raise them: torch warns of much that is harmless."""
    long = set(LONG_TESTS.read_text().split())
    for item in items:
        if f"{item.path.name}::{item.name.partition('[')[0]}" in long:
            item.add_marker("long")
    shown = "default", *(f"error::pytest.Pytest{kind}ExceptionWarning" for kind in ("Unraisable", "UnhandledThread"))
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(pytest.mark.filterwarnings(*shown))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hide the GPUs, also from child processes, unless all tests of this session are for them.

    CUDA reads the variable when it is first used, which no module does while it is imported.
    """
    if not all(item.get_closest_marker("cuda") for item in session.items):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `cuda` where there is no GPU."""
    mark = item.get_closest_marker("cuda")
    if mark is not None:
        import torch
        from on_device import DRY, ONLY_GPU, WITHOUT_GPU

        if DRY:
            if not mark.kwargs.get("dry", True):
                pytest.skip(ONLY_GPU)
        elif not torch.cuda.is_available():
            pytest.skip(WITHOUT_GPU)


@pytest.fixture(autouse=True)
def device_as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked `cuda` leaves no mode, memory limit, cached memory or compiled function to the next."""
    if request.node.get_closest_marker("cuda") is None:
        yield
        return
    from on_device import leaving_the_device_as_found

    with leaving_the_device_as_found():
        yield


def settings(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """SMALL with some values changed, section by section."""
    return {name: SMALL.get(name, {}) | sections.get(name, {}) for name in SMALL | sections}


def write_toy(folder: Path, count: int = 12, side: int = 64, seed: int = 0) -> Path:
    """A folder of two classes: noise with one 16 px square of the class's colour."""
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 90, (side, side, 3), dtype=np.uint8)
            x, y = rng.integers(0, side - 16, 2)
            pixels[y : y + 16, x : x + 16] = color
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """As on a full disk: writing beyond `limit` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Callable[[str], Any]]:
    """Imports a module of the benchmarks by name, as their scripts do: from their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module
    sys.path.remove(str(BENCHMARKS))


def script(path: Path) -> Any:
    """A command without a suffix, as a module."""
    name = f"{path.parent.name}_{path.name}"
    spec = spec_from_loader(name, SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and golden vectors that are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with real data is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of each of two classes; do not change them."""
    return write_toy(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="session")
def toy_run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the toy images; do not change it."""
    import keyhole

    return keyhole.train(toy, tmp_path_factory.mktemp("runs") / "toy", **SMALL).path


class Said(NamedTuple):
    """What a command line ended with."""

    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        """Everything that was printed."""
        return self.out + self.err

    def refusal(self) -> str:
        """The one line that says what is wrong; progress may come before it."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert sum(line.startswith("keyhole: ") for line in lines) == 1
        assert lines[-1].startswith("keyhole: error: ")
        return lines[-1]


Say = Callable[..., Said]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Say]:
    """Runs a command line in an empty folder; one that takes two minutes fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def too_long(*_: object) -> None:
        raise AssertionError("it hangs")

    def run(*words: str | Path) -> Said:
        signal.alarm(120)
        code = main([str(word) for word in words])
        signal.alarm(0)
        return Said(code, *capsys.readouterr())

    before = signal.signal(signal.SIGALRM, too_long)
    yield run
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium, driven by Playwright; skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # as root, in the containers of CI, chromium does not start with its sandbox
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def encoder() -> Any:
    """A `SmallEncoder` that `keyhole embed` uses; its weights are in the file `weights`. Do not change it."""
    import torch

    from keyhole.nn import SmallEncoder

    torch.manual_seed(0)
    return SmallEncoder(3, 8).eval()


@pytest.fixture(scope="module")
def weights(encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_file(encoder.state_dict(), path)
    return path
