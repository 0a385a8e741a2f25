"""The kept patches of a batch: their pixels on the host, copied to the device a part at a time.

Letters: b image, m kept, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from keyhole.errors import ImageError
from keyhole.loading import Batch
from keyhole.nn import IPSClassifier, Kept
from keyhole.nn.position import takes_centers
from keyhole.nn.tensors import AsRead, as_read, host_memory, on_device, to_device
from keyhole.patches.grid import Index
from keyhole.patches.sources import PatchSource


@dataclass(frozen=True)
class Bags:
    """Kept patches of a batch: their pixels stay on the host and are copied to the device a part at a time.

    Attributes:
        position: (b m) or (b m 2), or None where the model has no position code.
        mask: (b m) True where there is a patch, on the host.
        rows: which images of the batch these are; the others could not be read.
        part: start, stop -> loose patches (stop - start) on the device, in the order of `mask`: pixels as they were
            read, or features (stop - start f). On a GPU the host does not wait for the copy.
        kept: what each image of the batch keeps, without patches that became unreadable after they were selected;
            None where the image could not be read.
        pixels: as read, for each image of the batch; None where it could not be read, or where they are not held.
    """

    position: Tensor | None
    mask: Tensor
    rows: list[int]
    part: Callable[[int, int], Tensor | AsRead]
    kept: Sequence[Kept | None] = ()
    pixels: Sequence[NDArray[Any] | None] = ()

    def __len__(self) -> int:
        """Return the number of patches."""
        return int(self.mask.sum())


def fetch_bags(
    model: IPSClassifier, batch: Batch, kept: Sequence[Kept | None], hold: int, together: bool = False
) -> Bags:
    """Fetch the kept patches of a batch, padded to one width; see `Engine.fetch`."""
    device = next(model.parameters()).device
    wanted = [np.empty(0, np.int64) if image is None else image.index.cpu().numpy() for image in kept]
    held = KeptPixels(batch, wanted, device, hold, together)
    found = list(kept)
    for row, image in enumerate(kept):
        good = held.drop_unreadable(row)
        if image is None or not good.any():
            found[row] = None
        elif not good.all():
            rows = torch.from_numpy(good).to(image.index.device)
            found[row] = replace(image, index=image.index[rows], score=image.score[rows])
    rows_in = [row for row, image in enumerate(found) if image is not None]
    lengths = [len(held.wanted[row]) for row in rows_in]
    mask = torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.long)[:, None]
    position = None
    if model.position is not None and rows_in:
        sources = batch.sources
        where = [
            torch.from_numpy(positions(model, source, held.wanted[row]))
            for row in rows_in
            if (source := sources[row]) is not None
        ]
        position = to_device(pad_sequence(where, batch_first=True), device)
    return Bags(position, mask, rows_in, held.part, found, held.pixels)


def positions(model: IPSClassifier, source: PatchSource, index: Index) -> NDArray[Any]:
    """Return positions of patches as the model's code takes them: the index, or centres in pixels of the patches."""
    if takes_centers(model.position):
        return (source.positions_2d(index) / source.scale).astype(np.float32)
    return source.positions_1d(index)


class KeptPixels:
    """The pixels of some patches of each image of a batch, which must stay open while `part` is called.

    They stay in host memory if they have at most `hold` bytes; `together` in one block, see `Engine.fetch`.

    Attributes:
        wanted: patches of each image, without those that `drop_unreadable` has removed.
        pixels: of each image (m, *patch_shape); None where there are none in memory.
    """

    def __init__(self, batch: Batch, wanted: Sequence[Index], device: torch.device, hold: int, together: bool) -> None:
        self.batch, self.wanted, self.device = batch, list(wanted), device
        self.pixels: list[NDArray[Any] | None] = [None] * len(wanted)
        self._whole: Tensor | None = None
        images = [
            (len(index), source) for index, source in zip(wanted, batch.sources, strict=True) if source is not None
        ]
        if sum(count * math.prod(source.patch_shape) * source.dtype.itemsize for count, source in images) > hold:
            return
        if together and images:
            shape, dtype = images[0][1].patch_shape, images[0][1].dtype
            self._whole = host_memory((sum(count for count, _ in images), *shape), dtype, device)
        self.pixels = batch.fetch(self.wanted, None if self._whole is None else self._whole.numpy())
        if self._whole is not None:
            # A part is elsewhere, or missing, if its image failed or was read again.
            at, end = self._whole.data_ptr(), self._whole.data_ptr() + self._whole.nbytes
            for part in self.pixels:
                if part is not None and len(part):
                    at = at + part.nbytes if part.ctypes.data == at else -1
            self._whole = self._whole if at == end else None

    def drop_unreadable(self, row: int) -> NDArray[np.bool_]:
        """Remove the patches of an image that could not be read so far, or all if it failed; return which are left."""
        good = ~np.isin(self.wanted[row], list(self.batch.unreadable.get(row, {}))) & (row not in self.batch.failed)
        if not good.all():
            block = self.pixels[row]
            self.pixels[row] = block[good] if block is not None and good.any() else None
            self.wanted[row], self._whole = self.wanted[row][good], None
        return good

    def part(self, start: int, stop: int) -> Tensor | AsRead:
        """Return the loose patches start ... stop of all images on the device, in the order of the images.

        Raises:
            ImageError: a patch that is not on the host cannot be read again.
        """
        cuts, first = dict[int, slice](), 0
        for row, index in enumerate(self.wanted):
            low, high = max(start - first, 0), min(stop - first, len(index))
            first += len(index)
            if low < high:
                cuts[row] = slice(low, high)
        color = None
        if self.batch.color is not None:
            counts = [cut.stop - cut.start for cut in cuts.values()]
            color = on_device(np.repeat(self.batch.color[list(cuts)], counts, axis=0), self.device)
        return as_read(self._joined(cuts) if self._whole is None else self._whole[start:stop], self.device, color)

    def _joined(self, cuts: dict[int, slice]) -> Tensor:
        """Return patches of all images in one tensor, from host memory or else from the files."""
        held = {row: block[cut] for row, cut in cuts.items() if (block := self.pixels[row]) is not None}
        asked = {row: self.wanted[row][cut] for row, cut in cuts.items() if row not in held}
        if asked:
            nothing = np.empty(0, np.int64)
            read = self.batch.fetch([asked.get(row, nothing) for row in range(len(self.wanted))])
            for row, index in asked.items():
                block, unreadable = read[row], self.batch.unreadable.get(row, {})
                if block is None or np.isin(index, list(unreadable)).any():
                    reason = [*unreadable.values(), self.batch.failed.get(row)][0]
                    name = self.batch.names[row]
                    raise ImageError(name, f"a patch that was selected cannot be read again ({reason})")
                held[row] = block
        blocks = [held[row] for row in cuts]
        whole = host_memory((sum(map(len, blocks)), *blocks[0].shape[1:]), blocks[0].dtype, self.device)
        np.concatenate(blocks, out=whole.numpy())
        return whole
