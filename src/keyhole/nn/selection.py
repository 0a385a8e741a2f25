"""Logits -> the M patches that are kept, under the published and under the set-independent rule.

Letters: b image, n patches, m kept, i chunk, t query, h head.

    score[n] = mean over h, t of softmax_n(logit[:,h,t])

"global" takes the softmax over all n patches of an image: the kept set is a function of the set of patches.
"streaming" takes it over the m kept and the i new ones, as published: the set depends on order and chunk when h t > 1.
A patch's logits do not depend on the others, so neither rule ever needs an embedding twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Rule = Literal["global", "streaming"]


@dataclass(frozen=True)
class Selection:
    """Kept patches of b images, best first.

    Attributes:
        index: (b m) patch indices, -1 where an image has fewer than m patches.
        score: (b m) their scores, 0 at padding.
        mask: (b m) True where a patch was kept.
        logits: (b n h t) of all patches under "global", else None; -inf at padding.
    """

    index: Int[Tensor, "b m"]
    score: Float[Tensor, "b m"]
    mask: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class Kept:
    """What one image keeps: index (m,) best first, score (m,), and logits (n h t) in order of arrival or None."""

    index: Int[Tensor, " m"]
    score: Float[Tensor, " m"]
    logits: Tensor | None = None


def scores(logits: Float[Tensor, "n h t"]) -> Float[Tensor, " n"]:
    """Mean over heads and queries of the softmax over the patches."""
    return logits.softmax(dim=0).mean(dim=(1, 2))


def best(score: Float[Tensor, " n"], m: int) -> Int[Tensor, " m"]:
    """The m highest, best first; the earlier patch wins a tie."""
    return score.argsort(descending=True, stable=True)[:m]


def explore(kept: Kept, n: int, share: float, generator: torch.Generator) -> Kept:
    """Gives a share of the kept places to patches drawn at random from all others.

    Args:
        kept: what one image keeps, best first.
        n: patches of the image.
        share: of the places, 0 ... 1.
        generator: on the host; decides what is drawn.

    Returns:
        As many indices: the best ones, then those drawn, whose score is given as 0.
    """
    m = len(kept.index)
    drawn = min(round(share * m), n - m)
    if drawn <= 0:
        return kept
    best_index = kept.index[: m - drawn]
    free = torch.ones(n, dtype=torch.bool)
    free[best_index.cpu()] = False
    others = free.nonzero()[:, 0]
    chosen = others[torch.randperm(len(others), generator=generator)[:drawn]].to(kept.index.device)
    score = torch.cat([kept.score[: m - drawn], kept.score.new_zeros(drawn)])
    return Kept(torch.cat([best_index, chosen]), score, kept.logits)


class LogitStore:
    """Logits of an image in one block made at the start: thousands of small tensors would fragment the memory.

    Args:
        n: patches that will arrive.
    """

    def __init__(self, n: int) -> None:
        self.n, self.count = n, 0
        self._index: Tensor | None = None
        self._logits: Tensor | None = None

    def add(self, index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        if self._index is None or self._logits is None:
            self._index, self._logits = index.new_empty(self.n), logits.new_empty(self.n, *logits.shape[1:])
        rows = slice(self.count, self.count + len(index))
        self._index[rows], self._logits[rows] = index, logits
        self.count += len(index)

    def all(self) -> tuple[Int[Tensor, " n"], Float[Tensor, "n h t"]]:
        assert self._index is not None, "an image without patches reached the selection"
        assert self._logits is not None
        assert self.count == self.n, f"{self.count} of {self.n} patches arrived"
        return self._index, self._logits


class GlobalRule:
    """Collects the logits of all n patches of an image, then keeps the m best."""

    def __init__(self, m: int, n: int) -> None:
        self.m = m
        self._store = LogitStore(n)

    def add(self, index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        self._store.add(index, logits)

    def finish(self) -> Kept:
        index, logits = self._store.all()
        score = scores(logits)
        kept = best(score, self.m)
        return Kept(index[kept], score[kept], logits)


class StreamingRule:
    """The published rule: the first m, then i at a time against the m at hand, whatever sizes arrive.

    Needs memory for m + i patches only, unless `store` keeps the logits of all.
    """

    def __init__(self, m: int, chunk: int, store: LogitStore | None = None) -> None:
        self.m, self.chunk = m, chunk
        self._memory: tuple[Tensor, Tensor] | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._count = 0
        self._store = store

    def add(self, index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        if self._store is not None:
            self._store.add(index, logits)
        while len(index):
            wanted = (self.m if self._memory is None else self.chunk) - self._count
            self._waiting.append((index[:wanted], logits[:wanted]))
            self._count += min(wanted, len(index))
            if wanted <= len(index):
                self._step()
            index, logits = index[wanted:], logits[wanted:]

    def _step(self) -> None:
        groups = self._waiting if self._memory is None else [self._memory, *self._waiting]
        index = torch.cat([group[0] for group in groups])
        logits = torch.cat([group[1] for group in groups])
        kept = best(scores(logits), self.m)
        self._memory, self._waiting, self._count = (index[kept], logits[kept]), [], 0

    def finish(self) -> Kept:
        if self._waiting:
            self._step()
        assert self._memory is not None, "an image without patches reached the selection"
        index, logits = self._memory
        score = scores(logits)
        order = best(score, self.m)
        return Kept(index[order], score[order], None if self._store is None else self._store.all()[1])


class Selector:
    """Hands packed chunks, which may hold patches of several images, to one rule per image.

    Args:
        counts: patches of each image.
        m: patches to keep of each.
        chunk: i of the streaming rule.
        rule: "global" or "streaming".
        keep_logits: keep the logits of all patches under "streaming" too.
    """

    def __init__(
        self, counts: Sequence[int], m: int, chunk: int, rule: Rule = "global", keep_logits: bool = False
    ) -> None:
        if m < 1 or chunk < 1:
            raise ValueError(f"m (={m}) and chunk (={chunk}) must be at least 1")
        if rule not in ("global", "streaming"):
            raise ValueError(f"rule (={rule!r}) must be 'global' or 'streaming'")
        self._rules: list[GlobalRule | StreamingRule] = [
            GlobalRule(m, n) if rule == "global" else StreamingRule(m, chunk, LogitStore(n) if keep_logits else None)
            for n in counts
        ]

    def add(self, image: Int[Tensor, " k"], index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        """Takes the logits of k patches; `image` and `index` live on the host, in order of arrival."""
        start = 0
        owners, counts = torch.unique_consecutive(image, return_counts=True)
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            self._rules[owner].add(index[start : start + count].to(logits.device), logits[start : start + count])
            start += count

    def finish(self, image: int) -> Kept:
        """What image number `image` keeps."""
        return self._rules[image].finish()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every submodule gets back the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
