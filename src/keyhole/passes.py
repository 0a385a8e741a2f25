"""The two passes over a batch of images that are streamed from files: select, then take what was kept.

Letters: b image, k loose patches, m kept, c channels, h w height and width of a patch.

Both passes turn pixels into tensors with the same function and the same colour change per image, so that what is
learned from is what was selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.config import Config, RunConfig, SelectConfig
from keyhole.nn import CenterPosition, IPSClassifier, Kept, Selector, evaluating
from keyhole.nn.selection import Rule
from keyhole.patches import FileOpener, FilePatches, PatchSource, View
from keyhole.reading import Batch, Opener, Reader
from keyhole.store import ImageStore


@dataclass(frozen=True)
class Bags:
    """Kept patches of a batch, ready for `IPSClassifier.forward`.

    Attributes:
        patches: (b m c h w), zeros at padding.
        position: (b m) or (b m 2), or None where the model has no position code.
        mask: (b m) True where there is a patch.
        rows: which images of the batch these are; the others could not be read.
    """

    patches: Tensor
    position: Tensor | None
    mask: Tensor
    rows: list[int]


def opener(
    config: Config,
    store: ImageStore,
    image: Path,
    name: str,
    mpp: float | None = None,
    view: View | None = None,
    offset: tuple[int, int] = (0, 0),
) -> FileOpener:
    """What a reading thread calls to get the patches of the file `image` under a configuration's patch settings."""
    patch = config.patch
    return FileOpener(
        path=image,
        name=name,
        size=patch.size,
        stride=patch.stride,
        level=patch.level,
        mpp=patch.mpp,
        foreground=patch.foreground,
        channels=config.model.channels,
        view=view or View(),
        offset=offset,
        store=store,
        image_mpp=mpp,
    )


def open_reader(run: RunConfig, device: torch.device) -> Reader:
    """The reading threads of a run; buffers are pinned where a GPU copies from them."""

    def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        empty = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=empty, pin_memory=True).numpy()

    allocate = {"allocate": pinned} if device.type == "cuda" else {}
    return Reader(run.threads, run.ahead, run.stall, **allocate)


def to_tensor(pixels: NDArray[np.generic], device: torch.device, color: Tensor | None = None) -> Tensor:
    """Patches (k h w c) uint8 from the host -> (k c h w) float32 in 0 ... 1 on the device; features (k f) unchanged.

    Args:
        pixels: uint8 until here, so that a quarter of the bytes is copied.
        device: where the model is.
        color: (k c c+1) affine colour change of each patch, or None.
    """
    tensor = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device)
    if tensor.dtype != torch.uint8:
        return tensor.float()
    tensor = tensor.permute(0, 3, 1, 2).float().div_(255)
    if color is None:
        return tensor
    mixed = torch.einsum("kdc,kchw->kdhw", color[:, :, :-1], tensor) + color[:, :, -1, None, None]
    return mixed.clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def positions(
    model: IPSClassifier, source: PatchSource, index: NDArray[np.int64], device: torch.device
) -> Tensor | None:
    """Positions of patches as the model's code wants them: index, or centres in pixels of the patches' resolution."""
    if model.position is None:
        return None
    if isinstance(model.position, CenterPosition):
        scale = source.grid.scale if isinstance(source, FilePatches) else 1.0
        return torch.from_numpy(source.positions_2d(index) / scale).float().to(device)
    return torch.from_numpy(source.positions_1d(index)).to(device)


