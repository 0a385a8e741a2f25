"""Patches drawn at random, whose embeddings the first pass keeps: what the kept patches are compared with.

Letters: b image, m drawn, k loose patches, d width, h head, t query.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keyhole.engine.bags import positions
from keyhole.loading import Batch
from keyhole.nn import IPSClassifier
from keyhole.nn.tensors import on_device
from keyhole.patches.grid import Index

KEYS = 2**40
"""More than the patches of an image: image * KEYS + patch is a number of its own for each patch of a batch."""


class RandomBags(NamedTuple):
    """The drawn patches of those images of a batch that have any."""

    rows: list[int]  # which images of the batch these are
    embedding: Tensor  # (k d) of loose patches
    position: Tensor | None  # (b m ...), or None where the model has no position code
    mask: Tensor  # (b m) True where there is a patch, on the host


class RandomPatches:
    """Random patches of each image of a batch that has more than `m`.

    Which these are depends on the name of the image and its number of patches alone: not on chunks, other images or the
    epoch.
    """

    def __init__(self, batch: Batch, m: int) -> None:
        self.batch = batch
        parts = [
            np.empty(0, np.int64) if source is None or len(source) <= m else draw(name, len(source), m)
            for name, source in zip(batch.names, batch.sources, strict=True)
        ]
        self._image = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self._index = np.concatenate(parts)
        self._keys = self._image * KEYS + self._index  # sorted
        self._arrived = np.zeros(len(self._keys), np.bool_)
        self._embedding: Tensor | None = None

    def take(self, image: Index, index: Index, embedding: Float[Tensor, "k d"]) -> None:
        """Keep the embeddings of those of k patches that were drawn; `image` and `index` are those of the patches."""
        keys = image * KEYS + index
        place = np.searchsorted(self._keys, keys)
        place[place == len(self._keys)] = 0
        rows = np.flatnonzero(self._keys[place] == keys) if len(self._keys) else place[:0]
        if not len(rows):
            return
        if self._embedding is None:
            self._embedding = embedding.new_zeros(len(self._keys), embedding.shape[1])
        device, place = embedding.device, place[rows]
        self._embedding.index_copy_(0, on_device(place, device), embedding.index_select(0, on_device(rows, device)))
        self._arrived[place] = True

    def bags(self, model: IPSClassifier) -> RandomBags | None:
        """Return the drawn patches that arrived, in the order of their images; None without any."""
        good = self._arrived & ~np.isin(self._image, list(self.batch.failed))
        rows, counts = np.unique(self._image[good], return_counts=True)
        if self._embedding is None or not len(rows):
            return None
        mask = np.arange(counts.max()) < counts[:, None]
        position = None
        if model.position is not None:
            sources = self.batch.sources
            found = [
                positions(model, source, self._index[good & (self._image == row)])
                for row in rows
                if (source := sources[row]) is not None
            ]
            padded = np.zeros((*mask.shape, *found[0].shape[1:]), found[0].dtype)
            padded[mask] = np.concatenate(found)
            position = on_device(padded, self._embedding.device)
        embedding = self._embedding[on_device(np.flatnonzero(good), self._embedding.device)]
        return RandomBags(rows.tolist(), embedding, position, torch.from_numpy(mask))


def draw(name: str, n: int, m: int) -> Index:
    """Return m of the n patches of an image, in order; the same ones in every call."""
    random = np.random.default_rng([zlib.crc32(name.encode(errors="surrogateescape")), n])
    return np.sort(random.choice(n, m, replace=False))


def attended_share(logits: Float[Tensor, "b m h t"], mask: Bool[Tensor, "b m"] | None) -> Float[Tensor, " b"]:
    """Return the share of the patches that the attention rests on: 1 if it is equal, 1/m if all is on one.

        exp(entropy of the attention) / m, mean over heads and queries

    >>> attended_share(torch.tensor([0.0, 0.0, -99.0, -99.0]).view(1, 4, 1, 1), None)
    tensor([0.5000])
    """
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None, None], -torch.inf)
    count = logits.shape[1] if mask is None else mask.sum(dim=1)[:, None, None]
    entropy: Tensor = torch.special.entr(logits.softmax(dim=1)).sum(dim=1)
    return (entropy.exp() / count).mean(dim=(1, 2))
