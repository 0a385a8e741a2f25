"""Batch norms folded into the layers before them, in a copy of an encoder that follows the encoder's weights.

    scale = weight / sqrt(variance + eps)          of the norm
    W'    = scale W                                of the layer
    b'    = norm's bias + (layer's bias - mean) scale

Scales and biases are computed for all layers together, and one product writes each layer's weights.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Norm = nn.modules.batchnorm._BatchNorm
"""Every batch norm of torch, and timm's, which may have an activation."""


class Pair(NamedTuple):
    """A convolution or linear layer and the batch norm that takes its output."""

    layer: nn.Conv2d | nn.Linear
    norm: Norm


class Place(NamedTuple):
    """A parameter or buffer of a module: which tensor that is may change."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.module, self.name)
        return found


class Folding:
    """Computes what each layer's weights are multiplied by, and its bias, for all layers at once."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self._sizes = [len(pair.layer.weight) for pair in pairs]
        first = pairs[0].layer.weight.detach()
        self._zeros, self._ones = (first.new_full((sum(self._sizes),), value).split(self._sizes) for value in (0, 1))
        self._eps = torch.cat([zero + pair.norm.eps for zero, pair in zip(self._zeros, pairs, strict=True)])

    def __call__(self) -> tuple[list[Tensor], list[Tensor]]:
        norms = [pair.norm for pair in self.pairs]
        scale = torch.rsqrt(self._all([norm.running_var for norm in norms]) + self._eps)
        scale = scale * self._all([norm.weight for norm in norms], self._ones)
        bias = self._all([pair.layer.bias for pair in self.pairs]) - self._all([norm.running_mean for norm in norms])
        bias = self._all([norm.bias for norm in norms]) + bias * scale
        return list(scale.split(self._sizes)), list(bias.split(self._sizes))

    def _all(self, given: Sequence[Tensor | None], default: Sequence[Tensor] | None = None) -> Tensor:
        default = default or self._zeros
        return torch.cat([one if each is None else each for each, one in zip(given, default, strict=True)])


class Follower:
    """Writes the weights and running statistics of an encoder into a copy with `names` folded, in place."""

    def __init__(self, encoder: nn.Module, copy: nn.Module, names: Sequence[tuple[str, str]]) -> None:
        self._folding = Folding([_pair(encoder, *each) for each in names]) if names else None
        there = _places(copy)
        self._folded = [(there[f"{layer}.weight"].tensor, there[f"{layer}.bias"].tensor) for layer, _ in names]
        written = {f"{layer}.{part}" for layer, _ in names for part in ("weight", "bias")}
        here = _places(encoder)
        self._plain = [(place, here[name]) for name, place in there.items() if name not in written]
        self._sources, self._first = list(here.values()), next(iter(there.values()), None)
        self._seen = self._state()

    def moved(self) -> bool:
        """Return whether the encoder is on another device than the copy."""
        return self._first is not None and self._sources[0].tensor.device != self._first.tensor.device

    def follow(self, changed_only: bool = False) -> None:
        """Take over what the encoder holds now; with `changed_only`, unless torch has counted no change."""
        state = self._state()
        if changed_only and state is not None and state == self._seen:
            return
        with torch.no_grad():
            copy_all([to.tensor for to, _ in self._plain], [of.tensor for _, of in self._plain])
            if self._folding is not None:
                scales, biases = self._folding()
                for (weight, _), pair, scale in zip(self._folded, self._folding.pairs, scales, strict=True):
                    torch.mul(pair.layer.weight, _rows(scale, weight), out=weight)
                copy_all([bias for _, bias in self._folded], biases)
        self._seen = state

    def _state(self) -> list[tuple[int, int]] | None:
        """Return the address and version of each tensor; None where torch does not count versions."""
        tensors = [source.tensor for source in self._sources]
        if any(each.is_inference() for each in tensors):
            return None
        return [(each.data_ptr(), each._version) for each in tensors]


def copy_all(there: Sequence[Tensor], here: Sequence[Tensor]) -> None:
    """Copy each of `here` into that of `there`; those of the same types in one operation.

    With several types in one call, torch 2.8 to 2.10 writes wrong values on a GPU, also past the end of a tensor.
    """
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for to, of in zip(there, here, strict=True):
        groups.setdefault((to.dtype, of.dtype), []).append((to, of))
    for group in groups.values():
        torch._foreach_copy_([to for to, _ in group], [of for _, of in group])


def fold(encoder: nn.Module, names: Sequence[tuple[str, str]]) -> None:
    """Remove the batch norms of `names` from an encoder, and fold them into the layers before them."""
    if not names:
        return
    folding = Folding([_pair(encoder, *each) for each in names])
    for (_, name), (layer, norm), scale, bias in zip(names, folding.pairs, *folding(), strict=True):
        layer.weight = nn.Parameter(layer.weight * _rows(scale, layer.weight), requires_grad=False)
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        rest = [part for each in ("drop", "act") if isinstance(part := getattr(norm, each, None), nn.Module)]
        encoder.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())


def _pair(encoder: nn.Module, layer: str, norm: str) -> Pair:
    first, second = encoder.get_submodule(layer), encoder.get_submodule(norm)
    assert isinstance(first, nn.Conv2d | nn.Linear)
    assert isinstance(second, Norm)
    return Pair(first, second)


def _rows(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def _places(module: nn.Module) -> dict[str, Place]:
    found = {}
    for prefix, part in module.named_modules():
        for name in (*part._parameters, *part._buffers):
            if getattr(part, name) is not None:
                found[f"{prefix}.{name}" if prefix else name] = Place(part, name)
    return found


def foldable_pairs(encoder: nn.Module, run: Callable[[], Tensor]) -> list[tuple[str, str]]:
    """Return the names of (convolution or linear layer, batch norm that takes its output), as a run shows them.

    Layers that are called more than once, or whose norms are, are left out.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no address is used twice
    found: list[tuple[str, str]] = []
    calls: list[str] = []
    hooks = []

    def after(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            calls.append(name)
            made[id(output)] = (name, output)

        return note

    def before(name: str, norm: Norm) -> Callable[..., None]:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls.append(name)
            if norm.running_var is not None and id(inputs[0]) in made:
                found.append((made[id(inputs[0])][0], name))

        return note

    for name, part in encoder.named_modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            hooks.append(part.register_forward_hook(after(name)))
        elif isinstance(part, Norm):
            hooks.append(part.register_forward_pre_hook(before(name, part)))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [(layer, norm) for layer, norm in found if calls.count(layer) == 1 and calls.count(norm) == 1]
