"""The projector between a pretrained encoder and the attention: where it is, that it learns, and where its weights go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from keyhole.config.file import resolve
from keyhole.config.settings import Config, ModelConfig
from keyhole.errors import ConfigError
from keyhole.nn import IPSClassifier, build_classifier
from keyhole.nn.encoder import FeatureProjector, PixelEncoder
from keyhole.runs.checkpoint import load_encoder
from keyhole.tasks.kinds import Task
from keyhole.training.setup import new_optimizer

TASKS = [Task("label", "binary", ("no", "yes"))]
BatchNorm = torch.nn.modules.batchnorm._BatchNorm


def build(**settings: Any) -> IPSClassifier:
    return build_classifier(ModelConfig(**settings), TASKS, patch_size=32)


def projector_of(model: IPSClassifier) -> FeatureProjector:
    assert isinstance(model.encoder, PixelEncoder)
    assert model.encoder.projector is not None
    return model.encoder.projector


@pytest.mark.parametrize(
    ("settings", "projects"),
    [
        ({}, True),
        ({"projector": "none"}, False),
        ({"encoder": "small"}, False),
        ({"encoder": "resnet18"}, False),
        ({"encoder": "resnet18", "projector": "linear"}, True),
        ({"encoder": "resnet18", "weights": "run"}, True),
        ({"feature_width": 8}, False),
    ],
)
def test_encoders_that_have_learned_before_get_one(settings: dict[str, Any], projects: bool) -> None:
    assert ModelConfig(**settings).projects is projects


@pytest.mark.parametrize("recipe", ["traffic", "camelyon16", "megapixel-mnist"])
def test_the_published_recipes_have_none(recipe: str) -> None:
    assert not resolve(recipe=recipe).model.projects


def test_an_encoder_with_a_norm_of_its_own_needs_none() -> None:
    with pytest.raises(ConfigError, match="`small` ends with a batch norm of its own"):
        Config(model={"encoder": "small", "projector": "linear"})


def test_attention_takes_place_in_its_width() -> None:
    model = build(dim=64, heads=4)
    assert (model.pool.dim, projector_of(model).features, model.encoder.dim) == (64, 1280, 64)
    assert model.eval().encode(torch.rand(3, 3, 32, 32)).shape == (3, 64)


@pytest.mark.parametrize("freeze", [False, True])
def test_it_learns_at_the_full_rate_while_the_network_is_spared(freeze: bool) -> None:
    settings = {"freeze": freeze, "dim": 64, "heads": 4}
    model = build(**settings)
    config = Config(model=settings, train={"lr": 1e-3, "encoder_lr": 0.1})
    factors = {
        id(weight): group["factor"] for group in new_optimizer(config, model).param_groups for weight in group["params"]
    }
    assert {factors[id(weight)] for weight in projector_of(model).parameters()} == {1.0}
    assert isinstance(model.encoder, PixelEncoder)
    network = {factors.get(id(weight)) for weight in model.encoder.get_submodule("body").parameters()}
    assert network == ({None} if freeze else {0.1})


def test_its_batch_norm_learns_where_those_of_the_network_are_frozen() -> None:
    model = build(dim=64, heads=4).train()
    norms = {name: part.training for name, part in model.encoder.named_modules() if isinstance(part, BatchNorm)}
    assert [name for name, training in norms.items() if training] == ["projector.norm"]
    assert not any(part.training for part in model.eval().encoder.modules())


def test_weights_without_one_leave_it_new_and_weights_with_one_bring_theirs(tmp_path: Path) -> None:
    network = build(projector="none").encoder
    file = tmp_path / "network.safetensors"
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(1)
    save_file({f"encoder.{name}": tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    model = build(dim=64, heads=4)
    before = {name: tensor.clone() for name, tensor in projector_of(model).state_dict().items()}

    load_encoder(model.encoder, file)

    assert all(torch.equal(before[name], tensor) for name, tensor in projector_of(model).state_dict().items())
    taken = model.encoder.state_dict()
    assert all(torch.equal(taken[name], tensor) for name, tensor in network.state_dict().items())
    with torch.no_grad():
        projector_of(model).linear.weight.fill_(0.5)
    both = {f"encoder.{name}": tensor.contiguous() for name, tensor in model.encoder.state_dict().items()}
    save_file(both, tmp_path / "both.safetensors")
    other = build(dim=64, heads=4)
    load_encoder(other.encoder, tmp_path / "both.safetensors")
    assert torch.equal(projector_of(other).linear.weight, projector_of(model).linear.weight)
