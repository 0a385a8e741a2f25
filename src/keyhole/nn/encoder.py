"""Patches -> embeddings: a small convolutional encoder, any timm model, or a projector of stored features.

An encoder of pixels separates its normalization (`scale`, `shift`) from its network (`embed`), so that one pass
converts and normalizes uint8 pixels.

Letters: k loose patches, c channels, d width, f features.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from keyhole.nn.selection import evaluating
from keyhole.nn.weights import check_pretrained, pretrained_faults


class PixelEncoder(nn.Module, ABC):
    """An encoder of patches with values 0 ... 1, which it first normalizes to `shift + scale * value`.

    Attributes:
        dim: width d of the embeddings.
        projector: what makes them of the network's features; None where they are the features.
        scale, shift: (1 c 1 1), not saved with the weights.
        frozen_norm: batch norms keep their statistics in training too, so that both passes compute the same function.
    """

    dim: int
    scale: Tensor
    shift: Tensor
    frozen_norm: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.projector: FeatureProjector | None = None

    def normalize_by(self, mean: Float[Tensor, " c"], std: Float[Tensor, " c"]) -> None:
        """Subtract `mean` from the values and divide them by `std` before `embed`."""
        self.register_buffer("scale", (1 / std).reshape(1, -1, 1, 1).clone(), persistent=False)
        self.register_buffer("shift", (-mean / std).reshape(1, -1, 1, 1).clone(), persistent=False)

    def forward(self, patches: Float[Tensor, "k c h w"]) -> Float[Tensor, "k d"]:
        """Return the embeddings of patches with values 0 ... 1."""
        channels = self.scale.shape[1]
        if patches.ndim != 4 or patches.shape[1] != channels:
            came = tuple(patches.shape)
            raise ValueError(f"patches must be (k c h w) with c = {channels}, the encoder's `channels`, not {came}")
        return self.embed(torch.addcmul(self.shift, patches, self.scale))

    def train(self, mode: bool = True) -> "PixelEncoder":
        """Set training mode; with `frozen_norm` not for the network's batch norms, whose weights learn all the same."""
        super().train(mode)
        if self.frozen_norm:
            for part in self.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
            if self.projector is not None:
                self.projector.train(mode)
        return self

    @abstractmethod
    def embed(self, patches: Float[Tensor, "k c h w"]) -> Float[Tensor, "k d"]:
        """Return the embeddings of normalized patches."""


