"""The mean of the weights is what is validated and stored; learning goes on from the last step's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import settings
from safetensors.torch import load_file

import keyhole
from keyhole.config.settings import ModelConfig
from keyhole.engine import Engine
from keyhole.nn.build import build_classifier
from keyhole.tasks.kinds import Task
from keyhole.training.average import Average

TASKS = [Task("label", "binary", ("no", "yes"))]


def weights_of(path: Path, part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(part): value for name, value in load_file(path).items() if name.startswith(part)}


def test_the_stored_model_is_the_mean_and_learning_is_as_without_one(toy: Path, tmp_path: Path) -> None:
    sections = [settings(train={"average": average, "epochs": 1, "warmup": 0}) for average in (0, 0.5)]
    plain, averaged = (keyhole.train(toy, tmp_path / str(n), **each) for n, each in enumerate(sections))
    last = [weights_of(run.path / "last.safetensors", "model.") for run in (plain, averaged)]
    assert all(torch.equal(last[0][name], value) for name, value in last[1].items())
    assert not weights_of(plain.path / "last.safetensors", "mean.")
    mean = weights_of(averaged.path / "last.safetensors", "mean.")
    stored = load_file(averaged.path / "best" / "model.safetensors")
    assert mean
    assert all(torch.equal(stored[name], value) for name, value in mean.items())
    assert any(not torch.equal(last[1][name], value) for name, value in mean.items())
    assert averaged.metrics[0]["train.loss"] == plain.metrics[0]["train.loss"]
    assert averaged.metrics[0]["val.loss"] != plain.metrics[0]["val.loss"], "validated with the mean"


def test_the_mean_forgets_as_its_decay_says_and_faster_at_first() -> None:
    model = build_classifier(ModelConfig(encoder="small", width=8), TASKS, 16)
    engine = Engine(model)
    average = Average(engine, 0.9)
    name, weight = next((name, weight) for name, weight in model.named_parameters() if weight.ndim > 1)
    expected = weight.detach().clone()
    for step in range(100):
        with torch.no_grad():
            weight.add_(0.01)
        average.add(step)
        expected.lerp_(weight.detach(), max(0.1, 9 / (10 + step)))
    torch.testing.assert_close(average.mean[name], expected)
    assert (weight - average.mean[name]).mean().item() == pytest.approx(0.01 * 0.9 / 0.1, rel=3e-2)


def test_an_error_while_the_model_has_the_mean_gives_the_weights_back() -> None:
    model = build_classifier(ModelConfig(encoder="small", width=8), TASKS, 16)
    average = Average(Engine(model), 0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    changed = {name: value.clone() for name, value in model.state_dict().items()}

    def stop() -> None:
        with average.in_place():
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
