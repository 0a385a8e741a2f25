"""Logits -> the M patches that are kept, under the published and under the set-independent rule.

Letters: b image, n patches, m kept, i chunk, t query, h head.

    score[n] = mean over h, t of softmax_n(logit[:,h,t])

"global" takes the softmax over all n patches of an image: the kept set is a function of the set of patches.
"streaming" takes it over the m kept and the i new ones, as published: the set depends on order and chunk when h t > 1.
The logits of a patch do not depend on other patches, so both rules encode each patch once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from keyhole.nn.streaming import LATE, Best, StreamingRule, ranked
from keyhole.nn.tensors import to_device
from keyhole.util.wording import must_be_one_of

Rule = Literal["global", "streaming"]

MAX_RANKED_TOGETHER = 2**22
"""Most logits of a batch whose images are ranked together, since the softmax takes as much memory again."""


@dataclass(frozen=True)
class Selection:
    """Kept patches of b images, best first; in bags of n patches each keeps m, or n if there are fewer.

    Attributes:
        index: (b m) patch indices, -1 where an image has fewer patches than that.
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
    """Kept patches of one image, best first; empty if no patch arrived.

    Attributes:
        index: (m,) patch indices.
        score: (m,) their scores.
        logits: (n h t) of all patches by index, -inf where a patch never arrived; None without `keep_logits`.
        arrived: (n,) on the host, False where a patch never arrived (it could not be read); None if all did.
    """

    index: Int[Tensor, " m"]
    score: Float[Tensor, " m"]
    logits: Float[Tensor, "n h t"] | None = None
    arrived: Bool[Tensor, " n"] | None = None


def explore(kept: Kept, n: int, share: float, generator: torch.Generator, places: int | None = None) -> Kept:
    """Replace a share of the kept patches by others that arrived, drawn at random.

    Args:
        kept: patches of one image, best first.
        n: number of patches of the image.
        share: of the kept patches, 0 ... 1.
        generator: on the host; decides what is drawn.
        places: number of patches to return; default as many as are kept.

    Returns:
        The best patches, then the drawn ones with score 0.
    """
    free = torch.ones(n, dtype=torch.bool) if kept.arrived is None else kept.arrived.clone()
    if not 0 <= share <= 1:
        raise ValueError(f"`share` (={share}) must be between 0 and 1")
    m = len(kept.index) if places is None else places
    drawn = min(round(share * m), int(free.sum()) - len(kept.index))
    if drawn <= 0:
        return kept
    best = kept.index[: m - drawn]
    free[best.cpu()] = False
    others = free.nonzero()[:, 0]
    chosen = others[torch.randperm(len(others), generator=generator)[:drawn]].to(best.device)
    score = torch.cat([kept.score[: m - drawn], kept.score.new_zeros(drawn)])
    return replace(kept, index=torch.cat([best, chosen]), score=score)


def keep_global(logits: Float[Tensor, "b n h t"], m: int, mask: Bool[Tensor, "b n"] | None = None) -> Selection:
    """Select from bags of complete logits as `GlobalRule` does, with few operations for all images."""
    b, n = logits.shape[:2]
    index = torch.empty(b, min(m, n), dtype=torch.long, device=logits.device)
    score = torch.empty(index.shape, device=logits.device)
    at_once = b if logits.numel() <= MAX_RANKED_TOGETHER else 1
    for rows in (slice(start, start + at_once) for start in range(0, b, at_once)):
        index[rows], score[rows] = (each[:, :m] for each in ranked(logits[rows], None if mask is None else ~mask[rows]))
    if mask is None:
        return Selection(index, score, torch.ones_like(index, dtype=torch.bool), logits)
    kept = torch.arange(index.shape[1], device=index.device) < to_device(mask.sum(dim=1, keepdim=True), index.device)
    return Selection(index.where(kept, -1), score.where(kept, 0), kept, logits)


class Ended(NamedTuple):
    """The state of an image that gets no further patches."""

    logits: Tensor | None  # (n h t) by patch index, -inf where a patch never arrived; None where the rule needs none
    arrived: Tensor | None  # (n,) on the host, False where a patch never arrived; None if all did


