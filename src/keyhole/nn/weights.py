"""Weights for an encoder: which of a file fit it, and whether timm's pretrained weights are available.

The libraries below timm retry for a minute before they fail, each with its own message. So `check_pretrained` first
checks whether the file is in the cache and, if not, whether its server answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keyhole.errors import ConfigError

PREFIXES = ("", "encoder.", "model.encoder.", "module.", "model.", "backbone.")
"""Prefixes of the names of an encoder's weights: alone, in a keyhole model, in files of other programs."""
TIMEOUT = 10.0
"""Seconds that a server has to answer."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of a model on the Hugging Face Hub, in timm's order."""


def misfits(model: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Return a phrase for each weight that is missing, left over or of another shape than in the state `model`."""
    problems = [f"{name} is missing" for name in model if name not in weights]
    problems += [f"{name} is left over" for name in weights if name not in model]
    return problems + [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(model[name].shape)}"
        for name in model
        if name in weights and weights[name].shape != model[name].shape
    ]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of weights with their names, types and shapes; files of features state their encoder's."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def encoder_part(encoder: nn.Module, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the encoder or the network `body` inside it, whichever more weights of a file fit, and those weights.

    For grey patches a first convolution of RGB is summed over the colours, as in timm.
    """
    part, found, own = encoder, dict[str, Tensor](), encoder.state_dict()
    for candidate in (encoder, getattr(encoder, "body", None)):
        if isinstance(candidate, nn.Module):
            state = candidate.state_dict()
            for prefix in PREFIXES:
                these = {name: weights[prefix + name] for name in state if prefix + name in weights}
                if len(these) > len(found):
                    part, found, own = candidate, these, state
    for name, weight in found.items():
        if weight.ndim == 4 and weight.shape[1] == 3 and own[name].shape == (len(weight), 1, *weight.shape[2:]):
            found[name] = weight.sum(dim=1, keepdim=True)
    return part, found


def check_pretrained(name: str) -> dict[str, Any]:
    """Raise ConfigError unless timm's weights for a model are in the cache or on a server that answers.

    Returns:
        `pretrained_cfg_overlay` for `timm.create_model`, which names a file in the cache, so that no network is used.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache

    config = _source(name)
    if config is None:
        return {}
    if config.hf_hub_id:
        repository, _, revision = config.hf_hub_id.partition("@")
        files = _hub_files(config)
        for file in files:
            cached = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(cached, str):  # a `custom_load` that is text names a loader of timm
                return {} if isinstance(config.custom_load, str) else {"file": cached, "custom_load": False}
        _ask(config, name, [hf_hub_url(repository, file, revision=revision or None) for file in files])
    elif not (Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]).is_file():
        _ask(config, name, [config.url])
    return {}


@contextmanager
def pretrained_faults(name: str) -> Iterator[None]:
    """Turn errors of the download and of damaged weights into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        config = _source(name)
        if config is None:  # a model that the user has registered
            raise
        raise _failed(config, name, error) from error


def _source(name: str) -> Any:
    """Return timm's description of where the weights are; None if the code of the model loads them."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or config.hf_hub_id or config.url:
        return config
    if config.file or config.state_dict is not None:
        return None
    base = name.partition(".")[0].split("_")[0]
    found = timm.list_pretrained(f"{base}*")[:3]
    hint = f"; it has some for {', '.join(found)}" if found else ""
    raise ConfigError(
        f"--model.encoder {name}: timm has no pretrained weights for it{hint}. Leave --model.pretrained off, or "
        "give your own: --model.weights FILE"
    )


def _hub_files(config: Any) -> tuple[str, ...]:
    return (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES


def _ask(config: Any, name: str, urls: list[str]) -> None:
    """Raise ConfigError unless one of the URLs answers; there is one request for each."""
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = build_hf_headers() if config.hf_hub_id else {}
    status = 0
    for url in urls:
        try:
            status = get_session().head(url, headers=headers, timeout=TIMEOUT).status_code
        except Exception as error:  # the classes differ between versions of the library
            raise _failed(config, name, error) from error
        if status < 400:
            return
    raise _failed(config, name, f"the server answers {status}")


def _failed(config: Any, name: str, reason: object) -> ConfigError:
    """Return an error that says which file to fetch and how to use it."""
    why = " ".join(str(reason).split()).rstrip(".") or type(reason).__name__
    where, form = config.url, ", as safetensors"
    if config.hf_hub_id:
        where, form = f"{_hub_files(config)[0]} of the repository {config.hf_hub_id} on the Hugging Face Hub", ""
    return ConfigError(
        f"--model.encoder {name}: its pretrained weights cannot be downloaded or loaded ({why[:200]}). "
        f"Fetch {where} where there is a network, and give it{form}: --model.weights FILE instead "
        "of --model.pretrained"
    )
