"""Bags of features cost the host little: a few operations a go, no look at single patches, and float16 read quickly."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keyhole.features import FeatureOpener
from keyhole.features.files import ALONE, widen
from keyhole.nn import CrossAttentionPool, FeatureProjector, IPSClassifier

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
B, N, F, GO = 4, 1000, 8, 125


@pytest.fixture(scope="module")
def bench() -> Any:
    """What counts operations, imported as the benchmarks do it: from their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return SimpleNamespace(**{name: __import__(name) for name in ("operations", "selection_settings")})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def model() -> IPSClassifier:
    torch.manual_seed(0)
    model = IPSClassifier(FeatureProjector(F, 16), CrossAttentionPool(16, 8), {"label": nn.Linear(16, 1)})
    model.accelerate()(torch.randn(2, F))
    return model


class Largest(TorchDispatchMode):
    """Numbers of the largest integer or boolean tensor of any operation: places and masks, which the host makes.

    The order of scores is left out: the device makes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor) and not each.is_floating_point() and func._schema.name != "aten::sort":
                self.size = max(self.size, each.numel())
        return found


def test_selecting_from_features_in_memory_gives_the_device_a_few_operations_a_go(
    bench: Any, model: IPSClassifier
) -> None:
    bags = torch.randn(B, N, F)
    with bench.operations.Operations([*model.parameters(), *model.buffers(), bags]) as counted:
        model.select(bags, 10, GO)
    goes = B * N // GO
    assert counted.total.waits == 0
    assert counted.total.launched <= 8 * goes + 9 * B + 30, "layer norm, projection, ReLU and scoring; what is kept"


def test_selecting_from_features_in_memory_the_host_looks_at_no_patch(model: IPSClassifier) -> None:
    with Largest() as largest:
        model.select(torch.randn(B, N, F), 10, GO)
    assert largest.size == 10 * B, "what is kept"


def test_the_published_slides_are_selected_from_in_goes_that_are_full(bench: Any) -> None:
    for setting in bench.selection_settings.CUDA:
        if setting.inputs == "features":
            assert setting.b * setting.n % setting.chunk == 0
            assert setting.source == "host" or setting.chunk >= 60_000


# float16


def test_every_number_of_float16_becomes_the_same_in_float32() -> None:
    rows = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, -1)
    for narrow in (rows, rows.reshape(1, -1), np.asfortranarray(rows), rows.astype(">f2")):
        out = np.empty(narrow.shape, np.float32)
        widen(narrow, out)
        np.testing.assert_array_equal(out, narrow.astype(np.float32))
    assert rows.reshape(1, -1).shape[1] > ALONE, "a row that is left to numpy is among them"


def test_float16_of_a_file_arrives_to_the_bit_in_any_order(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).standard_normal((90, 700)).astype(np.float16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=stored, chunks=(7, 700))
    torch.save(torch.from_numpy(stored), tmp_path / "a.pt")
    for name in ("a.h5", "a.pt"):
        source = FeatureOpener(tmp_path / name, name)()
        for index in (np.arange(90), np.array([5, 3, 4, 89, 0, 1])):
            found = source.read(index)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, stored[index].astype(np.float32))
        source.close()
