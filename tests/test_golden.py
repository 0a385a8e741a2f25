"""Law 2: what the published code keeps and says, we keep and say, with its own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from keyhole.nn import IPSClassifier, from_reference, reference_tasks

Golden = tuple[IPSClassifier, dict[str, Tensor], dict[str, Any]]


@pytest.fixture(params=["features", "images"])
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    with safe_open(shared / "golden" / f"{request.param}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    return from_reference(weights, config), tensors, config


def sets(index: Tensor) -> list[set[int]]:
    return [set(row.tolist()) for row in index]


@pytest.mark.parametrize("rule", ["streaming", "global"])
def test_keeps_exactly_the_published_patches(golden: Golden, rule: Any) -> None:
    model, tensors, config = golden
    selection = model.select(tensors["input"], config["M"], config["I"], rule)
    assert sets(selection.index) == sets(tensors[f"kept_{rule}"])


def test_logits_and_scores_agree(golden: Golden) -> None:
    model, tensors, config = golden
    selection = model.select(tensors["input"], config["M"], chunk=7)
    assert selection.logits is not None
    torch.testing.assert_close(selection.logits, tensors["logits"], atol=1e-4, rtol=0)
    best = tensors["score_global"].gather(1, selection.index)
    torch.testing.assert_close(selection.score, best, atol=1e-6, rtol=0)
    assert (best.diff(dim=1) <= 0).all(), "best first"


def test_probabilities_agree(golden: Golden) -> None:
    model, tensors, config = golden
    index = tensors["kept_streaming"]
    kept = torch.stack([image[rows] for image, rows in zip(tensors["input"], index, strict=True)])
    with torch.no_grad():
        logits = model(kept, index if config["use_pos"] else None)
    for task in config["tasks"]:
        of = logits[task["name"]]
        probability = of.softmax(dim=-1) if task["activation"] == "softmax" else of.sigmoid()
        torch.testing.assert_close(probability, tensors[f"probability.{task['name']}"], atol=1e-5, rtol=0)


def test_tasks_follow_the_configuration(golden: Golden) -> None:
    model, tensors, config = golden
    tasks = reference_tasks(tensors, config)
    assert [task.name for task in tasks] == list(model.heads)
    assert all(task.outputs == model.heads[task.name].out_features for task in tasks)


def test_a_missing_or_wrong_weight_is_named(golden: Golden) -> None:
    _, tensors, config = golden
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    short = {name: tensor for name, tensor in weights.items() if not name.endswith("k_w.weight")}
    with pytest.raises(ValueError, match=r"pool\.key_proj\.weight is missing"):
        from_reference(short, config)
    with pytest.raises(ValueError, match="left over"):
        from_reference({**weights, "weight.extra": torch.zeros(1)}, config)
