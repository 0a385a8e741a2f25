"""Weights and training state as safetensors, written atomically and read back before they replace the old file.

No pickle is ever read. The header of the weights holds the description of the model; `model.json` is a copy for people.
safetensors has no checksum, so the header also holds two SHA-256, one of the description and one of the description
with all tensors. Loading compares both.
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
from torch import Tensor, nn

from keyhole.errors import OutputError, RunError
from keyhole.nn.weights import encoder_part, misfits
from keyhole.util.files import atomic_file, write_atomic
from keyhole.util.wording import listed

DIGEST, INFO_DIGEST = "keyhole.sha256", "keyhole.info_sha256"
TYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
"""Names of types in the format."""
PROJECTOR = "projector."
"""What the names of a projector's weights begin with in its encoder."""
ALIGNED = 8
"""Bytes of whose multiple the header is long."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write tensors with a JSON description, atomically; if the disk returns other bytes, the old file stays."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    text = json.dumps(info)
    header = _header(plain, {"keyhole": text, INFO_DIGEST: _digest(text, {}), DIGEST: _digest(text, plain)})
    written = hashlib.sha256()

    def check(temporary: Path) -> None:
        with temporary.open("rb") as file:
            if hashlib.file_digest(file, "sha256").digest() != written.digest():
                raise OutputError(f"{path}: the disk returns other bytes than were written. Check the disk.")

    with atomic_file(path, check) as file:
        parts: list[bytes | memoryview] = [header, *map(_bytes, _in_file(plain).values())]
        for part in parts:
            written.update(part)
            file.write(part)


def _in_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the order of their bytes: large types first, so that each is aligned."""
    return dict(sorted(tensors.items(), key=lambda each: -each[1].element_size()))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return what a safetensors file has before the bytes of the tensors.

    The library copies all tensors before it writes a file: for the state of a run more than `--memory` may allow.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in _in_file(tensors).items():
        shape, stop = list(tensor.shape), start + tensor.nbytes
        entries[name] = {"dtype": TYPES[tensor.dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the host, which are not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")


def read_tensors(path: Path, remedy: str = "Copy it again.") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors on the CPU and their description, and check both; `remedy` ends the message of an error."""
    info = read_info(path, remedy)
    with _opened(path, remedy=remedy) as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if header.get(DIGEST) != _digest(header.get("keyhole", ""), tensors):
        raise RunError(f"{path}: damaged, its SHA-256 is not the one that was written with it. {remedy}")
    return tensors, info


def read_info(path: Path, remedy: str = "Copy it again.") -> dict[str, Any]:
    """Return the description and check it, without reading the tensors."""
    with _opened(path, "np", remedy) as file:  # torch would open the file twice
        header: dict[str, str] = file.metadata() or {}
    text = header.get("keyhole")
    if text is None:
        raise RunError(f"{path}: holds weights, but no keyhole model. Use --model.weights for an encoder's weights.")
    if not {DIGEST, INFO_DIGEST} <= set(header):
        raise RunError(
            f"{path}: has no SHA-256 in its header: an early keyhole wrote it, or it is damaged. "
            f"{remedy} If an early keyhole wrote it, train again."
        )
    if header[INFO_DIGEST] != _digest(text, {}):
        raise RunError(f"{path}: damaged, its description is not the one that was written. {remedy}")
    info: dict[str, Any] = json.loads(text)
    return info


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


@contextmanager
def _opened(path: Path, framework: str = "pt", remedy: str = "Copy it again.") -> Iterator[Any]:
    if not path.exists():
        raise RunError(f"{path}: there is no such file. Give a run folder, or the folder of a model.")
    if not path.is_file():
        raise RunError(f"{path}: not a regular file, expected a safetensors file")
    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: damaged or not a safetensors file ({error}). {remedy}") from error


def save_model(folder: Path, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, which is all that prediction needs, and `model.json`."""
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model.safetensors", model.state_dict(), info)
    write_atomic(folder / "model.json", json.dumps(info, indent=2) + "\n")


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    mean: Mapping[str, Tensor] | None = None,
) -> None:
    """Write everything that a run needs to continue; `mean` is that of the weights, if there is one."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"mean.{name}": tensor for name, tensor in (mean or {}).items()}
    for number, entry in optimizer.state_dict()["state"].items():
        for name, tensor in entry.items():
            tensors[f"optimizer.{number}.{name}"] = tensor
    write_tensors(path, tensors, progress)


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, remedy: str = "Copy it again."
) -> dict[str, Tensor]:
    """Load a state into model and optimizer; return the mean of the weights, empty if the file has none."""
    tensors, _ = read_tensors(path, remedy)
    weights: dict[str, Tensor] = {}
    mean: dict[str, Tensor] = {}
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "model":
            weights[rest] = tensor
        elif part == "mean":
            mean[rest] = tensor
        elif part == "optimizer":
            number, _, key = rest.partition(".")
            entries.setdefault(int(number), {})[key] = tensor
    load_weights(model, weights, path)
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    for weight, entry in optimizer.state.items():  # fused optimizers need the weight's memory layout
        for name, value in entry.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                entry[name] = torch.empty_like(weight).copy_(value)
    return mean


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load all weights of the model; RunError for a missing or unknown weight, or one of another shape."""
    problems = misfits(model.state_dict(), weights)
    if problems:
        raise RunError(f"{path}: the weights do not fit the model: {'; '.join(problems[:4])} ({len(problems)} in all)")
    model.load_state_dict(dict(weights))


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Load the weights of an encoder alone (`--model.weights`) from a run, the folder of a model or a safetensors file.

    The file holds a keyhole model, or weights under the names of the encoder or of the timm model inside it.
    """
    file, hint = weights_file(path), ""
    with _opened(file) as opened:
        described = "keyhole" in (opened.metadata() or {})
        weights = {} if described else {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if described:
        weights, info = read_tensors(file)
        hint = _encoder_hint(file, info)
    part, found = encoder_part(encoder, weights)
    own = part.state_dict()
    if not any(name.startswith(PROJECTOR) for name in found):  # a new one learns
        own = {name: weight for name, weight in own.items() if not name.startswith(PROJECTOR)}
    problems = misfits(own, found)
    if not found:
        problems = [f"expected names such as {listed(part.state_dict(), 2)}, found {listed(weights, 2) or 'nothing'}"]
    if problems:
        count = f" ({len(problems)} weights in all)" if len(problems) > 3 else ""
        raise RunError(f"{file}: the weights do not fit the model's encoder: {'; '.join(problems[:3])}{count}.{hint}")
    part.load_state_dict(found, strict=False)  # what is missing was looked at


def weights_file(path: Path) -> Path:
    """Return the file at `path`, or the best model of a folder."""
    return model_file(path) if path.is_dir() else path


def model_file(folder: Path) -> Path:
    """Return the file of the best model of a run folder, or of the model in a folder of its own."""
    for file in (folder / "best" / "model.safetensors", folder / "model.safetensors"):
        if file.is_file():
            return file
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder, expected a run folder or the folder of a model.")
    hint = "give a run folder"
    if (folder / "last.safetensors").is_file():
        begun = (folder / "metrics.csv").is_file()
        hint = "restore the folder best from a copy" if begun else "its first epoch is not finished"
    raise RunError(f"{folder}: there is no model in it (no model.safetensors); {hint}")


def _encoder_hint(file: Path, info: Mapping[str, Any]) -> str:
    """Return a sentence with the settings of a keyhole model's encoder, for the end of a message."""
    model = info.get("model")
    if not isinstance(model, Mapping):
        return ""
    if model.get("feature_width") is not None:
        raise RunError(
            f"{file}: is a model of stored features, which has no encoder of images. Give a run that learned from "
            "images."
        )
    flags = [f"--model.{name} {model[name]}" for name in ("encoder", "channels", "width", "stages") if model.get(name)]
    return f" They were made with {' '.join(flags)}." if flags else ""
