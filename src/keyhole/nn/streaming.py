"""The published rule: the first m patches, then i at a time against the m kept so far, for many images at once.

Letters: b image, m kept, i new patches of a step, k candidates of a step, r row (a held patch), h head, t query.

A step is a dozen operations of any size. So logits wait until the batch ends or many wait; then all images take their
steps together, as the published code does with a batch in memory. What an image keeps depends neither on when they do
nor on the other images: its steps begin and end at the same patches, and padding is never kept.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from keyhole.nn.tensors import to_device

LATE = 2**14
"""Patches that may wait in addition to those of a whole step."""

Ints = NDArray[np.int64]
Best: TypeAlias = tuple[Tensor, Tensor]
"""Index and score (m,) of the patches that an image keeps, best first."""


def ranked(logits: Float[Tensor, "*b n h t"], missing: Bool[Tensor, "*b n"] | None) -> Best:
    """Return all patches of an image, or of each of b images, best first; the earlier patch wins a tie."""
    score = logits.softmax(dim=-3).mean(dim=(-2, -1))
    if missing is not None:  # a score that underflows to 0 is still better than none
        score = score.masked_fill(to_device(missing, score.device), -1.0)
    score, index = score.sort(descending=True, stable=True)
    return index, score


class StreamingRule:
    """Takes the steps of the images of a batch from any number of patches at a time.

    It holds the logits of m patches of each image, and of the patches that wait.

    Args:
        m: patches to keep of each image.
        chunk: i, the new patches of a step.
    """

    def __init__(self, m: int, chunk: int) -> None:
        self.m, self.chunk = m, chunk
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}  # of images under way: index (m,) and logits (m h t)
        self._waiting: list[tuple[Ints, Ints, Tensor]] = []  # image, index and logits of patches, in order of arrival

    needs_logits: ClassVar[bool] = False
    own_chunk: ClassVar[bool] = True
    keep_bags: ClassVar[Callable[..., Any] | None] = None

    @property
    def due(self) -> bool:
        """Return whether enough patches wait to take steps now."""
        return sum(len(image) for image, _, _ in self._waiting) > LATE + self.m + self.chunk

    def add(self, image: Int[Tensor, " k"], index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        """Take the logits of k patches; `image` and `index` live on the host, in order of arrival."""
        self._waiting.append((image.numpy(), index.numpy(), logits))

    def settle(self, ended: Collection[int]) -> dict[int, Best]:
        """Take all complete steps, and the last ones of ended images; return what those keep, and forget them."""
        if not self._waiting and not self._memory:
            return {}
        held = _Held.of(self._memory, self._waiting)
        todo = sorted(self._todo(held, ended), key=lambda each: len(each.blocks), reverse=True)
        if not todo:
            return {}
        rows = self._kept(held, todo)
        self._wait(held, todo)
        self._memory = {image: pair for image, pair in self._memory.items() if image not in ended}
        for place, each in enumerate(todo):
            if each.image not in ended:
                self._memory[each.image] = held.index[rows[place]], held.logits[rows[place]]
        return self._finished(held, rows, [each if each.image in ended else None for each in todo])

    def _todo(self, held: "_Held", ended: Collection[int]) -> list["_Todo"]:
        """Return the steps of every image that has a complete one, or has ended."""
        found = []
        order = np.argsort(held.image, kind="stable")  # an image's memory is in front of its new patches
        owners, starts = np.unique(held.image[order], return_index=True)
        for image, rows in zip(owners.tolist(), np.split(order, starts[1:]), strict=True):
            memory, new = (rows[: self.m], rows[self.m :]) if image in self._memory else (rows[:0], rows)
            first = self.chunk if len(memory) else self.m
            last = len(new)
            if image not in ended:
                last = first + (last - first) // self.chunk * self.chunk if last >= first else 0
                if not last:
                    continue
            blocks = np.split(new[:last], range(first, last, self.chunk)) if last else []
            found.append(_Todo(image, memory, blocks))
        return found

    def _kept(self, held: "_Held", todo: Sequence["_Todo"]) -> Int[Tensor, "b m"]:
        """Return the rows that each image keeps after its steps; images with more steps come first."""
        begin = [np.concatenate([each.memory, *each.blocks[:1]]) for each in todo]
        later = [
            [each.blocks[step] for each in todo if len(each.blocks) > step] for step in range(1, len(todo[0].blocks))
        ]
        tables = [held.table(begin, self.m), *map(held.table, later)]
        first, *rest = held.on_device(tables)
        stepping = sum(bool(each.blocks) for each in todo)
        kept = [first[stepping:, : self.m]] if stepping < len(todo) else []
        padded = [bool((table == held.padding).any()) for table in tables]
        rows = self._best(held, first[:stepping], padded[0])[0]
        for new, short in zip(rest, padded[1:], strict=True):
            if len(new) < len(rows):
                kept.append(rows[len(new) :])
            rows = self._best(held, torch.cat([rows[: len(new)], new], dim=1), short)[0]
        return torch.cat([rows, *reversed(kept)]) if kept else rows

    def _best(
        self, held: "_Held", rows: Int[Tensor, "b k"], padded: bool
    ) -> tuple[Int[Tensor, "b m"], Float[Tensor, "b m"]]:
        """Return the m best candidates of each image and their scores; the earlier candidate wins a tie."""
        place, score = ranked(held.logits[rows], rows == held.padding if padded else None)
        return rows.gather(1, place[:, : self.m]), score[:, : self.m]

    def _finished(self, held: "_Held", rows: Int[Tensor, "b m"], ended: Sequence["_Todo | None"]) -> dict[int, Best]:
        """Return what the ended images keep: a last ranking of their memories."""
        places = [place for place, each in enumerate(ended) if each is not None]
        if not places:
            return {}
        if len(places) < len(rows):
            rows = rows[to_device(torch.tensor(places), rows.device)]
        done = [each for each in ended if each is not None]
        rows, score = self._best(held, rows, min(each.patches for each in done) < self.m)
        index = held.index[rows]
        kept = [min(self.m, each.patches) for each in done]
        return {
            each.image: (index[place, :m], score[place, :m])
            for place, (each, m) in enumerate(zip(done, kept, strict=True))
        }

    def _wait(self, held: "_Held", todo: Sequence["_Todo"]) -> None:
        """Keep the patches that no step has taken for later."""
        taken = np.zeros(held.padding, np.bool_)
        taken[: held.memory] = True
        for each in todo:
            for block in each.blocks:
                taken[block] = True
        left = np.flatnonzero(~taken)
        image, index = held.image[left], held.patch[left - held.memory]
        logits = held.logits[to_device(torch.from_numpy(left), held.logits.device)] if len(left) else None
        self._waiting = [] if logits is None else [(image, index, logits)]


@dataclass(frozen=True)
class _Todo:
    """Steps of an image: the rows of its memory, if it has one, and the new rows of each step."""

    image: int
    memory: Ints
    blocks: list[Ints]

    @property
    def patches(self) -> int:
        return len(self.memory) + sum(map(len, self.blocks))


@dataclass(frozen=True)
class _Held:
    """All held patches, a row each: first those in the memory of their image, then those that wait, then padding."""

    image: Ints  # (r,) of each row, on the host
    patch: Ints  # index in its image of each row that waits, on the host
    memory: int  # number of rows that are in a memory
    index: Tensor  # (r + 1,) index in its image of each row, on the device
    logits: Tensor  # (r + 1, h, t); -inf in the last row, which is the padding

    @classmethod
    def of(cls, memory: dict[int, tuple[Tensor, Tensor]], waiting: Sequence[tuple[Ints, Ints, Tensor]]) -> "_Held":
        logits = [each for _, each in memory.values()] + [each for _, _, each in waiting]
        owners = [np.full(len(index), image) for image, (index, _) in memory.items()]
        patch = np.concatenate([np.empty(0, np.int64), *(index for _, index, _ in waiting)])
        device = logits[0].device
        new = to_device(torch.from_numpy(np.append(patch, -1)), device)
        return cls(
            np.concatenate([*owners, *(image for image, _, _ in waiting)]),
            patch,
            sum(map(len, owners)),
            torch.cat([*(index for index, _ in memory.values()), new]),
            torch.cat([*logits, logits[0].new_full((1, *logits[0].shape[1:]), -torch.inf)]),
        )

    @property
    def padding(self) -> int:
        return len(self.image)

    def table(self, rows: Sequence[Ints], width: int = 0) -> Ints:
        """Return the rows of several images, padded, as a table (b k) of at least `width` columns."""
        table = np.full((len(rows), max(width, *map(len, rows))), self.padding)
        for place, each in enumerate(rows):
            table[place, : len(each)] = each
        return table

    def on_device(self, tables: Sequence[Ints]) -> list[Tensor]:
        """Copy all tables at once."""
        flat = to_device(torch.from_numpy(np.concatenate([table.ravel() for table in tables])), self.index.device)
        parts = torch.split(flat, [table.size for table in tables])
        return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]
