"""The two passes over a batch of images that are streamed from files: select, then take what was kept.

Letters: b image, k loose patches, m kept, c channels, h w height and width of a patch.

Both passes turn pixels into tensors with the same function and the same colour change per image, so that what is
learned from is what was selected. JPEG tiles that a GPU decoded in the first pass are read again by the host for the
second, whose decoder differs a little; under `run.decode cpu` the host decodes them in both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.config.settings import Config, RunConfig, SelectConfig
from keyhole.data.item import Item
from keyhole.engine.kept import KeptPixels
from keyhole.engine.looking import Looker, on_device, rows_to_encode, timed
from keyhole.engine.memory.bill import MAX_HELD_BYTES
from keyhole.engine.memory.pace import Pace, unlimited
from keyhole.engine.memory.plan import Plan
from keyhole.engine.to_device import Stager, prefetched
from keyhole.errors import KeyholeError
from keyhole.loading import Batch, Opener, Reader
from keyhole.nn import CenterPosition, IPSClassifier, Kept, Selector
from keyhole.nn.pixels import AsRead
from keyhole.nn.split import bags_of
from keyhole.nn.tensors import host_memory, values_of
from keyhole.patches.edge import edge_for
from keyhole.patches.features import FeatureOpener, learned_origin
from keyhole.patches.image_cache import ImageCache
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import PatchSource, View
from keyhole.util.threads import default_threads
from keyhole.util.timing import Shares


@dataclass(frozen=True)
class Bags:
    """Kept patches of a batch: their pixels stay on the host and come to the device a part at a time.

    Attributes:
        position: (b m) or (b m 2), or None where the model has no position code.
        mask: (b m) True where there is a patch, on the host.
        rows: which images of the batch these are; the others could not be read.
        part: start, stop -> loose patches (stop - start) on the device, in the order of `mask`: pixels as they were
            read, or features (stop - start f). On a GPU the host does not wait for the copy.
    """

    position: Tensor | None
    mask: Tensor
    rows: list[int]
    part: Callable[[int, int], Tensor | AsRead]

    def __len__(self) -> int:
        """How many patches there are."""
        return int(self.mask.sum())

    def patches(self) -> Tensor:
        """All at once on the device, as `IPSClassifier.forward` takes them: (b m c h w), zeros at padding."""
        loose = values_of(self.part(0, len(self)))
        whole = loose.new_zeros(*self.mask.shape, *loose.shape[1:])
        whole[self.mask] = loose
        return whole


def opener(
    config: Config, store: ImageCache, item: Item, view: View | None = None, offset: tuple[int, int] = (0, 0)
) -> Opener:
    """What a reading thread calls to get the patches of `item` under a configuration's patch settings."""
    if item.features is not None:
        learned = learned_origin(config.model)
        return FeatureOpener(item.features, item.name, config.model.feature_width, learned, item.mpp)
    patch = config.patch
    return FileOpener(
        path=item.image,
        name=item.name,
        size=patch.size,
        stride=patch.stride,
        level=patch.level,
        mpp=patch.mpp,
        bits=patch.bits,
        foreground=patch.foreground,
        min_foreground=patch.min_foreground,
        mask=item.mask,
        channels=config.model.channels,
        view=view or View(),
        offset=offset,
        cache=store,
        image_mpp=item.mpp,
        edge=patch.edge,
    )


def settle_edge(config: Config, items: Sequence[Item], reader: Reader) -> tuple[Config, list[str]]:
    """The configuration with one rule for all images where `patch.edge` is `auto`: that of the first one that opens.

    A model keeps this rule for whatever images it meets later. Stored features have no border.

    Returns:
        The configuration, and lines for the log.
    """
    if config.patch.edge != "auto":
        return config, []
    store = ImageCache()
    for item in items:
        if item.features is not None:
            break
        with (
            suppress(KeyholeError),
            reader.run(item.name, partial(store.open, item.image, bits=config.patch.bits)) as image,
        ):
            edge, levels = edge_for(image), len(image.levels)
            kind = f"{levels} levels, as slides do" if levels > 1 else "one level, as photographs do"
            line = f"patch.edge auto: {edge}, since {item.name} has {kind}"
            return config.replace(patch={"edge": edge}), [line]
    return config, []


def open_reader(run: RunConfig, device: torch.device) -> Reader:
    """The reading threads of a run; buffers are pinned where a GPU copies from them."""

    def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return host_memory(shape, dtype, device).numpy()

    def tell(name: str, reason: str) -> None:
        print(f"{name}: {reason}", file=sys.stderr, flush=True)

    allocate = pinned if device.type == "cuda" else np.empty
    threads = run.threads or default_threads(beside_gpu=device.type == "cuda")
    return Reader(threads, run.ahead, run.stall, allocate, retries=run.retries, on_retry=tell)


