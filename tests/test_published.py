"""The baseline of the benchmarks is the published code: it keeps, says and learns what that does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keyhole.nn import (
    CenterPosition,
    CrossAttentionPool,
    FeatureProjector,
    IndexPosition,
    IPSClassifier,
    SmallEncoder,
    from_reference,
    reference_tasks,
    total_loss,
)
from keyhole.tasks.kinds import Task

TASKS = (Task("digit", "multiclass", ("0", "1", "2")), Task("any", "multilabel", ("a", "b")))
ACTIVATIONS = {"digit": "softmax", "any": "sigmoid"}


@pytest.fixture(scope="module")
def published(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("published")


def classifier(encoder: nn.Module, dim: int, position: nn.Module | None, dropout: float = 0.0) -> IPSClassifier:
    pool = CrossAttentionPool(dim, heads=2, queries=2, dropout=dropout, attention_dropout=dropout)
    model = IPSClassifier(encoder, pool, {task.name: nn.Linear(dim, task.outputs) for task in TASKS}, position)
    with torch.no_grad():  # queries that tell patches apart, as trained ones do
        pool.query.normal_(std=3)
    return model


def images(position: nn.Module | None = None, dropout: float = 0.0) -> IPSClassifier:
    torch.manual_seed(0)
    model = classifier(SmallEncoder(1, width=8), 64, position, dropout)
    with torch.no_grad():  # running statistics that differ from a fresh batch norm's
        model.train()(torch.rand(4, 8, 1, 16, 16), torch.arange(8).expand(4, 8) if position else None)
    return model.train()


@pytest.mark.parametrize("name", ["features", "images"])
def test_keeps_and_says_what_the_published_code_does(name: str, shared: Path, published: Any) -> None:
    from safetensors import safe_open

    with safe_open(shared / "golden" / f"{name}.safetensors", "pt") as file:
        config: dict[str, Any] = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key: tensor for key, tensor in tensors.items() if key.startswith("weight.")}
    activations = {task["name"]: task["activation"] for task in config["tasks"]}
    assert list(activations) == [task.name for task in reference_tasks(weights, config)]
    network = published.published_from(from_reference(weights, config), config["M"], config["I"], activations)
    kept, codes, index = network.ips(tensors["input"])
    assert index.equal(tensors["kept_streaming"]), "the same patches, in the order of the memory"
    with torch.no_grad():
        probability = network(kept, codes)
    for task in activations:
        torch.testing.assert_close(probability[task], tensors[f"probability.{task}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", [None, IndexPosition(64)])
def test_keeps_what_keyhole_keeps_under_the_streaming_rule(position: nn.Module | None, published: Any) -> None:
    model = images(position)
    patches = torch.rand(3, 70, 1, 16, 16)
    _, _, index = published.published_from(model, 10, 16).ips(patches)
    assert index.sort().values.equal(model.select(patches, 10, 16, "streaming").index.sort().values)


def test_keeps_what_keyhole_keeps_of_features(published: Any) -> None:
    torch.manual_seed(1)
    model = classifier(FeatureProjector(40, 32), 32, None)
    features = torch.randn(2, 90, 40)
    model.train()(features[:, :20])
    network = published.published_from(model, 8, 8)
    one_by_one = network.select(features, at_once=1)[2]
    assert one_by_one.sort().values.equal(model.select(features, 8, 8, "streaming").index.sort().values)


def test_the_step_moves_the_weights_as_keyhole_does_where_the_loss_is_not_confident(published: Any) -> None:
    model = images(IndexPosition(64))
    network = published.published_from(model, 10, 16, ACTIVATIONS)
    patches = torch.rand(3, 40, 1, 16, 16)
    labels = {"digit": torch.tensor([0, 2, 1]), "any": torch.tensor([[0.0, 1], [1, 1], [0, 0]])}
    value = network.step(patches, labels, torch.optim.SGD(network.parameters(), lr=0.1))

    index = model.select(patches, 10, 16, "streaming").index
    kept = torch.stack([image[rows] for image, rows in zip(patches, index, strict=True)])
    targets = {"digit": labels["digit"][:, None].float(), "any": labels["any"]}
    loss = total_loss(TASKS, model(kept, index), targets)
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert value == pytest.approx(loss.item(), rel=1e-4)
    pairs = [
        (network.transf.crs_attn.q[0], model.pool.query),
        (network.transf.w_1.weight, model.pool.mlp[0].weight),  # type: ignore[union-attr]
        (network.encoder.body[0][0].weight, model.encoder.body[0][0].weight),  # type: ignore[index, union-attr]
    ]
    for theirs, ours in pairs:
        torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-3)


def test_a_shuffled_order_reaches_the_same_patches_with_one_head_and_query(published: Any) -> None:
    torch.manual_seed(2)
    pool = CrossAttentionPool(32, heads=1, queries=1)
    model = IPSClassifier(FeatureProjector(40, 32), pool, {"digit": nn.Linear(32, 3)}, IndexPosition(32)).eval()
    features = torch.randn(2, 90, 40)
    orders = [published.published_from(model, 8, 8, shuffle=shuffle).ips(features) for shuffle in (False, True)]
    (kept, codes, index), (shuffled, shuffled_codes, shuffled_index) = orders
    by_index, shuffled_by_index = index.argsort(), shuffled_index.argsort()
    assert index.gather(1, by_index).equal(shuffled_index.gather(1, shuffled_by_index))
    for plain, other in ((kept, shuffled), (codes, shuffled_codes)):
        torch.testing.assert_close(published.take(plain, by_index), published.take(other, shuffled_by_index))


def test_all_patches_are_kept_where_there_are_no_more_than_m(published: Any) -> None:
    patches = torch.rand(2, 5, 1, 16, 16)
    kept, codes, index = published.published_from(images(IndexPosition(64)), 8, 4).ips(patches)
    assert kept.equal(patches)
    assert codes.shape == (2, 5, 64)
    assert index.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_another_position_code_is_refused(published: Any) -> None:
    with pytest.raises(ValueError, match="CenterPosition"):
        published.published_from(classifier(SmallEncoder(1, width=8), 64, CenterPosition(64)), 8, 4)


def test_the_weights_are_copies(published: Any) -> None:
    model = images()
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = published.published_from(model, 4, 4, ACTIVATIONS)
    labels = {"digit": torch.tensor([0, 2]), "any": torch.ones(2, 2)}
    network.step(torch.rand(2, 8, 1, 16, 16), labels, torch.optim.AdamW(network.parameters()))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
