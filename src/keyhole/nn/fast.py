"""The encoder as it looks at all patches: a folded copy in fast arithmetic, which follows the weights as they change.

    batch norm folded into the layer before it   fewer passes over the maps
    channels last, bf16                          what matrix units want
    uint8 -> normalized values in one pass       a quarter of the bytes until then
    compiled for one static shape                where it pays, see `keyhole.compiling`

The copy shares nothing with the encoder that learns. `refresh` writes the current weights into it, in place: nothing is
built or compiled again.

Letters: k loose patches, c channels, h w height and width, f features, d width.
"""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keyhole.nn.compiled import Compiled
from keyhole.nn.encoder import PixelEncoder
from keyhole.nn.pixels import prepare

Norm = nn.modules.batchnorm._BatchNorm
"""Every batch norm of torch, and timm's, which are kinds of it and may have an activation."""

FOLDED_ERROR = 1e-3
"""Largest relative difference that folding may make in float32; beyond it the network is not what its hooks showed."""


def encoded(encoder: Callable[..., Tensor], pixels: Tensor, color: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What an encoder makes of patches, normalized in the pass that makes numbers of uint8 pixels where it allows that.

    Args:
        encoder: of patches (k ...).
        pixels: (k h w c) uint8 as read from files, (k c h w) floats as the encoder takes them, or (k f) features.
        color: affine colour change (k c c+1) of each patch; for uint8 only.
        dtype: of the numbers.
    """
    if pixels.dtype != torch.uint8:
        return encoder(pixels)
    if isinstance(encoder, PixelEncoder):
        return encoder.embed(prepare(pixels, color, dtype, encoder.scale, encoder.shift))
    return encoder(prepare(pixels, color))


class FastEncoder:
    """Looks at patches without gradients, in evaluation mode.

    Args:
        encoder: with its weights on its device; stays as it is.
        precision: torch.float32 or torch.bfloat16, of convolutions and matrix products; norms that cannot be folded
            and the result are float32.

    Attributes:
        compiled: whether calls go through `torch.compile`; may be set at any time. Each number of rows is compiled
            once, see `__call__`.
        folded: batch norms that were folded, known after the first call.
    """

    def __init__(
        self,
        encoder: nn.Module,
        precision: torch.dtype = torch.float32,
        compile: bool = False,  # noqa: A002 - torch's word for it
    ) -> None:
        self.encoder, self.precision, self.compiled = encoder, precision, compile
        self.folded = 0
        self._copy: nn.Module | None = None
        self._names: list[tuple[str, str]] = []
        self._pairs: list[tuple[nn.Module, nn.Module, tuple[Tensor, ...]]] = []
        self._plain: list[tuple[Tensor, Tensor]] = []
        self._compiled: dict[int, Compiled] = {}
        self._rows = 0

    def __call__(
        self, pixels: Tensor, color: Float[Tensor, "k c c+1"] | None = None, rows: int | None = None
    ) -> Float[Tensor, "k d"]:
        """Embeddings of patches.

        Args:
            pixels: on the encoder's device: (k h w c) uint8 as read from files, (k c h w) floats as the encoder takes
                them, or (k f) features.
            color: affine colour change of each patch; for uint8 only.
            rows: where it is compiled, fewer patches are filled up with zeros to this number, so that one compilation
                serves; the number that the memory plan allows at a time. Default: the most patches of any call.
        """
        with torch.no_grad():
            if self._copy is None:
                self._build(pixels)
            if not self.compiled:
                return self._look(pixels, color)
            k = len(pixels)
            if rows is None:
                rows = self._rows = max(self._rows, k)
            rows = max(rows, k)
            if rows not in self._compiled:
                self._compiled[rows] = Compiled(self._look)
            color = None if color is None else _filled(color, rows)
            return self._compiled[rows](_filled(pixels, rows), color)[:k]

    def _look(self, pixels: Tensor, color: Tensor | None) -> Tensor:
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            assert self._copy is not None
            pixels = pixels if pixels.dtype == torch.uint8 else pixels.float()
            return encoded(self._copy, pixels, color, self.precision).float()

    def refresh(self) -> None:
        """Takes over the encoder's weights and running statistics as they are now."""
        if self._copy is None:
            return
        with torch.no_grad():
            if self._plain:
                torch._foreach_copy_([there for there, _ in self._plain], [here for _, here in self._plain])
            for layer, norm, there in self._pairs:
                for tensor, value in zip(there, _folded(layer, norm), strict=True):
                    tensor.copy_(value)

    def _build(self, pixels: Tensor) -> None:
        """The copy, folded where that leaves the result as it is."""
        generator = torch.Generator(pixels.device).manual_seed(0)
        shape = (2, *pixels.shape[1:])
        if pixels.dtype == torch.uint8:
            example = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=pixels.device)
        else:
            example = torch.rand(shape, generator=generator, device=pixels.device)
        whole = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        self._names = self._foldable(whole, lambda module: encoded(module, example, None, torch.float32))
        self.folded = len(self._names)
        _fold(whole, self._names)
        for layer in whole.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(self.precision)
        self._copy = whole.to(memory_format=torch.channels_last)
        self._link()

    @staticmethod
    def _foldable(encoder: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[tuple[str, str]]:
        """The pairs of layers to fold: all that a run shows, or none if folding changes what comes out.

        It is tried with other statistics: those of a new network change nothing, wherever its norms stand.
        """
        trial = copy.deepcopy(encoder)
        for part in trial.modules():
            if isinstance(part, Norm):
                for at, tensor in enumerate((part.running_var, part.weight, part.running_mean, part.bias)):
                    if tensor is not None:
                        steps = torch.linspace(0.7, 1.3, tensor.numel(), device=tensor.device)
                        tensor.copy_(steps if at < 2 else steps - 1.1)
        expected = run(trial)
        pairs = _pairs(trial, lambda: run(trial))
        _fold(trial, pairs)
        changed = (run(trial) - expected).norm() > FOLDED_ERROR * expected.norm()
        return [] if changed else pairs

    def _link(self) -> None:
        """Which weight of the copy follows which of the encoder."""
        assert self._copy is not None
        here = dict(self.encoder.named_parameters()) | dict(self.encoder.named_buffers())
        there = dict(self._copy.named_parameters()) | dict(self._copy.named_buffers())
        self._pairs = [
            (
                self.encoder.get_submodule(before),
                self.encoder.get_submodule(behind),
                tuple(there[f"{before}.{part}"] for part in ("weight", "bias")),
            )
            for before, behind in self._names
        ]
        changed = {f"{before}.{part}" for before, _ in self._names for part in ("weight", "bias")}
        self._plain = [(tensor, here[name]) for name, tensor in there.items() if name not in changed]


def _fold(encoder: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Takes the batch norms of `pairs` out of an encoder, and gives the layers before them their weights."""
    for before, behind in pairs:
        layer, norm = encoder.get_submodule(before), encoder.get_submodule(behind)
        weight, bias = _folded(layer, norm)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        rest = [part for name in ("drop", "act") if isinstance(part := getattr(norm, name, None), nn.Module)]
        encoder.set_submodule(behind, nn.Sequential(*rest) if rest else nn.Identity())


def _filled(tensor: Tensor, rows: int) -> Tensor:
    """With rows of zeros at the end, so that there are `rows`."""
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _folded(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that does what `layer` and `norm` do one after the other."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert isinstance(norm, Norm)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    bias = bias * scale if norm.bias is None else norm.bias + bias * scale
    return layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)), bias


def _pairs(encoder: nn.Module, run: Callable[[], Tensor]) -> list[tuple[str, str]]:
    """Names of (convolution or linear layer, batch norm that takes its output), as a run shows them.

    A layer that is called more than once, or whose norm is, is left out.
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


class CompiledEncoder:
    """The encoder where it learns: compiled for the first sizes it is given, as it is for all others.

    The last batch of an epoch, and images with few patches, give sizes of their own; each would cost a compilation.

    Args:
        encoder: in the mode it should learn in.
        most: sizes to compile for.
    """

    def __init__(self, encoder: nn.Module, most: int = 2) -> None:
        self.encoder, self.most = encoder, most
        self._compiled: dict[tuple[int, ...], Compiled] = {}

    def __call__(self, patches: Tensor, color: Float[Tensor, "k c c+1"] | None = None) -> Float[Tensor, "k d"]:
        """Embeddings of patches, see `encoded`."""
        size = tuple(patches.shape)
        if size not in self._compiled and len(self._compiled) < self.most:
            self._compiled[size] = Compiled(self._encode)
        found: Tensor = self._compiled.get(size, self._encode)(patches, color)
        return found

    def forget(self) -> None:
        """Compiles for the sizes that come next: after memory ran out, those before do not come again."""
        self._compiled.clear()

    def _encode(self, patches: Tensor, color: Tensor | None) -> Tensor:
        return encoded(self.encoder, patches, color, torch.float32)
