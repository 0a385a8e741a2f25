"""Make what reads patches from the settings: openers of images, one rule for their edges, and the reading threads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keyhole.config.settings import Config, RunConfig
from keyhole.data.item import Item
from keyhole.errors import KeyholeError
from keyhole.loading import Opener, Reader
from keyhole.nn.tensors import host_memory
from keyhole.patches.edge import edge_for
from keyhole.patches.features import FeatureOpener, learned_origin
from keyhole.patches.image_cache import ImageCache
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import View
from keyhole.util.threads import default_threads


def opener(
    config: Config, store: ImageCache, item: Item, view: View | None = None, offset: tuple[int, int] = (0, 0)
) -> Opener:
    """Return the opener of the patches of `item` under the patch settings; a reading thread calls it."""
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
    """Return the configuration with one edge rule for all images where `patch.edge` is "auto", and lines for the log.

    The rule is that of the first image that opens; the model keeps it for later images. Stored features have no edge.
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
    """Start the reading threads of a run; their buffers are pinned where a GPU copies from them."""

    def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return host_memory(shape, dtype, device).numpy()

    def tell(name: str, reason: str) -> None:
        print(f"{name}: {reason}", file=sys.stderr, flush=True)

    allocate = pinned if device.type == "cuda" else np.empty
    threads = run.threads or default_threads(beside_gpu=device.type == "cuda")
    return Reader(threads, run.ahead, run.stall, allocate, retries=run.retries, on_retry=tell)
