"""The gradient step on the kept patches, in chunks that are encoded twice, so that memory does not grow with B or M.

Letters: b image, m kept, k loose patches (all kept patches of the batch, without padding), d width.

First every chunk is encoded without gradient, and only its embeddings (k d) stay. Pool, heads and loss on these give
the loss and its gradient with respect to each embedding. Then each chunk is encoded again, with gradient and with the
same random draws, and the embedding's gradient is sent back through it:

    dL/dw = sum over chunks of (de_chunk/dw)^T dL/de_chunk

which is the gradient of the unsplit step wherever a patch's embedding does not depend on the other patches. Batch norm
in training mode is the exception: its statistics are those of a chunk, and its running statistics move once per chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from keyhole.engine.folding import copy_all
from keyhole.nn.classifier import IPSClassifier
from keyhole.nn.pixels import AsRead
from keyhole.nn.tensors import to_device

Fetch = Callable[[int, int], Tensor | AsRead]
"""start, stop -> those of the loose patches, (stop - start ...) on the model's device."""


def split_backward(
    model: IPSClassifier,
    patches: Fetch,
    position: Shaped[Tensor, "b m ..."] | None,
    mask: Bool[Tensor, "b m"],
    loss: Callable[[dict[str, Tensor]], Tensor],
    chunk: int | None = None,
    encode: Callable[[Tensor | AsRead], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Forward and backward over the kept patches of a batch; gradients are added to `.grad` as `backward` does.

    Args:
        model: in the mode it should learn in.
        patches: gives the loose patches, in the order of `patches[mask]`. Called once for each chunk, and a second
            time where the encoder learns and there is more than one; pixels need not be on the device in between.
        position: as in `IPSClassifier.forward`.
        mask: True where there is a patch, on the host; each image needs at least one. A mask on a GPU is copied to the
            host first, which waits for it; nothing else here does.
        loss: logits of every task -> a number.
        chunk: patches to encode at once; None encodes all at once and, as any chunk that holds all, is the ordinary
            step with nothing computed twice. See `parts`.
        encode: encodes loose patches with gradients; default `IPSClassifier.encode`.

    Returns:
        The loss, detached. Where it is not finite, neither are the gradients: look at both before the optimizer's step.

    Raises:
        Whatever the computation raises, such as an out-of-memory error. Running statistics are then as they were, so
        that the step can be repeated with a smaller chunk; gradients may be incomplete and are the caller's to drop.
    """
    mask = mask.cpu()
    spans = parts(int(mask.sum()), chunk)
    learns = any(parameter.requires_grad for parameter in model.encoder.parameters())
    encode = encode or model.encode

    def behind(embedding: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
        """Pool, heads, loss and their backward, down to where `embedding` comes from."""
        padded, there = bags_of(embedding, mask)
        value = loss(model.classify(padded, position, there))
        value.backward()
        return value.detach()

    with kept_buffers(model, on_error_only=True):
        if len(spans) > 1 and learns:
            return _twice(model.encoder, encode, patches, spans, behind)
        with torch.set_grad_enabled(learns):
            embedding = torch.cat([encode(patches(*span)) for span in spans])
        return behind(embedding)


def _twice(
    encoder: nn.Module,
    encode: Callable[[Tensor | AsRead], Tensor],
    patches: Fetch,
    spans: list[tuple[int, int]],
    behind: Callable[[Tensor], Tensor],
) -> Float[Tensor, ""]:
    """Compute the embeddings of all chunks first, then each chunk again with its part of the gradient."""
    draws: list[_Draws] = []
    rows: list[Tensor] = []
    with torch.no_grad(), kept_buffers(encoder):
        for span in spans:
            pixels = patches(*span)
            draws.append(_Draws(pixels.device))
            rows.append(encode(pixels))
            del pixels  # before the next chunk's are there
    embedding = torch.cat(rows).requires_grad_()
    del rows
    value = behind(embedding)
    if embedding.grad is None:
        return value
    after = _Draws(embedding.device)
    for span, drawn in zip(spans, draws, strict=True):
        pixels = patches(*span)
        drawn.restore()
        encode(pixels).backward(embedding.grad[slice(*span)])
        del pixels
    after.restore()
    return value


def parts(total: int, chunk: int | None) -> list[tuple[int, int]]:
    """Cuts `total` patches into spans (start, stop) of nearly equal length, none longer than `chunk`.

    Equal, since the statistics of batch norm over a short last chunk would be poor ones. Where there are two patches or
    more, so has every span, because batch norm refuses to learn from one; a chunk of 1 therefore counts as 2, and spans
    of 3 appear where the total is odd and the chunk below 3.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk (={chunk}) must be at least 1")
    count = 1 if chunk is None else max(1, min(-(-total // chunk), total // 2))
    bounds = [total * place // count for place in range(count + 1)]
    return list(pairwise(bounds))


def bags_of(
    embedding: Float[Tensor, "k d"], mask: Bool[Tensor, "b m"]
) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"] | None]:
    """Loose embeddings as bags with zeros at padding, and the mask beside them; None where nothing is padded.

    Args:
        embedding: in the order of the mask.
        mask: True where there is a patch, on the host, so that their number is known without waiting for the device.
    """
    if bool(mask.all()):
        return embedding.unflatten(0, mask.shape), None
    rows = to_device(mask.flatten().nonzero()[:, 0], embedding.device)
    flat = embedding.new_zeros(mask.numel(), embedding.shape[-1]).index_copy(0, rows, embedding)
    return flat.unflatten(0, mask.shape), to_device(mask, embedding.device)


class _Draws:
    """The state of the random generators that a module on `device` draws from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.host)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextmanager
def kept_buffers(module: nn.Module, on_error_only: bool = False) -> Iterator[None]:
    """Running statistics, and whatever else a module keeps in buffers, are afterwards as they were before.

    Args:
        module: with its submodules.
        on_error_only: keep what changed unless an exception leaves the block.
    """
    places = [(part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)]
    buffers = [buffer for _, _, buffer in places]
    copies = [torch.empty_like(buffer) for buffer in buffers]
    copy_all(copies, buffers)
    done = False
    try:
        yield
        done = True
    finally:
        if not (done and on_error_only):
            copy_all(buffers, copies)
            for part, name, buffer in places:
                setattr(part, name, buffer)  # in case it was replaced, not changed