class SelectionRule(Protocol):
    """Chooses the kept patches of the images of a batch from attention logits. To add a rule, add a class to `RULES`.

    Attributes:
        needs_logits: the rule ranks an image when the logits of all its patches have arrived.
        own_chunk: `chunk` is a size of the rule, not the number of patches that are encoded at once.
        keep_bags: selects from whole bags in memory: logits (b n h t), m, mask -> Selection; None if the rule cannot.
        due: images that have ended should be settled now; otherwise they may wait for others.
    """

    needs_logits: ClassVar[bool]
    own_chunk: ClassVar[bool]
    keep_bags: ClassVar[Callable[..., Any] | None]

    def __init__(self, m: int, chunk: int) -> None: ...

    @property
    def due(self) -> bool: ...

    def add(self, image: Int[Tensor, " k"], index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        """Take the logits of k patches; `image` and `index` live on the host, in order of arrival."""

    def settle(self, ended: Mapping[int, Ended]) -> Mapping[int, Best]:
        """Return what the ended images keep, each of at least one patch, and forget them."""


class GlobalRule:
    """Ranks all patches of an image together; their order does not matter."""

    needs_logits: ClassVar[bool] = True
    own_chunk: ClassVar[bool] = False
    keep_bags: ClassVar[Callable[..., Any] | None] = staticmethod(keep_global)
    due: ClassVar[bool] = True

    def __init__(self, m: int, chunk: int = 1) -> None:
        self.m = m

    def add(self, image: Int[Tensor, " k"], index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        """Do nothing before the logits of an image are complete."""

    def settle(self, ended: Mapping[int, Ended]) -> dict[int, Best]:
        """Return the m best of those patches of each image that arrived."""
        kept = {}
        for image, (logits, arrived) in ended.items():
            assert logits is not None
            m = self.m if arrived is None else min(self.m, int(arrived.sum()))
            index, score = (each[:m] for each in ranked(logits, None if arrived is None else ~arrived))
            kept[image] = (index.clone(), score.clone()) if len(logits) > LATE else (index, score)  # a view holds all
        return kept


RULES: dict[str, type[SelectionRule]] = {"global": GlobalRule, "streaming": StreamingRule}
"""The selection rules, by the name that settings give them."""


class Selector:
    """Selects patches of a batch from the logits of chunks, which may hold patches of several images.

    An image has ended when its last patch has arrived or been skipped. Under "global" its logits are then dropped, so a
    batch holds those of one image at a time. Under "streaming" small images wait and take their steps together;
    `finish` makes all of them take theirs.

    Args:
        counts: number of patches of each image.
        m: patches to keep of each.
        chunk: i of the streaming rule.
        rule: name of a rule in `RULES`.
        keep_logits: return the logits of all patches in `Kept.logits`.
    """

    def __init__(
        self, counts: Sequence[int], m: int, chunk: int, rule: Rule = "global", keep_logits: bool = False
    ) -> None:
        if m < 1 or chunk < 1:
            raise ValueError(f"`m` (={m}) and `chunk` (={chunk}) must be at least 1")
        if rule not in RULES:
            raise ValueError(must_be_one_of("rule", rule, RULES))
        self.rule, self._keeps_logits = RULES[rule](m, chunk), keep_logits
        self._stores = keep_logits or self.rule.needs_logits
        self._images = [_Image(n, n) for n in counts]
        self._ended: list[int] = []  # images that are still to be settled

    def add(self, image: Int[Tensor, " k"], index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        """Take the logits of k patches; `image` and `index` live on the host, in order of arrival."""
        owner = image.numpy()
        if not len(image) == len(index) == len(logits):
            raise ValueError(
                f"{len(image)} images, {len(index)} indices and {len(logits)} logits are not of the same patches"
            )
        if not len(owner):
            return
        self.rule.add(image, index, logits)
        for start, stop in pairwise([0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]):
            state, rows = self._images[int(owner[start])], index[start:stop].numpy()
            assert state.kept is None, "a patch arrived after its image was finished"
            state.arrived = np.zeros(state.n, np.bool_) if state.arrived is None else state.arrived
            assert not state.arrived[rows].any(), "a patch arrived twice"
            state.arrived[rows] = True
            if self._stores:
                state.store(index[start:stop], logits[start:stop])
        self.skip(image)  # none of them is still to come

    def skip(self, image: Int[Tensor, " k"]) -> None:
        """Note that k patches of these images will never arrive; without it, only `finish` ends such an image."""
        numbers, counts = np.unique(image.numpy(), return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            state = self._images[number]
            state.left -= count
            assert state.left >= 0, "more patches arrived or were skipped than the image has"
            if state.left == 0 and state.kept is None:
                self._ended.append(number)
        if self.rule.due:
            self._settle()

    def finished(self, image: int) -> bool:
        """Return whether the last patch of image number `image` has arrived or been skipped."""
        return self._images[image].kept is not None or image in self._ended

    def finish(self, image: int) -> Kept:
        """Return what image number `image` keeps of the patches that have arrived; no more may be added."""
        state = self._images[image]
        if state.kept is None:
            if image not in self._ended:
                self._ended.append(image)
            self._settle()
        assert state.kept is not None
        return state.kept

    def _settle(self) -> None:
        ended = {}
        for number in self._ended:
            state = self._images[number]
            if state.arrived is None:
                nothing = torch.zeros(state.n, dtype=torch.bool) if state.n else None
                state.kept = Kept(torch.empty(0, dtype=torch.long), torch.empty(0), None, nothing)
            else:
                arrived = None if state.arrived.all() else torch.from_numpy(state.arrived)
                ended[number] = Ended(state.logits, arrived)
        for number, best in self.rule.settle(ended).items():
            logits, arrived = ended[number]
            state = self._images[number]
            state.kept = Kept(*best, logits if self._keeps_logits else None, arrived)
            state.logits = state.arrived = None
        self._ended.clear()


@dataclass
class _Image:
    """State of an image of n patches."""

    n: int
    left: int  # patches that have neither arrived nor been skipped
    arrived: NDArray[np.bool_] | None = None  # (n,); None before the first patch
    logits: Tensor | None = None  # one block (n h t), since thousands of small tensors would fragment the memory
    kept: Kept | None = None

    def store(self, index: Int[Tensor, " k"], logits: Float[Tensor, "k h t"]) -> None:
        rows = index.numpy()
        first, last = int(rows[0]), int(rows[-1])
        in_order = last - first == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all())
        if in_order and len(rows) == self.n:  # all at once: they are the block
            self.logits = logits
            return
        if self.logits is None:
            self.logits = logits.new_full((self.n, *logits.shape[1:]), -torch.inf)
        if in_order:
            self.logits[first : last + 1] = logits  # patches mostly come in order: nothing has to reach the device
        else:
            self.logits[to_device(index, logits.device)] = logits


def select_bags(
    score: Callable[[slice], Float[Tensor, "_ h t"]],
    shape: tuple[int, int],
    mask: Bool[Tensor, "b n"] | None,
    m: int,
    chunk: int,
    rule: Rule,
) -> Selection:
    """Select from b bags of n patches in memory; `score` gives the logits of loose patches, in the order of `mask`."""
    b, n = shape
    selector = Selector([n] * b, m, chunk, rule)
    count = b * n if mask is None else int(mask.sum())
    goes = [slice(start, start + chunk) for start in range(0, count, chunk)]
    if (keep := selector.rule.keep_bags) is not None and goes:
        loose = torch.cat([score(go) for go in goes])
        if mask is None:
            return keep(loose.unflatten(0, shape), m)
        bags = loose.new_full((*shape, *loose.shape[1:]), -torch.inf)
        bags[mask.to(bags.device)] = loose
        return keep(bags, m, mask)
    on_host = torch.ones(b, n, dtype=torch.bool) if mask is None else mask.cpu()
    image, index = on_host.nonzero(as_tuple=True)
    selector.skip((~on_host).nonzero(as_tuple=True)[0])
    device = on_host.device
    for go in goes:
        logits = score(go)
        selector.add(image[go], index[go], logits)
        device = logits.device
    kept = [selector.finish(number) for number in range(b)]
    found = torch.full((b, min(m, n)), -1, dtype=torch.long, device=device)
    value = torch.zeros(found.shape, device=found.device)
    for row, each in enumerate(kept):
        found[row, : len(each.index)] = each.index
        value[row, : len(each.index)] = each.score
    return Selection(found, value, found >= 0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluate without gradients inside; every submodule gets back the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
