"""The gradient step on the kept patches, in chunks that are encoded twice, so that memory does not grow with b or m.

Letters: b image, m kept, k loose patches (all kept patches of the batch, without padding), d width.

Every chunk is encoded without gradient, which gives the loss and its gradient with respect to each embedding. Then each
chunk is encoded again, with gradient and the same random draws:

    dL/dw = sum over chunks of (de_chunk/dw)^T dL/de_chunk

This is the gradient of the unsplit step, except for batch norm in training mode, whose statistics are those of a chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from keyhole.nn.classifier import IPSClassifier
from keyhole.nn.tensors import AsRead, copy_all, to_device

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
        patches: gives the loose patches, in the order of `mask`; called up to twice for each chunk.
        position: as in `IPSClassifier.forward`.
        mask: True where there is a patch; each image needs at least one. A mask on a GPU is copied to the host first.
        loss: logits of every task -> a number.
        chunk: patches to encode at once, see `parts`; all by default, with nothing computed twice.
        encode: encodes loose patches with gradients; default `IPSClassifier.encode`.

    Returns:
        The loss, detached. After an error, running statistics are as they were, so that the step can be repeated with a
        smaller chunk; gradients may be incomplete.
    """
    mask = mask.cpu()
    spans = parts(int(mask.sum()), chunk)
    learns = any(parameter.requires_grad for parameter in model.encoder.parameters())
    encode = encode or model.encode

    def behind(embedding: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
        """Compute the loss from the embeddings, and its gradient."""
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
            del pixels  # before those of the next chunk are fetched
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
    """Cut `total` patches into spans (start, stop) of nearly equal length, none longer than `chunk`.

    Batch norm needs spans of similar length for its statistics, and cannot learn from one patch: a chunk of 1 counts as
    2, and an odd total with a chunk below 3 has a span of 3.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk (={chunk}) must be at least 1")
    count = 1 if chunk is None else max(1, min(-(-total // chunk), total // 2))
    bounds = [total * place // count for place in range(count + 1)]
    return list(pairwise(bounds))


def bags_of(
    embedding: Float[Tensor, "k d"], mask: Bool[Tensor, "b m"]
) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"] | None]:
    """Return loose embeddings as bags with zeros at padding, and the mask (given on the host) on their device.

    The mask is None where nothing is padded.
    """
    if bool(mask.all()):
        return embedding.unflatten(0, mask.shape), None
    rows = to_device(mask.flatten().nonzero()[:, 0], embedding.device)
    flat = embedding.new_zeros(mask.numel(), embedding.shape[-1]).index_copy(0, rows, embedding)
    return flat.unflatten(0, mask.shape), to_device(mask, embedding.device)


class _Draws:
    """State of the random generators that a module on `device` draws from."""

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
    """Restore a module's buffers, such as running statistics, at the end; or only if an exception leaves the block."""
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