def select_batch(
    model: IPSClassifier,
    batch: Batch,
    m: int,
    chunk: int,
    rule: Rule = "global",
    color: Tensor | None = None,
    keep_logits: bool = False,
    on_chunk: Callable[[int], None] | None = None,
) -> list[Kept | None]:
    """First pass: looks at every patch of the batch without gradients, keeps the best m of each image.

    Args:
        model: on its device; its modes are left as they were.
        batch: streamed chunks, packed across the images.
        m: patches to keep.
        chunk: i of the streaming rule.
        rule: "global" or "streaming".
        color: (b c c+1) colour change per image.
        keep_logits: keep the logits of all patches under "streaming" too.
        on_chunk: called with the number of patches after each chunk; may raise to stop.

    Returns:
        What each image keeps; None where the image could not be read.
    """
    device = next(model.parameters()).device
    counts = [0 if source is None else len(source) for source in batch.sources]
    selector = Selector(counts, m, chunk, rule, keep_logits)
    with evaluating(model):
        for part in batch.chunks():
            image, index, count = part.image[: part.count], part.index[: part.count], part.count
            each = None if color is None else color[torch.from_numpy(image)].to(device)
            where = _packed_positions(model, batch.sources, image, index, device)
            logits = model.score(to_tensor(part.pixels[:count], device, each), where)
            selector.add(torch.from_numpy(image.copy()), torch.from_numpy(index.copy()), logits)
            if on_chunk is not None:
                on_chunk(count)
    return [None if number in batch.failed else selector.finish(number) for number in range(len(batch.names))]


def _packed_positions(
    model: IPSClassifier,
    sources: Sequence[PatchSource | None],
    image: NDArray[np.int64],
    index: NDArray[np.int64],
    device: torch.device,
) -> Tensor | None:
    if model.position is None:
        return None
    found = []
    for number in dict.fromkeys(image.tolist()):
        source = sources[number]
        assert source is not None, "a chunk holds patches of an image that failed"
        found.append(positions(model, source, index[image == number], device))
    return torch.cat([where for where in found if where is not None])


def fetch_kept(
    model: IPSClassifier, batch: Batch, kept: Sequence[Kept | None], color: Tensor | None = None
) -> tuple[Bags, list[NDArray[np.uint8] | None]]:
    """Second pass's input: the pixels of the kept patches, padded to one width.

    Returns:
        The bags, and the pixels as read for each image of the batch (None where it could not be read).
    """
    device = next(model.parameters()).device
    wanted = [np.empty(0, np.int64) if image is None else image.index.cpu().numpy() for image in kept]
    pixels = batch.fetch(wanted)
    rows = [row for row in range(len(wanted)) if row not in batch.failed and pixels[row] is not None]
    width = max((len(wanted[row]) for row in rows), default=0)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    tensors, wheres = [], []
    for place, row in enumerate(rows):
        mask[place, : len(wanted[row])] = True
        each = None if color is None else color[row].to(device).expand(len(wanted[row]), -1, -1)
        block, source = pixels[row], batch.sources[row]
        assert block is not None
        assert source is not None
        tensors.append(_padded(to_tensor(block, device, each), width))
        where = positions(model, source, wanted[row], device)
        if where is not None:
            wheres.append(_padded(where, width))
    bags = Bags(
        torch.stack(tensors) if tensors else torch.empty(0),
        torch.stack(wheres) if wheres else None,
        mask.to(device),
        rows,
    )
    return bags, pixels


def _padded(tensor: Tensor, width: int) -> Tensor:
    if len(tensor) == width:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(width - len(tensor), *tensor.shape[1:])])


@dataclass(frozen=True)
class Inference:
    """One batch after both passes: what each image kept, the bags, the pixels as read, and logits per task (rows o)."""

    batch: Batch
    kept: list[Kept | None]
    bags: Bags
    pixels: list[NDArray[np.uint8] | None]
    logits: dict[str, Tensor]


def infer(
    model: IPSClassifier,
    reader: Reader,
    batches: Sequence[Sequence[Opener]],
    select: SelectConfig,
    on_error: Literal["raise", "skip"] = "raise",
    keep_logits: bool = False,
    on_chunk: Callable[[int], None] | None = None,
) -> Iterator[Inference]:
    """Both passes in evaluation mode over many batches; used by validation, evaluation and prediction alike."""
    for batch in reader.stream(batches, select.chunk, on_error):
        kept = select_batch(model, batch, select.m, select.chunk, select.rule, None, keep_logits, on_chunk)
        bags, pixels = fetch_kept(model, batch, kept)
        with evaluating(model):
            logits = {}
            if bags.rows:
                embedding = model.embed(bags.patches, bags.mask, select.chunk)
                logits = model.classify(embedding, bags.position, bags.mask)
        yield Inference(batch, kept, bags, pixels, logits)
