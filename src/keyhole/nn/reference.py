"""Weights of the published code -> IPSClassifier.

The published state names its parts `encoder.<place in an nn.Sequential>`, `transf.crs_attn`, `transf.mlp` and
`output_layers.<task>`; the configuration is the one that the published scripts read from YAML.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keyhole.nn.attention import CrossAttentionPool
from keyhole.nn.classifier import IPSClassifier
from keyhole.nn.encoder import FeatureProjector, TimmEncoder
from keyhole.nn.position import IndexPosition
from keyhole.nn.weights import misfits
from keyhole.tasks.kinds import Task

_POOL = {
    "transf.crs_attn.q": "query",
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
    """Build the classifier that computes what the published code computes with these weights.

    Args:
        weights: the published state; names may have the prefix `weight.`.
        config: the published configuration, as a mapping or JSON: D, D_k, D_v, D_inner, H, n_token, n_chan_in,
            is_image, use_pos and `tasks` (each with name and token).

    Returns:
        The classifier in evaluation mode. Its heads return logits, not probabilities.

    Raises:
        ValueError: a weight is missing, left over or of another shape; all such are named.

    Example:
        >>> d, names = 8, ["q_w", "k_w", "v_w", "fc"]
        >>> weights = {f"transf.crs_attn.{name}.weight": torch.rand(d, d) for name in names}
        >>> weights |= {"transf.crs_attn.q": torch.rand(1, 1, d)}
        >>> weights |= {"transf.mlp.w_1.weight": torch.rand(d, d), "transf.mlp.w_2.weight": torch.rand(d, d)}
        >>> vectors = [f"transf.{part}.bias" for part in ("mlp.w_1", "mlp.w_2")] + ["encoder.1.bias"]
        >>> norms = ["transf.crs_attn.layer_norm", "transf.mlp.layer_norm", "encoder.2"]
        >>> vectors += [f"{norm}.{part}" for norm in norms for part in ("weight", "bias")]
        >>> vectors += ["encoder.2.running_mean", "encoder.2.running_var"]
        >>> weights |= {name: torch.rand(d) for name in vectors} | {"encoder.1.weight": torch.rand(d, 4)}
        >>> weights |= {"output_layers.tumor.0.weight": torch.rand(1, d), "output_layers.tumor.0.bias": torch.rand(1)}
        >>> config = {"D": d, "D_k": 4, "D_v": 4, "D_inner": d, "H": 2, "n_token": 1, "n_chan_in": 4}
        >>> config |= {"is_image": False, "tasks": [{"name": "tumor", "activation": "sigmoid"}]}
        >>> model = from_reference(weights, config)
        >>> model(torch.rand(3, 10, 4))["tumor"].shape  # 10 stored features of each of 3 images
        torch.Size([3, 1])
    """
    state, settings, tasks = _read(weights, config)
    encoder, names = _encoder(state, settings)
    dim = settings["D"]
    pool = CrossAttentionPool(
        dim,
        settings["H"],
        settings["n_token"],
        (settings["D_k"], settings["D_v"]),
        settings["D_inner"],
        settings.get("dropout", 0.1),
        settings.get("attn_dropout", 0.1),
    )
    heads = {task.name: nn.Linear(dim, task.outputs) for task in tasks}
    position = IndexPosition(dim) if settings.get("use_pos") else None
    model = IPSClassifier(encoder, pool, heads, position, {task.name: task.token for task in tasks})
    names |= {old: f"pool.{new}" for old, new in _POOL.items()}
    for number, task in enumerate(tasks):
        for part in ("weight", "bias"):
            names[f"output_layers.{task.name}.0.{part}"] = f"heads.by_task.{number}.{part}"
    state, target = {names.get(name, name): value for name, value in state.items()}, model.state_dict()
    if "pool.query" in state:
        state["pool.query"] = state["pool.query"].reshape(target["pool.query"].shape)
    # a counter without effect where the momentum is fixed, which early PyTorch did not store
    state = {name: torch.tensor(0) for name in target if name.endswith("num_batches_tracked")} | state
    if problems := misfits(target, state):
        raise ValueError(f"the published weights do not fit the configuration: {'; '.join(problems[:8])}")
    model.load_state_dict(state)
    return model.eval()


def reference_tasks(weights: Mapping[str, Tensor], config: Mapping[str, Any] | str) -> tuple[Task, ...]:
    """Return the tasks of the published code, with numbered classes.

    A task with softmax is multiclass; one with sigmoid is binary if it has one output, or else multilabel.
    The arguments are those of `from_reference`.
    """
    found = []
    for task in _read(weights, config)[2]:
        sigmoid = "binary" if task.outputs == 1 else "multilabel"
        kind = "multiclass" if task.activation == "softmax" else sigmoid
        found.append(Task(task.name, kind, tuple(map(str, range(max(2, task.outputs))))))
    return tuple(found)


class _PublishedTask(NamedTuple):
    name: str
    token: int
    activation: str
    outputs: int


def _read(
    weights: Mapping[str, Tensor], config: Mapping[str, Any] | str
) -> tuple[dict[str, Tensor], Mapping[str, Any], list[_PublishedTask]]:
    """Return the state, the settings and the tasks.

    The published YAML has tasks as a mapping, with `id` and `act_fn` instead of `token` and `activation`.
    """
    settings: Mapping[str, Any] = json.loads(config) if isinstance(config, str) else config
    state = {name.removeprefix("weight."): value for name, value in weights.items()}
    rows, tasks = settings["tasks"], []
    for number, row in enumerate(rows.values() if isinstance(rows, Mapping) else rows):
        bias = f"output_layers.{row['name']}.0.bias"
        if bias not in state:
            raise ValueError(f"the published weights lack {bias!r}; found {', '.join(sorted(state)[:5])}, ...")
        token = row.get("token", row.get("id", number))
        activation = row.get("activation", row.get("act_fn", "softmax"))
        tasks.append(_PublishedTask(row["name"], token, activation, len(state[bias])))
    return state, settings, tasks


def _encoder(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[nn.Module, dict[str, str]]:
    """Build the published encoder; also return our name of each of its published names."""
    if not settings["is_image"]:
        encoder: nn.Module = FeatureProjector(settings["n_chan_in"], settings["D"])
        parts, prefix = _PROJECTOR, "encoder."
    else:
        deepest = max(int(name.split(".")[1]) for name in state if name.startswith("encoder."))
        kind = "resnet50" if "encoder.4.0.conv3.weight" in state else "resnet18"
        encoder = TimmEncoder(kind, channels=settings["n_chan_in"], stages=deepest - 3, normalize=False)
        parts, prefix = _RESNET, "encoder.body."
    matches = (re.fullmatch(r"encoder\.(\d+)\.(.+)", name) for name in state)
    return encoder, {m[0]: f"{prefix}{parts[m[1]]}.{m[2]}" for m in matches if m and m[1] in parts}
