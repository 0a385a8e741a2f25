"""Weights and training state as safetensors: written whole or not at all, read back before the old file goes.

No pickle is ever read. The description of a model travels in the header of its weights, so that one file is the truth;
`model.json` beside it is the same text for people and other tools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from keyhole.errors import OutputError, RunError
from keyhole.files import atomic_file, write_atomic
from keyhole.nn.weights import misfits


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes tensors with a JSON description to `path`, atomically, and compares what reached the disk.

    Raises:
        OutputError: no space or permission, or the disk gave back other bytes; the old file is untouched.
    """
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"keyhole": json.dumps(info)}
    )
    digest = hashlib.sha256(data).digest()

    def check(temporary: Path) -> None:
        with temporary.open("rb") as file:
            if hashlib.file_digest(file, "sha256").digest() != digest:
                raise OutputError(f"{path}: the disk gave back other bytes than were written. Check the disk.")

    with atomic_file(path, check) as file:
        file.write(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and their description.

    Raises:
        RunError: missing, damaged, or not written by keyhole.
    """
    info = read_info(path)
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 - not a mapping


def read_info(path: Path) -> dict[str, Any]:
    """The description alone, without reading the tensors.

    Raises:
        RunError: as `read_tensors`.
    """
    with _opened(path, "np") as file:  # torch would map the file a second time, by when it may be another
        text = (file.metadata() or {}).get("keyhole")
    if text is None:
        raise RunError(f"{path}: holds weights, but no keyhole model. Use --model.weights for an encoder's weights.")
    try:
        info: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise RunError(f"{path}: its description is damaged ({error}). Copy it again.") from error
    return info


@contextmanager
def _opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """An open safetensors file; whatever is wrong with it is a RunError."""
    if not path.exists():
        raise RunError(f"{path}: there is no such file. Give a run folder, or the folder of a model.")
    if not path.is_file():
        raise RunError(f"{path}: not a regular file, expected a safetensors file")
    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: damaged or not a safetensors file ({error}). Copy it again.") from error


def save_model(folder: Path, model: nn.Module, info: Mapping[str, Any]) -> None:
    """`model.safetensors` and `model.json`, which together are all that prediction needs."""
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model.safetensors", model.state_dict(), info)
    write_atomic(folder / "model.json", json.dumps(info, indent=2) + "\n")


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]) -> None:
    """Everything that a run needs to go on as if it had not stopped."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        for name, tensor in entry.items():
            tensors[f"optimizer.{number}.{name}"] = tensor
    write_tensors(path, tensors, progress)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts the state back and returns the progress that was stored with it."""
    tensors, progress = read_tensors(path)
    prefix = "model."
    load_weights(
        model, {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}, path
    )
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            entries.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Strict: every weight of the model, in its shape, and none left over.

    Raises:
        RunError: naming the file and what does not fit.
    """
    problems = misfits(model.state_dict(), weights)
    if problems:
        raise RunError(f"{path}: the weights do not fit the model: {'; '.join(problems[:4])} ({len(problems)} in all)")
    model.load_state_dict(dict(weights))


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Weights of an encoder alone (`--model.weights`), from any safetensors file under the encoder's own names.

    Raises:
        RunError: missing, damaged, or not this encoder's.
    """
    with _opened(path) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    inner = getattr(encoder, "body", encoder) if not set(weights) & set(encoder.state_dict()) else encoder
    load_weights(inner, {name: weights[name] for name in weights if name in inner.state_dict()} or weights, path)
