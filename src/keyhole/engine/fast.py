"""A copy of the encoder for the pass without gradients: batch norms folded, channels last, in bf16 where that is fast.

The copy shares nothing with the encoder that learns. `refresh` writes the current weights into it, in place: nothing is
built or compiled again. A folded batch norm is part of the layer before it:

    scale = weight / sqrt(variance + eps)          of the norm
    W'    = scale W                                of the layer
    b'    = norm's bias + (layer's bias - mean) scale

Letters: k loose patches, c channels, h w height and width, f features, d width.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keyhole.engine.compiled import Compiled
from keyhole.engine.stem import SquaresConv, fits
from keyhole.nn.classifier import encoded
from keyhole.nn.tensors import copy_all
from keyhole.util.tf32 import tf32

FOLDED_ERROR = 1e-3
"""Largest relative difference that folding may make in float32. With a larger one, the hooks did not show the network
as it is."""

SQUARES_ON = ("cuda",)
"""Devices on which `SquaresConv` is faster."""

Norm = nn.modules.batchnorm._BatchNorm
"""Every batch norm of torch, and timm's, which may have an activation."""


class FastEncoder:
    """Encodes patches without gradients, in evaluation mode.

    Args:
        encoder: on its device; stays as it is.
        precision: of convolutions and matrix products; norms that cannot be folded and the result are float32.
        compile: initial value of `compiled`.
        tf32: a GPU may round float32 to TF32, see `keyhole.util.tf32`.

    Attributes:
        compiled: whether calls go through `torch.compile`; may be set at any time.
        folded, norms: batch norms that were folded, known after the first call, and all of the encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        precision: torch.dtype = torch.float32,
        compile: bool = False,  # noqa: A002 - torch's word for it
        tf32: bool = False,
    ) -> None:
        self.encoder, self.precision, self.compiled, self.tf32 = encoder, precision, compile, tf32
        self.folded = 0
        self.norms = sum(isinstance(part, Norm) for part in encoder.modules())
        self._copy: FoldedCopy | None = None
        self._most_rows = 0
        self._stale = False

    def __call__(
        self, pixels: Tensor, color: Float[Tensor, "k c c+1"] | None = None, rows: int | None = None
    ) -> Float[Tensor, "k d"]:
        """Return the embeddings of patches.

        Args:
            pixels: (k h w c) uint8 as read from files, (k c h w) floats as the encoder takes them, or (k f) features.
            color: affine colour change of each patch; for uint8 only.
            rows: where it is compiled, fewer patches are padded to this number, so that one compilation serves; default
                is the most patches of any call, and 0 encodes uncompiled.
        """
        with torch.no_grad(), tf32(self.tf32):
            if self._copy is None:
                self._build(pixels)
            if not self.compiled or rows == 0:
                return self._encode(pixels, color)
            k = len(pixels)
            if rows is None:
                rows = self._most_rows = max(self._most_rows, k)
            if k < rows:
                pixels = torch.cat([pixels, pixels.new_zeros(rows - k, *pixels.shape[1:])])
                color = None if color is None else torch.cat([color, color.new_zeros(rows - k, *color.shape[1:])])
            return self._compiled(pixels, color)[:k]

    def _encode(self, pixels: Tensor, color: Tensor | None) -> Tensor:
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            assert self._copy is not None
            pixels = pixels if pixels.dtype == torch.uint8 else pixels.float()
            return encoded(self._copy.module, pixels, color, self.precision).float()

    def folding(self, patch_shape: Sequence[int]) -> str:
        """Return how many batch norms are folded, in words; empty where the encoder has none. Makes the copy."""
        if self._copy is None:
            dtype = torch.uint8 if len(patch_shape) > 1 else torch.float32
            with torch.no_grad():
                self._build(torch.empty(1, *patch_shape, dtype=dtype, device=next(self.encoder.parameters()).device))
        return f"{self.folded} of {self.norms} batch norms folded" if self.norms else ""

    def weights_changed(self) -> None:
        """Let the next `refresh` take over the encoder's weights.

        Torch does not count what fused optimizers, batch norm in training or writes through `.data` change. `refresh`
        finds other changes by itself.
        """
        self._stale = True

    def refresh(self) -> None:
        """Take over the encoder's weights and running statistics if they have changed, or may have."""
        if self._copy is not None and not self._copy.follow(changed_only=not self._stale):
            self._copy = None  # the next call builds it again
        self._stale = False

    def _build(self, pixels: Tensor) -> None:
        """Make the copy. It is folded where a trial shows that this does not change the result.

        The trial has statistics of its own: those of a new network change nothing, wherever its norms are.
        """
        generator = torch.Generator(pixels.device).manual_seed(0)
        shape = (2, *pixels.shape[1:])
        if pixels.dtype == torch.uint8:
            example = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=pixels.device)
        else:
            example = torch.rand(shape, generator=generator, device=pixels.device)
        trial = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        for part in trial.modules():
            if isinstance(part, Norm):
                for at, tensor in enumerate((part.running_var, part.weight, part.running_mean, part.bias)):
                    if tensor is not None:
                        steps = torch.linspace(0.7, 1.3, tensor.numel(), device=tensor.device)
                        tensor.copy_(steps if at < 2 else steps - 1.1)

        def run(module: nn.Module) -> Tensor:
            return encoded(module, example, None, torch.float32)

        with tf32(False):  # with what it rounds, folding would seem to change the result
            expected = run(trial)
            names = foldable_pairs(trial, lambda: run(trial))
            difference = run(FoldedCopy(trial, names).module) - expected
        if difference.norm() > FOLDED_ERROR * expected.norm():
            names = []
        self.folded = len(names)
        self._copy = FoldedCopy(self.encoder, names, self.precision)
        self._compiled = Compiled(self._encode, ("look", self.precision, repr(self._copy.module)))