def positions(
    model: IPSClassifier, source: PatchSource, index: NDArray[np.int64], device: torch.device
) -> Tensor | None:
    """Positions of patches as the model's code wants them: index, or centres in pixels of the patches' resolution."""
    return None if model.position is None else on_device(_positions(model, source, index), device)


def _positions(model: IPSClassifier, source: PatchSource, index: NDArray[np.int64]) -> NDArray[Any]:
    """As `positions`, on the host."""
    if isinstance(model.position, CenterPosition):
        return (source.positions_2d(index) / source.scale).astype(np.float32)
    return source.positions_1d(index)


def select_batch(
    model: IPSClassifier,
    batch: Batch,
    select: SelectConfig,
    color: Tensor | None = None,
    keep_logits: bool = False,
    on_chunk: Callable[[int], None] | None = None,
    known: Mapping[int, Kept] | None = None,
    on_image: Callable[[int, Callable[[], Kept]], None] | None = None,
    pace: Pace | None = None,
    stager: Stager | None = None,
) -> list[Kept | None]:
    """First pass: looks at every patch of the batch without gradients, keeps the best m of each image.

    Args:
        model: on its device; its modes are left as they were.
        batch: streamed chunks, packed across the images.
        select: how many to keep, by which rule.
        color: (b c c+1) colour change per image.
        keep_logits: keep the logits of all patches.
        on_chunk: called with the number of patches after each chunk; may raise to stop.
        known: what images keep of which the pass was made before; their patches are not streamed.
        on_image: called with an image's place and a function that returns what it keeps, as soon as its last patch has
            been seen. Under the rule "streaming" asking at once costs time: small images take their steps together.
        pace: how many patches are encoded at once; by default a chunk as it comes.
        stager: takes the chunks to the device, and counts where the time goes; one for all batches.

    Returns:
        What each image keeps, on the host; None where the image could not be read. On a GPU the host waits for that at
        the end, once for all images.
    """
    device = next(model.parameters()).device
    known, pace = known or {}, pace or unlimited(select)
    counts = [0 if source is None else len(source) for source in batch.sources]
    selector = Selector(counts, select.m, select.chunk or pace.plan.chunk, select.rule, keep_logits)
    reported, unread = set(known), dict.fromkeys(range(len(batch.names)), 0)
    stager = stager or Stager(device)
    looker, shares = Looker(model, color, pace, stager.shares), stager.shares
    with model.looking():
        for part, pixels in prefetched(timed(batch.chunks(), shares), stager, pace):
            image, index, count = part.image[: part.count], part.index[: part.count], part.count
            logits = looker.score(part, pixels, _packed_positions(model, batch.sources, image, index, device))
            with shares.part("scoring"):
                selector.add(torch.from_numpy(image.copy()), torch.from_numpy(index.copy()), logits)
            for number, reasons in batch.unreadable.items():
                selector.skip(torch.full((len(reasons) - unread[number],), number))
                unread[number] = len(reasons)
            if on_image is not None:
                for number in set(image.tolist()) - reported:
                    if selector.finished(number):
                        reported.add(number)
                        on_image(number, partial(selector.finish, number))
            if on_chunk is not None:
                on_chunk(count)
    numbers = [number for number in range(len(batch.names)) if number not in batch.failed]
    with shares.part("scoring"):
        found = {number: selector.finish(number) for number in numbers if number not in known}
    found = {number: known[number] for number in numbers if number in known} | _on_host(found)
    return [one if (one := found.get(row)) and len(one.index) else None for row in range(len(batch.names))]


def _on_host(kept: Mapping[int, Kept]) -> dict[int, Kept]:
    """What images keep, index and score on the host; one copy for all, which waits for the device.

    Those that keep nothing are left out.
    """
    kept = {number: image for number, image in kept.items() if len(image.index)}
    if not kept:
        return {}
    index, score = (torch.cat([getattr(image, name) for image in kept.values()]) for name in ("index", "score"))
    both = torch.stack([index.double(), score.double()]).cpu()  # holds either without rounding
    sizes = [len(image.index) for image in kept.values()]
    parts = torch.split(both[0].to(index.dtype), sizes), torch.split(both[1].to(score.dtype), sizes)
    return {
        number: replace(image, index=index, score=score)
        for (number, image), index, score in zip(kept.items(), *parts, strict=True)
    }


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
        found.append(_positions(model, source, index[image == number]))
    return on_device(np.concatenate(found), device)


