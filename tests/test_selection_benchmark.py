"""The benchmark of the selection compares what it says it compares."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keyhole.engine.device import Arithmetic
from keyhole.nn import TimmEncoder

CPU = torch.device("cpu")
MODULES = ("selection", "selection_settings", "selection_inputs", "selection_sides", "alternate")


@pytest.fixture(scope="module")
def bench(benchmark: Callable[[str], Any]) -> Any:
    """The modules of the script."""
    return SimpleNamespace(**{name: benchmark(name) for name in MODULES})


def tiny(bench: Any, **changes: Any) -> Any:
    sizes = {"b": 2, "n": 36, "m": 6, "i": 9, "size": 16, "stages": 1, "hidden": 32, "chunk": 9}
    return bench.selection_settings.mnist("tiny", "tiny", 1, **{**sizes, **changes})


@pytest.mark.parametrize("source", ["memory", "host"])
def test_both_sides_keep_the_same_patches_in_float32(bench: Any, source: str) -> None:
    setting = tiny(bench, source=source)
    inputs, model = bench.selection_inputs.make_inputs(setting, CPU), bench.selection_inputs.build(setting, CPU)
    bench.selection_inputs.settle(model, inputs.theirs.flatten(0, 1))
    theirs = bench.selection_sides.Theirs(setting, model, inputs)
    with bench.selection_sides.Ours(setting, model, inputs, CPU, Arithmetic(torch.float32, torch.float32)) as ours:
        assert bench.selection_sides.overlap(ours.select(), theirs.select()) == (1.0, 1.0)
        logits = ours.logits()
    assert logits.shape == (2, 36, 8, 4)
    assert bench.selection_sides.logits_error(logits, logits) == (0.0, 0.0)


@pytest.mark.parametrize("source", ["memory", "host"])
def test_a_step_moves_the_weights_of_the_copy_alone(bench: Any, source: str) -> None:
    setting = tiny(bench, source=source, step=True)
    inputs, model = bench.selection_inputs.make_inputs(setting, CPU), bench.selection_inputs.build(setting, CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with bench.selection_sides.Ours(setting, model, inputs, CPU, Arithmetic(torch.float32, torch.float32)) as ours:
        losses = [ours.step() for _ in range(8)]
    assert losses[-1] < losses[0], "it learns its one batch"
    assert bench.selection_sides.Theirs(setting, model, inputs).step() == pytest.approx(losses[0], rel=0.2)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_canvases_are_mostly_blank_and_noise_never_repeats(bench: Any) -> None:
    drawn = bench.selection_inputs.canvases(tiny(bench, n=900, size=50, b=1), seed=0)[0]
    blank = (drawn == drawn[:, :1, :1]).flatten(1).all(dim=1)
    assert drawn.shape == (900, 50, 50, 1)
    assert 0.5 < blank.float().mean() < 0.95
    noise = bench.selection_inputs.make_inputs(tiny(bench), CPU)
    assert len(noise.ours.flatten(0, 1).flatten(1).unique(dim=0)) == 72
    assert noise.theirs.mul(255).round().byte().permute(0, 1, 3, 4, 2).equal(noise.ours)


def test_every_chunk_of_every_setting_is_full(bench: Any) -> None:
    every = (*bench.selection_settings.CPU, *bench.selection_settings.CUDA, *bench.selection_settings.QUICK)
    assert all(setting.b * setting.n % setting.chunk == 0 for setting in every), "one static shape"
    for group in (bench.selection_settings.CPU, bench.selection_settings.CUDA, bench.selection_settings.QUICK):
        assert len({setting.name for setting in group}) == len(group)


def test_overlap_counts_each_image_on_its_own(bench: Any) -> None:
    mean, worst = bench.selection_sides.overlap(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [4, 5]]))
    assert (mean, worst) == (0.75, 0.5)


def test_a_whole_measurement_becomes_a_table(bench: Any) -> None:
    options = argparse.Namespace(rounds=1, compile="off", precision="auto", trained=1, lite0_weights=None, quick=True)
    found = [bench.selection.measure(tiny(bench, **kind), CPU, options) for kind in ({}, {"step": True})]
    lines = bench.selection.report(found, CPU, options)
    assert [each.weights for each in found[0].agreement] == ["fresh", "fresh, after 1 steps"]
    assert all(each.float32 == (1.0, 1.0) for result in found for each in result.agreement)
    assert sum(line.startswith("| tiny |") for line in lines) == 2 + 1 + 4
    assert set(found[1].seconds) == {"published", "keyhole", "learning", "own encoder"}


def test_pretrained_weights_are_taken_in_order_and_others_refused(bench: Any, tmp_path: Path) -> None:
    setting = bench.selection_settings.QUICK[-1]
    model, other = (bench.selection_inputs.build(setting, CPU, seed) for seed in (0, 1))
    state = other.encoder.body.state_dict()
    named_otherwise = {f"_{place}": tensor for place, tensor in enumerate(state.values())}
    torch.save(named_otherwise | {"_fc": torch.zeros(3)}, tmp_path / "weights.pth")
    bench.selection_inputs.load_lite0(model, tmp_path / "weights.pth")
    assert isinstance(model.encoder, TimmEncoder)
    assert all(tensor.equal(state[name]) for name, tensor in model.encoder.body.state_dict().items())
    values = model.encoder.shift + model.encoder.scale * torch.tensor(255.0 / 255)
    torch.testing.assert_close(values, torch.ones(1, 3, 1, 1))
    torch.save({"a": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="not the weights"):
        bench.selection_inputs.load_lite0(model, tmp_path / "wrong.pth")
