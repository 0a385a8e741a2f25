"""Bags of features cost the host little: a few operations a go, no look at single patches, and float16 read quickly."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from h5py._objects import phil
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keyhole.engine.encoders import Encoders
from keyhole.errors import ImageError
from keyhole.nn import CrossAttentionPool, FeatureProjector, IPSClassifier
from keyhole.patches.features import FeatureOpener
from keyhole.patches.features.files import MAX_CONVERTED, widen

B, N, F, GO = 4, 1000, 8, 125


@pytest.fixture(scope="module")
def bench(benchmark: Callable[[str], Any]) -> Any:
    """What counts operations."""
    return SimpleNamespace(**{name: benchmark(name) for name in ("operations", "selection_settings")})


@pytest.fixture
def encoders() -> Encoders:
    torch.manual_seed(0)
    model = IPSClassifier(FeatureProjector(F, 16), CrossAttentionPool(16, 8), {"label": nn.Linear(16, 1)})
    encoders = Encoders(model)
    encoders.fast(torch.randn(2, F))
    return encoders


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
    bench: Any, encoders: Encoders
) -> None:
    bags, model = torch.randn(B, N, F), encoders.model
    operations = bench.operations.Operations([*model.parameters(), *model.buffers(), bags])
    with operations as counted, encoders.inference():
        model.select(bags, 10, GO, encode=encoders.embed)
    goes = B * N // GO
    assert counted.total.waits == 0
    assert counted.total.launched <= 4 * goes + 9 * B + 30, "layer norm, projection, ReLU and scoring; what is kept"


def test_selecting_from_features_in_memory_the_host_looks_at_no_patch(encoders: Encoders) -> None:
    with Largest() as largest, encoders.inference():
        encoders.model.select(torch.randn(B, N, F), 10, GO, encode=encoders.embed)
    assert largest.size == 10 * B, "what is kept"


def test_the_published_slides_are_selected_from_in_goes_that_are_full(bench: Any) -> None:
    for setting in bench.selection_settings.CUDA:
        if setting.inputs == "features":
            assert setting.b * setting.n % setting.chunk == 0
            assert setting.source == "host" or setting.chunk >= 60_000


# Rows that are read from their places in the file


STORED = np.random.default_rng(0).standard_normal((150, 6)).astype(np.float32)
LAYOUTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "contiguous": (True, {}),
    "chunks of many rows": (True, {"chunks": (32, 6), "maxshape": (None, 6)}),
    "chunks of one row": (True, {"chunks": (1, 6)}),
    "one chunk": (True, {"chunks": (150, 6)}),
    "float16": (True, {"chunks": (7, 6), "dtype": "f2"}),
    "float64": (True, {"dtype": "f8"}),
    "big-endian": (False, {"dtype": ">f4"}),
    "compressed": (False, {"chunks": (32, 6), "compression": "gzip"}),
    "with checksums": (False, {"chunks": (32, 6), "fletcher32": True}),
    "rows in two chunks": (False, {"chunks": (32, 4)}),
}


@pytest.mark.parametrize("flat", [True, False], ids=["n d", "1 n d"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_stored_as_they_are_do_not_wait_for_hdf5(layout: str, flat: bool, tmp_path: Path) -> None:
    direct, options = LAYOUTS[layout]
    if not flat and "chunks" in options:
        options = options | {"chunks": (1, *options["chunks"])}
    options = {name: value for name, value in options.items() if name != "maxshape" or flat}
    with h5py.File(tmp_path / "a.h5", "w", libver=["earliest", "latest"][flat]) as file:
        stored = file.create_dataset("features", data=STORED if flat else STORED[None], **options)
        expected = stored[()].reshape(STORED.shape).astype(np.float32)
    source = FeatureOpener(tmp_path / "a.h5", "a")()
    np.testing.assert_array_equal(source.read(slice(3, 40)), expected[3:40])
    with ThreadPoolExecutor(1) as pool:
        with phil:  # what every call of HDF5 takes
            waiting = pool.submit(source.read, slice(20, 150))
            assert (wait([waiting], 20 if direct else 0.2).done == {waiting}) == direct
        np.testing.assert_array_equal(waiting.result(), expected[20:])
    for start, stop in itertools.product(range(0, 140, 9), (17, 64, 150)):
        index = np.arange(start, min(start + stop, 150))
        np.testing.assert_array_equal(source.read(index), expected[index])
    index = np.random.default_rng(1).permutation(150)
    np.testing.assert_array_equal(source.read(index), expected[index])
    source.close()
    with pytest.raises(ImageError, match="closed"):
        source.read(slice(0, 50))


def test_a_file_that_was_cut_short_while_it_was_open_says_so(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = STORED
    source = FeatureOpener(tmp_path / "a.h5", "a")()
    source.read(slice(None))
    os.truncate(tmp_path / "a.h5", (tmp_path / "a.h5").stat().st_size - 100)
    with pytest.raises(ImageError, match=r"a\.h5: .*the file ends early"):
        source.read(slice(None))
    source.read(slice(0, 100))
    source.close()


# float16


def test_every_number_of_float16_becomes_the_same_in_float32() -> None:
    rows = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, -1)
    for narrow in (rows, rows.reshape(1, -1), np.asfortranarray(rows), rows.astype(">f2")):
        out = np.empty(narrow.shape, np.float32)
        widen(narrow, out)
        np.testing.assert_array_equal(out, narrow.astype(np.float32))
    assert rows.reshape(1, -1).shape[1] > MAX_CONVERTED, "a row that is left to numpy is among them"


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