def fetch_kept(
    model: IPSClassifier,
    batch: Batch,
    kept: Sequence[Kept | None],
    color: Tensor | None = None,
    hold: int = MAX_HELD_BYTES,
    together: bool = False,
) -> tuple[Bags, list[Kept | None], list[NDArray[np.uint8] | None]]:
    """Second pass's input: the kept patches, padded to one width.

    Args:
        model: on its device.
        batch: still open.
        kept: of each image, on the host as `select_batch` returns it; None where it could not be read.
        color: (b c c+1) colour change per image.
        hold: most bytes of pixels that stay in host memory; beyond that `Bags.part` reads them each time.
        together: pixels of all images lie in one block, from which `Bags.part` copies straight to the device. Not for
            callers that keep the pixels of some images: these would keep the whole block in memory.

    Returns:
        The bags; what each image really keeps, since a patch may have become unreadable after it was selected; and
        the pixels as read for each image (None where it could not be read, or where they are not held).
    """
    device = next(model.parameters()).device
    wanted = [np.empty(0, np.int64) if image is None else image.index.cpu().numpy() for image in kept]
    held = KeptPixels(batch, wanted, color, device)
    if held.nbytes <= hold:
        held.fetch(together)
    found = list(kept)
    for row, image in enumerate(kept):
        good = held.readable(row)
        if image is None or row in batch.failed or not good.any():
            found[row], good[:] = None, False
        elif not good.all():
            rows = torch.from_numpy(good).to(image.index.device)
            found[row] = replace(image, index=image.index[rows], score=image.score[rows])
        held.keep(row, good)
    wanted, rows_in = held.wanted, [row for row, image in enumerate(found) if image is not None]
    width = max((len(wanted[row]) for row in rows_in), default=0)
    mask = torch.zeros(len(rows_in), width, dtype=torch.bool)
    where: NDArray[Any] | None = None
    for place, row in enumerate(rows_in):
        mask[place, : len(wanted[row])] = True
        source = batch.sources[row]
        assert source is not None
        if model.position is not None:
            one = _positions(model, source, wanted[row])
            where = np.zeros((len(rows_in), width, *one.shape[1:]), one.dtype) if where is None else where
            where[place, : len(one)] = one
    return Bags(None if where is None else on_device(where, device), mask, rows_in, held.part), found, held.pixels


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
    on_error: Any = "raise",
    keep_logits: bool = False,
    on_chunk: Callable[[int], None] | None = None,
    pace: Pace | None = None,
    stager: Stager | None = None,
) -> Iterator[Inference]:
    """Both passes in evaluation mode over many batches; used by validation, evaluation and prediction alike."""
    pace = pace or unlimited(select)
    stager = stager or Stager(next(model.parameters()).device)
    stream = reader.stream(batches, pace.plan.chunk, on_error, pace.plan.hold, stager.deliver)
    if model.fast is not None:
        model.fast.refresh()
    for batch in timed(stream, stager.shares):
        with model.steady():
            kept = select_batch(model, batch, select, None, keep_logits, on_chunk, pace=pace, stager=stager)
            with stager.shares.part("reading"):
                bags, kept, pixels = fetch_kept(model, batch, kept)
            logits = {}
            if bags.rows:
                with model.looking():
                    embedding = torch.cat(list(_embedded(model, bags, pace, stager.shares)))
                    logits = pace.run("select", partial(_classified, model, bags, embedding))
        yield Inference(batch, kept, bags, pixels, logits)


def _classified(model: IPSClassifier, bags: Bags, embedding: Tensor, _plan: Plan) -> dict[str, Tensor]:
    padded, mask = bags_of(embedding, bags.mask)
    return model.classify(padded, bags.position, mask)


def _embedded(model: IPSClassifier, bags: Bags, pace: Pace, shares: Shares) -> Iterator[Tensor]:
    """Embeddings of the kept patches, as many at a time as the plan says."""
    start = 0
    while start < len(bags):

        def encode(plan: Plan, start: int = start) -> Tensor:
            count = min(plan.chunk, len(bags) - start)
            pixels, whole = bags.part(start, start + count), rows_to_encode(count, plan.chunk, model) == plan.chunk
            with shares.part("encoding"):
                return model.look(pixels, rows=plan.chunk if whole else 0)

        embedding = pace.run("select", encode)
        start += len(embedding)
        yield embedding