class FoldedCopy:
    """A copy of an encoder in evaluation mode, `module`, into which `follow` writes the encoder's weights.

    `names` are pairs of a convolution or linear layer and the batch norm that is folded into it. Scales and biases are
    computed for all pairs together, and one product writes the weights of each layer.
    """

    def __init__(
        self, encoder: nn.Module, names: Sequence[tuple[str, str]], precision: torch.dtype = torch.float32
    ) -> None:
        self.module = copy.deepcopy(encoder).eval().requires_grad_(False)
        self._layers, self._norms = list[nn.Conv2d | nn.Linear](), list[Norm]()
        folded: list[nn.Conv2d | nn.Linear] = []
        for layer_name, norm_name in names:
            layer, norm = encoder.get_submodule(layer_name), encoder.get_submodule(norm_name)
            target = self.module.get_submodule(layer_name)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            assert isinstance(target, nn.Conv2d | nn.Linear)
            assert isinstance(norm, Norm)
            self._layers.append(layer)
            self._norms.append(norm)
            folded.append(target)
            target.bias = nn.Parameter(target.weight.new_zeros(len(target.weight)), requires_grad=False)
            behind = self.module.get_submodule(norm_name)
            rest = OrderedDict((each, part) for each, part in behind.named_children() if each in ("drop", "act"))
            self.module.set_submodule(norm_name, nn.Sequential(rest) if rest else nn.Identity())
        for part in self.module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.to(precision)
        self.module.to(memory_format=torch.channels_last)
        for name, part in list(self.module.named_modules()):
            if fits(part) and next(part.parameters()).device.type in SQUARES_ON:
                self.module.set_submodule(name, SquaresConv(part))
        self._weights = [target.weight for target in folded]
        self._biases = [target.bias for target in folded if target.bias is not None]

        sources, written = _places(encoder), {id(tensor) for tensor in (*self._weights, *self._biases)}
        plain = {path: held[name] for path, (held, name) in _places(self.module).items()}
        self._plain = [(tensor, sources[path]) for path, tensor in plain.items() if id(tensor) not in written]
        self._sources = list(sources.values())
        self._seen: list[tuple[int, int]] | None = None
        self._device = next((held[name].device for held, name in self._sources), None)
        self._sizes = [len(weight) for weight in self._weights]
        if names:
            first = self._layers[0].weight.detach()
            self._zeros, self._ones = (first.new_full((sum(self._sizes),), each).split(self._sizes) for each in (0, 1))
            eps = [zero + norm.eps for zero, norm in zip(self._zeros, self._norms, strict=True)]
            self._eps = torch.cat(eps)
        self.follow()

    def follow(self, changed_only: bool = False) -> bool:
        """Copy the encoder's weights; return False if the encoder is on another device than the copy.

        With `changed_only`, they are copied only if torch has counted a change, or does not count.
        """
        sources = [held[name] for held, name in self._sources]
        if sources and sources[0].device != self._device:
            return False
        counted = not any(each.is_inference() for each in sources)
        state = [(each.data_ptr(), each._version) for each in sources] if counted else None
        if changed_only and state is not None and state == self._seen:
            return True
        self._seen = state
        with torch.no_grad():
            copy_all([tensor for tensor, _ in self._plain], [held[name] for _, (held, name) in self._plain])
            if not self._layers:
                return True

            def joined(given: Sequence[Tensor | None], default: Sequence[Tensor]) -> Tensor:
                return torch.cat([one if each is None else each for each, one in zip(given, default, strict=True)])

            norms, zeros = self._norms, self._zeros
            scale = torch.rsqrt(joined([norm.running_var for norm in norms], zeros) + self._eps)
            scale = scale * joined([norm.weight for norm in norms], self._ones)
            bias = joined([layer.bias for layer in self._layers], zeros)
            bias = bias - joined([norm.running_mean for norm in norms], zeros)
            bias = joined([norm.bias for norm in norms], zeros) + bias * scale
            for weight, layer, each in zip(self._weights, self._layers, scale.split(self._sizes), strict=True):
                torch.mul(layer.weight, each.reshape(-1, *[1] * (weight.ndim - 1)), out=weight)
            copy_all(self._biases, bias.split(self._sizes))
        return True


def _places(module: nn.Module) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Return the dict and the key of each parameter and buffer by its path: the tensors may be replaced."""
    found: dict[str, tuple[Any, str]] = {}
    for prefix, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            found |= {f"{prefix}.{name}".lstrip("."): (held, name) for name in held if held[name] is not None}
    return found


def foldable_pairs(encoder: nn.Module, run: Callable[[], Tensor]) -> list[tuple[str, str]]:
    """Return the names of (convolution or linear layer, batch norm that takes its output), as a run shows them.

    Layers that are called more than once, or whose norms are, are left out.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no address is used twice
    found: list[tuple[str, str]] = []
    calls: list[str] = []

    def after(name: str, _layer: nn.Module, _inputs: object, output: Tensor) -> None:
        calls.append(name)
        made[id(output)] = name, output

    def before(name: str, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(name)
        if norm.running_var is not None and id(inputs[0]) in made:
            found.append((made[id(inputs[0])][0], name))

    with ExitStack() as hooks:
        for name, part in encoder.named_modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                hooks.enter_context(part.register_forward_hook(partial(after, name)))
            elif isinstance(part, Norm):
                hooks.enter_context(part.register_forward_pre_hook(partial(before, name)))
        run()
    return [(layer, norm) for layer, norm in found if calls.count(layer) == 1 and calls.count(norm) == 1]