class SmallEncoder(PixelEncoder):
    """A few strided convolutions, for machines without a GPU and patches of at least 16 px.

    The first convolution has a stride of 4, since full-resolution maps are most of the cost of a small network. Mean
    and maximum over the last map are concatenated: the mean dilutes a small mark in a large patch, the maximum keeps
    it. The batch norm at the end spreads the embeddings of different patches apart, so that attention can distinguish
    them from the first step on; with a layer norm, a run from random weights stays at chance for far longer.

    Args:
        channels: c of the patches.
        width: channels of the first stage; each later stage doubles them.
        stages: convolutions after the first; each halves the map.

    Example:
        >>> SmallEncoder(channels=3, width=8)(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 64])
    """

    def __init__(self, channels: int = 3, width: int = 32, stages: int = 2) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(stages + 1)]
        layers: list[nn.Module] = [_block(channels, width, kernel=7, stride=4)]
        layers += [_block(a, b, kernel=3, stride=2) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*layers)
        self.dim = 2 * widths[-1]
        self.norm = nn.BatchNorm1d(self.dim)
        self.normalize_by(torch.full((channels,), 0.5), torch.full((channels,), 0.5))

    def embed(self, patches: Float[Tensor, "k c h w"]) -> Float[Tensor, "k d"]:
        features = self.body(patches)
        # in float32, since the norm enlarges small differences between patches, which bf16 rounds away
        mean = features.mean(dim=(2, 3), dtype=torch.float32)
        # The backward pass of `amax` looks for values equal to the maximum. A compiled one computes the maps again,
        # rounds differently, finds none, and divides by zero.
        largest = features.flatten(2).max(dim=2).values if torch.is_grad_enabled() else features.amax(dim=(2, 3))
        return self.norm(torch.cat([mean, largest.float()], dim=1))


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class TimmEncoder(PixelEncoder):
    """A timm model without its classifier, global-average pooled.

    Args:
        name: any name timm knows, such as `resnet18`.
        channels: c of the patches; timm adapts the first layer.
        pretrained: download timm's weights.
        stages: keep only the first stages, for models that timm can cut.
        normalize: subtract the mean and divide by the deviation that the weights were trained with.

    Raises:
        ValueError: timm does not know the name (the nearest is given), or the model has fewer stages.
        ConfigError: pretrained weights are not available, see `check_pretrained`.

    Example:
        >>> TimmEncoder("resnet18", stages=2)(torch.rand(5, 3, 64, 64)).shape
        torch.Size([5, 128])
    """

    def __init__(
        self,
        name: str,
        channels: int = 3,
        pretrained: bool = False,
        stages: int | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        import timm
        from timm.data import resolve_data_config

        if not timm.is_model(name):
            near = get_close_matches(name, ["small", "lite0", *timm.list_models()], 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"timm {timm.__version__} has no model {name!r}.{hint}")
        options: dict[str, Any] = {"num_classes": 0} if stages is None else _cut(name, stages)
        if pretrained and (overlay := check_pretrained(name)):
            options["pretrained_cfg_overlay"] = overlay
        with pretrained_faults(name) if pretrained else nullcontext():
            body: Any = timm.create_model(name, pretrained=pretrained, in_chans=channels, **options)
        self.body: nn.Module = body
        self.cut = stages is not None
        self.dim = int(
            body.feature_info.channels()[-1]
            if self.cut
            else getattr(body, "head_hidden_size", None) or body.num_features
        )
        settings = resolve_data_config({}, model=body)
        mean, std = (torch.tensor(settings[key][:3]) for key in ("mean", "std"))
        if channels != 3:
            mean, std = mean.mean().expand(channels), std.mean().expand(channels)
        if not normalize:
            mean, std = torch.zeros(channels), torch.ones(channels)
        self.normalize_by(mean, std)

    def embed(self, patches: Float[Tensor, "k c h w"]) -> Float[Tensor, "k d"]:
        x = self.body(patches)
        features: Tensor = x[0].mean(dim=(2, 3), dtype=torch.float32) if self.cut else x
        return features if self.projector is None else self.projector(features)


def _cut(name: str, stages: int) -> dict[str, Any]:
    """Return timm's options for a model's first stages."""
    import timm

    levels = len(timm.create_model(name, features_only=True).feature_info)
    stem = max(0, levels - 4)  # in most networks level 0 is a stem
    if stages + stem > levels:
        raise ValueError(f"{name} has {levels - stem} stages, not {stages}")
    return {"features_only": True, "out_indices": (stages + stem - 1,)}


class FeatureProjector(nn.Module):
    """Features -> embeddings, as published for stored features of CAMELYON16: LayerNorm, Linear, BatchNorm, ReLU.

    The layer norm has no weights, since the linear layer after it has its own. The batch norm spreads patches apart:
    without the projector one of two runs of `lite0` on photographs of cracks stayed at chance.

    Args:
        features: width f of a stored feature.
        dim: width d of the embedding; 512 as published.
    """

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.features, self.dim = features, dim
        self.linear = nn.Linear(features, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, features: Float[Tensor, "k f"]) -> Float[Tensor, "k d"]:
        """Return the embeddings of stored features."""
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"features must be (k f) with `features` f = {self.features}, not {tuple(features.shape)}")
        return F.relu(self.norm(self.linear(F.layer_norm(features, (self.features,)))))


@contextmanager
def lone_patch(encoder: nn.Module) -> Iterator[None]:
    """Make batch norms that get one value per channel use their running statistics, which stay as they are.

    With M = 1 the last step of an epoch may have one patch. The variance of one value is zero, and torch raises in
    training mode. Batch norms over maps of several pixels are not changed.
    """

    def before(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        norm.training = inputs[0].numel() != inputs[0].shape[1]

    def after(norm: nn.Module, _inputs: object, _output: object) -> None:
        norm.training = True

    norms = [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    hooks = [norm.register_forward_pre_hook(before) for norm in norms]
    hooks += [norm.register_forward_hook(after) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            norm.training = True


def multiply_adds(encoder: nn.Module, patch_shape: Sequence[int]) -> int:
    """Count the multiply-adds of convolutions and linear layers for one patch, as read: (s, s, c) or (f,)."""
    count = 0

    def note(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal count
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        count += output.numel() * math.prod(layer.weight.shape[1:])

    hooks = [part.register_forward_hook(note) for part in encoder.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    shape = (1, *patch_shape) if len(patch_shape) == 1 else (1, patch_shape[2], *patch_shape[:2])
    parameter = next(encoder.parameters())
    try:
        with evaluating(encoder):
            encoder(torch.zeros(shape, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    return count


def has_depthwise(encoder: nn.Module) -> bool:
    """Return whether there are convolutions with one filter per channel, as in EfficientNet and MobileNet."""
    convolutions = [part for part in encoder.modules() if isinstance(part, nn.Conv2d)]
    return any(layer.groups == layer.in_channels > 1 for layer in convolutions)
