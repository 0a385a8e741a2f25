"""A copy of the encoder for the pass without gradients: batch norms folded, channels last, in bf16 where that is fast.

The copy shares nothing with the encoder that learns. `refresh` writes the current weights into it, in place: nothing is
built or compiled again.

Letters: k loose patches, c channels, h w height and width, f features, d width.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keyhole.engine.compiled import Compiled
from keyhole.engine.folding import Follower, Norm, fold, foldable_pairs
from keyhole.nn.classifier import encoded
from keyhole.util.tf32 import tf32

FOLDED_ERROR = 1e-3
"""Largest relative difference that folding may make in float32; beyond it the network is not what its hooks showed."""


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
        self._copy: nn.Module | None = None
        self._follower: Follower | None = None
        self._compiled: dict[int, Compiled] = {}
        self._rows = 0
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
                rows = self._rows = max(self._rows, k)
            rows = max(rows, k)
            if rows not in self._compiled:
                self._compiled[rows] = Compiled(self._encode, ("look", rows, self.precision, repr(self._copy)))
            color = None if color is None else _filled(color, rows)
            return self._compiled[rows](_filled(pixels, rows), color)[:k]

    def _encode(self, pixels: Tensor, color: Tensor | None) -> Tensor:
        with torch.autocast(pixels.device.type, self.precision, enabled=self.precision != torch.float32):
            assert self._copy is not None
            pixels = pixels if pixels.dtype == torch.uint8 else pixels.float()
            return encoded(self._copy, pixels, color, self.precision).float()

    def folding(self, patch_shape: Sequence[int]) -> str:
        """Return how many batch norms are folded, in words; empty where the encoder has none. Makes the copy."""
        if self._copy is None:
            dtype = torch.uint8 if len(patch_shape) > 1 else torch.float32
            with torch.no_grad():
                self._build(torch.empty(1, *patch_shape, dtype=dtype, device=next(self.encoder.parameters()).device))
        return f"{self.folded} of {self.norms} batch norms folded" if self.norms else ""

    def weights_changed(self) -> None:
        """Let the next `refresh` take over the encoder's weights.

        Torch does not count what fused optimizers, batch norm in training or writes through `.data` change. Other
        changes `refresh` sees by itself.
        """
        self._stale = True

    def refresh(self) -> None:
        """Take over the encoder's weights and running statistics if they have changed, or may have."""
        if self._follower is not None:
            if self._follower.moved():
                self._copy = self._follower = None  # the next call builds it again
                self._compiled.clear()
            else:
                self._follower.follow(changed_only=not self._stale)
        self._stale = False

    def _build(self, pixels: Tensor) -> None:
        """Make the copy, folded where that does not change the result."""
        generator = torch.Generator(pixels.device).manual_seed(0)
        shape = (2, *pixels.shape[1:])
        if pixels.dtype == torch.uint8:
            example = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=pixels.device)
        else:
            example = torch.rand(shape, generator=generator, device=pixels.device)
        whole = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        with tf32(False):  # with what it rounds, folding would seem to change the result
            names = self._foldable(whole, lambda module: encoded(module, example, None, torch.float32))
        self.folded = len(names)
        fold(whole, names)
        for layer in whole.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(self.precision)
        self._copy = whole.to(memory_format=torch.channels_last)
        self._follower = Follower(self.encoder, self._copy, names)

    @staticmethod
    def _foldable(encoder: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[tuple[str, str]]:
        """Return the pairs of layers to fold: all that a run shows, or none if folding changes the result.

        The trial has statistics of its own: those of a new network change nothing, wherever its norms stand.
        """
        trial = copy.deepcopy(encoder)
        for part in trial.modules():
            if isinstance(part, Norm):
                for at, tensor in enumerate((part.running_var, part.weight, part.running_mean, part.bias)):
                    if tensor is not None:
                        steps = torch.linspace(0.7, 1.3, tensor.numel(), device=tensor.device)
                        tensor.copy_(steps if at < 2 else steps - 1.1)
        expected = run(trial)
        pairs = foldable_pairs(trial, lambda: run(trial))
        fold(trial, pairs)
        changed = (run(trial) - expected).norm() > FOLDED_ERROR * expected.norm()
        return [] if changed else pairs


def _filled(tensor: Tensor, rows: int) -> Tensor:
    return (
        tensor if len(tensor) == rows else torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])
    )
