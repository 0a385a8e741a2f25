"""Logits -> the M patches that are kept, under the published and under the set-independent rule.

Letters: b image, n patches, m kept, i chunk, t query, h head.

    score[n] = mean over h, t of softmax_n(logit[:,h,t])

"global" takes the softmax over all n patches of an image: the kept set is a function of the set of patches.
"streaming" takes it over the m kept and the i new ones, as published: the set depends on order and chunk when h t > 1.
A patch's logits do not depend on the others, so neither rule ever needs an embedding twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
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
    """What one image keeps; nothing where no patch of it arrived.

    Attributes:
        index: (m,) patch indices, best first.
        score: (m,) their scores.
        logits: (n h t) of all patches by their index, -inf where a patch never arrived; None unless asked for.
        arrived: (n,) on the host, False where a patch never arrived (it could not be read); None if all did.
    """

    index: Int[Tensor, " m"]
    score: Float[Tensor, " m"]
    logits: Float[Tensor, "n h t"] | None = None
    arrived: Bool[Tensor, " n"] | None = None


def scores(logits: Float[Tensor, "n h t"]) -> Float[Tensor, " n"]:
    """Mean over heads and queries of the softmax over the patches."""
    return logits.softmax(dim=0).mean(dim=(1, 2))


def best(score: Float[Tensor, " n"], m: int) -> Int[Tensor, " m"]:
    """The m highest, best first; the earlier patch wins a tie."""
    return score.argsort(descending=True, stable=True)[:m]


def explore(
    kept: Kept,
    n: int,
    share: float,
    generator: torch.Generator,
    available: Tensor | None = None,
    places: int | None = None,
) -> Kept:
    """Gives a share of the kept places to patches drawn at random from all others.

    Args:
        kept: what one image keeps, best first.
        n: patches of the image.
        share: of the places, 0 ... 1.
        generator: on the host; decides what is drawn.
        available: (n,) False where a patch must not be drawn; default `kept.arrived`.
        places: to fill; default as many as are kept.

    Returns:
        As many indices: the best ones, then those drawn, whose score is given as 0.
    """
    available = kept.arrived if available is None else available
    free = torch.ones(n, dtype=torch.bool) if available is None else available.cpu().clone()
    m = len(kept.index) if places is None else places
    drawn = min(round(share * m), int(free.sum()) - m) if places is None else min(m, int(free.sum()))
    if drawn <= 0:
        return kept
    best_index = kept.index[: m - drawn]
    free[best_index.cpu()] = False
    others = free.nonzero()[:, 0]
    chosen = others[torch.randperm(len(others), generator=generator)[:drawn]].to(kept.index.device)
    score = torch.cat([kept.score[: m - drawn], kept.score.new_zeros(drawn)])
    return replace(kept, index=torch.cat([best_index, chosen]), score=score)


def _on(index: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for what the device is at."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


class LogitStore:
    """Logits of an image by patch index, in one block: thousands of small tensors would fragment the memory.

    The block is made when the first patch arrives, so that images that wait for their turn take none.

    Args:
        n: patches of the image.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.logits: Tensor | None = None

    def add(self, index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        if self.logits is None:
            self.logits = logits.new_full((self.n, *logits.shape[1:]), -torch.inf)
        first, last = int(index[0]), int(index[-1])
        if last - first == len(index) - 1 and bool((index[1:] > index[:-1]).all()):
            self.logits[first : last + 1] = logits  # patches mostly come in order: nothing has to reach the device
        else:
            self.logits[_on(index, logits.device)] = logits


class GlobalRule:
    """Collects the logits of an image's patches, in any order, then keeps the m best of those that arrived."""

    def __init__(self, m: int, n: int) -> None:
        self.m = m
        self.store = LogitStore(n)

    def add(self, index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        self.store.add(index, logits)

    def finish(self, arrived: Bool[Tensor, " n"] | None) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """Index and score of the kept.

        Args:
            arrived: on the host, False where a patch never came; None if all did.
        """
        assert self.store.logits is not None
        score = scores(self.store.logits)
        if arrived is None:
            index = best(score, self.m)
        else:  # a score that underflows to 0 is still better than none
            ranked = score.masked_fill(~arrived.to(score.device), -1.0)
            index = best(ranked, min(self.m, int(arrived.sum())))
        return index, score[index]


def whole_bags(
    loose: Sequence[Float[Tensor, "_ h t"]],
    mask: Bool[Tensor, "b n"] | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Float[Tensor, "b n h t"]:
    """Logits of loose patches as bags; -inf at padding.

    Args:
        loose: one tensor after the other, in the order of the mask.
        mask: True where there is a patch; None where none is missing.
        shape: b, n, h, t.
        device: of the result.
    """
    if mask is None and loose:
        return torch.cat(list(loose)).unflatten(0, shape[:2])
    bags = torch.full(shape, -torch.inf, device=device)
    if mask is not None and loose:
        bags[mask.to(device)] = torch.cat(list(loose))
    return bags


def keep_global(logits: Float[Tensor, "b n h t"], m: int, mask: Bool[Tensor, "b n"] | None = None) -> Selection:
    """What `GlobalRule` keeps of images whose logits are all there: the host looks at no patch.

    Args:
        logits: -inf at padding.
        m: patches to keep.
        mask: True where there is a patch; None where none is missing.
    """
    b, n = logits.shape[:2]
    index = torch.full((b, min(m, n)), -1, dtype=torch.long, device=logits.device)
    score = torch.zeros(index.shape, device=logits.device)
    counts = [n] * b if mask is None else mask.sum(dim=1).tolist()
    mask = None if mask is None else mask.to(logits.device)
    for row, count in enumerate(counts):
        of = scores(logits[row])
        ranked = of if mask is None else of.masked_fill(~mask[row], -1.0)  # a score of 0 is still better than none
        kept = best(ranked, min(m, count))
        index[row, : len(kept)], score[row, : len(kept)] = kept, of[kept]
    return Selection(index, score, index >= 0, logits)


class StreamingRule:
    """The published rule: the first m, then i at a time against the m at hand, whatever sizes arrive.

    Needs memory for m + i patches only.
    """

    def __init__(self, m: int, chunk: int) -> None:
        self.m, self.chunk = m, chunk
        self._memory: tuple[Tensor, Tensor] | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._count = 0

    def add(self, index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        index = _on(index, logits.device)
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

    def finish(self, arrived: Bool[Tensor, " n"] | None) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """Index and score of the kept; a patch that never came has never been a candidate."""
        if self._waiting:
            self._step()
        assert self._memory is not None
        index, logits = self._memory
        score = scores(logits)
        order = best(score, self.m)
        return index[order], score[order]


class Selector:
    """Hands packed chunks, which may hold patches of several images, to one rule per image.

    An image is finished when its last patch has arrived or been skipped, and its logits are dropped then: a batch
    whose images arrive one after the other needs the logits of one, whatever its size.

    Args:
        counts: patches of each image.
        m: patches to keep of each.
        chunk: i of the streaming rule.
        rule: "global" or "streaming".
        keep_logits: `Kept.logits` holds those of all patches; else None.
    """

    def __init__(
        self, counts: Sequence[int], m: int, chunk: int, rule: Rule = "global", keep_logits: bool = False
    ) -> None:
        if m < 1 or chunk < 1:
            raise ValueError(f"m (={m}) and chunk (={chunk}) must be at least 1")
        if rule not in ("global", "streaming"):
            raise ValueError(f"rule (={rule!r}) must be 'global' or 'streaming'")
        self._images = [_Image(n, m, chunk, rule, keep_logits) for n in counts]

    def add(self, image: Int[Tensor, " k"], index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        """Takes the logits of k patches; `image` and `index` live on the host, in order of arrival."""
        start = 0
        owners, counts = torch.unique_consecutive(image, return_counts=True)
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            self._images[owner].add(index[start : start + count], logits[start : start + count])
            start += count

    def skip(self, image: Int[Tensor, " k"]) -> None:
        """Notes that k patches, whose images these are, will never arrive.

        Patches need not be skipped, but an image that lacks some is then finished, and its logits dropped, by
        `finish` only.
        """
        owners, counts = image.unique(return_counts=True)
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            self._images[owner].count(count)

    def finished(self, image: int) -> bool:
        """Whether the last patch of image number `image` has arrived or been skipped."""
        return self._images[image].kept is not None

    def finish(self, image: int) -> Kept:
        """What image number `image` keeps of the patches that have arrived; none may be added afterwards."""
        return self._images[image].finish()


class _Image:
    """One image on its way through the selection: which of its patches have come, and its rule until it is finished."""

    def __init__(self, n: int, m: int, chunk: int, rule: Rule, keep_logits: bool) -> None:
        self.n = self.left = n
        self.arrived: Tensor | None = None
        self.rule: GlobalRule | StreamingRule | None = GlobalRule(m, n) if rule == "global" else StreamingRule(m, chunk)
        self.store: LogitStore | None = None
        if keep_logits:
            self.store = self.rule.store if isinstance(self.rule, GlobalRule) else LogitStore(n)
        self.kept: Kept | None = None

    def add(self, index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        assert self.rule is not None, "a patch arrived after its image was finished"
        if self.arrived is None:
            self.arrived = torch.zeros(self.n, dtype=torch.bool)
        assert not self.arrived[index].any(), "a patch arrived twice"
        self.arrived[index] = True
        self.rule.add(index, logits)
        if isinstance(self.rule, StreamingRule) and self.store is not None:
            self.store.add(index, logits)
        self.count(len(index))

    def count(self, patches: int) -> None:
        """So many fewer are still to come."""
        self.left -= patches
        assert self.left >= 0, "more patches arrived or were skipped than the image has"
        if self.left == 0:
            self.finish()

    def finish(self) -> Kept:
        if self.kept is None:
            if self.arrived is None:
                nothing = torch.zeros(self.n, dtype=torch.bool) if self.n else None
                self.kept = Kept(torch.empty(0, dtype=torch.long), torch.empty(0), None, nothing)
            else:
                assert self.rule is not None
                arrived = None if bool(self.arrived.all()) else self.arrived
                index, score = self.rule.finish(arrived)
                self.kept = Kept(index, score, None if self.store is None else self.store.logits, arrived)
            self.rule = self.store = self.arrived = None
        return self.kept


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
