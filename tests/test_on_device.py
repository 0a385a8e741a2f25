"""Rules of the tests on a GPU: which tests see one, and what each leaves to the next."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from on_device import GPU, leaving_the_device_as_found, no_waiting, without_checks_of_shapes

from keyhole.engine.device import choose_device
from keyhole.engine.fast import FastEncoder
from keyhole.nn import SmallEncoder


def test_a_test_without_the_mark_sees_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.cuda
def test_a_test_with_the_mark_sees_one() -> None:
    assert choose_device("auto").type == GPU.type
    assert torch.zeros(1, device=GPU).device.type == GPU.type


def test_the_tests_on_a_gpu_fit_the_code_and_a_session_of_them_hides_no_gpu() -> None:
    here = Path(__file__).parent
    files = [str(path) for path in here.glob("test_*.py") if "mark.cuda" in path.read_text()]
    path = os.pathsep.join(filter(None, [str(here / "processes"), os.environ.get("PYTHONPATH")]))
    dry = {"CUDA_TESTS_ON": "cpu", "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "99", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "shows_devices", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dry)
    assert done.returncode == 0, done.stdout
    assert "devices 99\n" in done.stdout


def test_no_test_looks_for_a_gpu_by_itself() -> None:
    """Where a module does as it is imported, CUDA begins to work, and cannot be hidden any more."""
    for path in Path(__file__).parent.glob("test_*.py"):
        assert "torch.cuda.is_" + "available()" not in path.read_text(), f"{path.name}: mark the test cuda instead"


class Modes:
    """Stands in for torch.cuda: the first time, it warns after it has set the mode, as torch does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        self.now, self.warned, self.text = 1, False, text
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode: int | str) -> None:
        self.now = mode if isinstance(mode, int) else ("default", "warn", "error").index(mode)
        if not self.warned:
            self.warned = True
            warnings.warn(self.text, UserWarning, stacklevel=1)


def test_waiting_is_an_error_inside_and_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = Modes(monkeypatch, "Synchronization debug mode is a prototype feature and does not yet detect all")
    with no_waiting():
        assert modes.now == 2
    assert modes.now == 1
    assert modes.warned
    with pytest.raises(ValueError, match="within"), no_waiting():
        raise ValueError("within")
    assert modes.now == 1


def test_the_mode_is_as_before_also_where_setting_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = Modes(monkeypatch, "something else")
    with pytest.raises(UserWarning, match="something else"), no_waiting():
        raise AssertionError("nothing runs inside")
    assert modes.now == 1


def test_a_test_leaves_no_mode_limit_or_cached_memory_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, done = Modes(monkeypatch, "Synchronization debug mode is a prototype feature"), []
    for name in ("set_per_process_memory_fraction", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, name=name: done.append((name, *given)))
    modes.now = 2
    with pytest.raises(ValueError, match="within"), leaving_the_device_as_found():
        raise ValueError("within")
    assert modes.now == 0
    assert done == [("set_per_process_memory_fraction", 1.0), ("empty_cache",), ("reset_peak_memory_stats",)]


def test_dynamo_traces_the_encoder_in_one_graph_where_shapes_are_not_checked() -> None:
    from torch._dynamo.utils import counters

    compiled = torch.compile
    encoder = FastEncoder(SmallEncoder(3, width=4).eval(), compile=True)
    with without_checks_of_shapes(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda *args, **options: compiled(*args, **options, backend="eager"))
        counters.clear()
        encoder(torch.zeros(4, 24, 24, 3, dtype=torch.uint8))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
