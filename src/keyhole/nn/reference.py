"""Weights of the published code -> IPSClassifier.

The published state names its parts `encoder.<place in an nn.Sequential>`, `transf.crs_attn`, `transf.mlp` and
`output_layers.<task>`; the configuration is the one the published scripts read from YAML.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keyhole.nn.attention import CrossAttentionPool
from keyhole.nn.classifier import IPSClassifier
from keyhole.nn.encoder import FeatureProjector, TimmEncoder
from keyhole.nn.position import IndexPosition
from keyhole.nn.weights import misfits
from keyhole.tasks.kinds import Task

_POOL = {
    "transf.crs_attn.q_w.weight": "query_proj.weight",
    "transf.crs_attn.k_w.weight": "key_proj.weight",
    "transf.crs_attn.v_w.weight": "value_proj.weight",
    "transf.crs_attn.fc.weight": "out_proj.weight",
    "transf.crs_attn.layer_norm.weight": "attention_norm.weight",
    "transf.crs_attn.layer_norm.bias": "attention_norm.bias",
    "transf.mlp.w_1.weight": "mlp.0.weight",
    "transf.mlp.w_1.bias": "mlp.0.bias",
    "transf.mlp.w_2.weight": "mlp.2.weight",
    "transf.mlp.w_2.bias": "mlp.2.bias",
    "transf.mlp.layer_norm.weight": "mlp_norm.weight",
    "transf.mlp.layer_norm.bias": "mlp_norm.bias",
}
_RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_PROJECTOR = {"1": "linear", "2": "norm"}


def from_reference(weights: Mapping[str, Tensor], config: Mapping[str, Any] | str) -> IPSClassifier:
    """Builds the classifier that computes what the published code computes with these weights.

    Args:
        weights: the published state; names may carry the prefix `weight.`.
        config: the published configuration, as a mapping or JSON: D, D_k, D_v, D_inner, H, n_token, n_chan_in,
            is_image, use_pos and `tasks` (each with name and token).

    Returns:
        The classifier in evaluation mode. Heads return logits, not probabilities.

    Raises:
        ValueError: a weight is missing, left over or of another shape; all such are named.
    """
    settings: Mapping[str, Any] = json.loads(config) if isinstance(config, str) else config
    state = {name.removeprefix("weight."): value for name, value in weights.items()}
    tasks = _published_tasks(settings)
    encoder, names = _encoder(state, settings)
    pool = CrossAttentionPool(
        settings["D"],
        settings["H"],
        settings["n_token"],
        settings["D_k"],
        settings["D_v"],
        settings["D_inner"],
        settings.get("dropout", 0.1),
        settings.get("attn_dropout", 0.1),
    )
    heads = {
        task["name"]: nn.Linear(settings["D"], len(_need(state, f"output_layers.{task['name']}.0.bias")))
        for task in tasks
    }
    position = IndexPosition(settings["D"]) if settings.get("use_pos") else None
    model = IPSClassifier(encoder, pool, heads, position, {task["name"]: task["token"] for task in tasks})
    names |= {old: f"pool.{new}" for old, new in _POOL.items()} | {"transf.crs_attn.q": "pool.query"}
    for task in tasks:
        for part in ("weight", "bias"):
            names[f"output_layers.{task['name']}.0.{part}"] = f"heads.{model.heads.prefix(task['name'])}{part}"
    _load(model, state, names)
    return model.eval()


def reference_tasks(weights: Mapping[str, Tensor], config: Mapping[str, Any] | str) -> tuple[Task, ...]:
    """The published tasks: softmax is multiclass, sigmoid binary (one output) or multilabel; classes are numbered."""
    settings: Mapping[str, Any] = json.loads(config) if isinstance(config, str) else config
    state = {name.removeprefix("weight."): value for name, value in weights.items()}
    tasks = []
    for task in _published_tasks(settings):
        outputs = len(_need(state, f"output_layers.{task['name']}.0.bias"))
        if task["activation"] == "softmax":
            tasks.append(Task(task["name"], "multiclass", tuple(map(str, range(outputs)))))
        elif outputs == 1:
            tasks.append(Task(task["name"], "binary", ("0", "1")))
        else:
            tasks.append(Task(task["name"], "multilabel", tuple(map(str, range(outputs)))))
    return tuple(tasks)


def _published_tasks(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tasks as a list; the published YAML has a mapping with `id` and `act_fn` instead of `token` and `activation`."""
    tasks = settings["tasks"]
    rows = list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)
    return [
        {
            "name": row["name"],
            "token": row.get("token", row.get("id", number)),
            "activation": row.get("activation", row.get("act_fn", "softmax")),
        }
        for number, row in enumerate(rows)
    ]


def _encoder(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[nn.Module, dict[str, str]]:
    """The published encoder and how its names map to ours."""
    names = {}
    if not settings["is_image"]:
        encoder: nn.Module = FeatureProjector(settings["n_chan_in"], settings["D"])
        parts, prefix = _PROJECTOR, "encoder."
    else:
        deepest = max(int(name.split(".")[1]) for name in state if name.startswith("encoder."))
        kind = "resnet50" if "encoder.4.0.conv3.weight" in state else "resnet18"
        encoder = TimmEncoder(kind, channels=settings["n_chan_in"], stages=deepest - 3, normalize=False)
        parts, prefix = _RESNET, "encoder.body."
    for name in state:
        match = re.fullmatch(r"encoder\.(\d+)\.(.+)", name)
        if match and match[1] in parts:
            names[name] = f"{prefix}{parts[match[1]]}.{match[2]}"
    return encoder, names


def _need(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the published weights lack {name!r}; found {', '.join(sorted(state)[:5])}, ...")
    return state[name]


def _load(model: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    target = model.state_dict()
    renamed = {names.get(name, name): value for name, value in state.items()}
    if "pool.query" in renamed:
        renamed["pool.query"] = renamed["pool.query"].reshape(target["pool.query"].shape)
    # a counter that plays no part when the momentum is fixed, and that early PyTorch did not store
    for name in target:
        if name.endswith("num_batches_tracked") and name not in renamed:
            renamed[name] = torch.zeros_like(target[name])
    problems = misfits(target, renamed)
    if problems:
        raise ValueError(f"the published weights do not fit the configuration: {'; '.join(problems[:8])}")
    model.load_state_dict(renamed)
