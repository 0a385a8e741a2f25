"""One object for both passes of Iterative Patch Selection over images that are streamed from files.

    engine = Engine(model, SelectConfig(m=16), RunConfig())
    for batch in engine.stream(lists_of_openers):
        kept = engine.select(batch)                  # pass 1: every patch, without gradients
        bags = engine.fetch(batch, kept)             # the kept patches again
        loss = engine.backward(bags, criterion)      # pass 2, as many patches at a time as the plan allows

Both passes see the same pixels, except for JPEG tiles that a GPU decoded in the first pass: the host, whose decoder
differs a little, decodes them for the second. Under `run.decode cpu` the host decodes them in both.

Letters: b image, k loose patches, m kept, d width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyhole.config.settings import RunConfig, SelectConfig
from keyhole.engine.bags import Bags, fetch_bags, positions
from keyhole.engine.device import Arithmetic
from keyhole.engine.encoders import CompileChoice, Encoders, Setting
from keyhole.engine.memory.bill import MAX_HELD_BYTES
from keyhole.engine.memory.pace import Pace, cap
from keyhole.engine.memory.plan import Plan, unlimited
from keyhole.engine.opening import open_reader
from keyhole.engine.random_patches import RandomPatches, attended_share
from keyhole.engine.scoring import ChunkScorer, timed
from keyhole.engine.split import bags_of, split_backward
from keyhole.engine.to_device import Stager, prefetched
from keyhole.loading import Batch, OnError, Opener, Reader, Shuffled
from keyhole.nn import IPSClassifier, Kept, Selector
from keyhole.nn.tensors import on_device
from keyhole.util.tf32 import tf32
from keyhole.util.timing import NO_TIMER, Timer


class Engine:
    """A model at work: it owns the memory plan, the reading threads, the copy to the device and the timer.

    Args:
        model: on its device.
        select: how many patches are kept, by which rule.
        run: how files are read and decoded.
        plan: how memory is used; default are chunks as configured, and no limit.
        arithmetic: what the encoder computes in; default is the model's precision.
        timer: measures where the time goes.
        warn: called with one sentence when the plan had to become smaller.

    Attributes:
        encoders: run the model's encoder in both passes.
        pace: runs work under the plan, and halves it when the device runs out of memory.
        reader: reading threads, started at the first use; may be set before that.
        stager: copies chunks to the device.
    """

    def __init__(
        self,
        model: IPSClassifier,
        select: SelectConfig | None = None,
        run: RunConfig | None = None,
        *,
        plan: Plan | None = None,
        arithmetic: Arithmetic | None = None,
        timer: Timer = NO_TIMER,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.settings, self.run = model, select or SelectConfig(), run or RunConfig()
        self.device = next(model.parameters()).device
        self.encoders = Encoders(model, arithmetic)
        self.pace = Pace(plan or unlimited(self.settings), warn)
        self.timer = timer
        self.stager = self._stager()

    @cached_property
    def reader(self) -> Reader:
        return open_reader(self.run, self.device)

    @property
    def plan(self) -> Plan:
        """The memory plan that is followed now."""
        return self.pace.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.pace = Pace(plan, self.pace.warn, self.pace.options)

    def limit(self) -> AbstractContextManager[None]:
        """Return a context in which the process keeps the budget of the plan."""
        return cap(self.plan, self.device)

    def close(self) -> None:
        """End the reading threads; using the engine again starts new ones."""
        reader = self.__dict__.pop("reader", None)
        if reader is not None:
            reader.close()

    def beside(self) -> Engine:
        """Return an engine with the same model and plan but its own threads and buffers, for overlapping calls."""
        twin = copy.copy(self)
        twin.__dict__.pop("reader", None)
        twin.stager = twin._stager()
        return twin

    def weights_changed(self) -> None:
        """Tell the engine that the model's weights have changed; not needed after `backward`."""
        self.encoders.fast.weights_changed()

    def choose_compile(self, setting: Setting, patch_shape: Sequence[int], expected: int) -> CompileChoice:
        """Compile the encoder if that pays over the `expected` patches, see `Encoders.choose_compile`."""
        return self.encoders.choose_compile(setting, patch_shape, self.plan.chunk, expected)

    def stream(
        self, batches: Iterable[Sequence[Opener]], on_error: OnError = "raise", hold: int | None = None
    ) -> Iterator[Batch]:
        """Open the batches in order and read their patches ahead, see `Reader.stream`.

        Args:
            batches: openers of each batch.
            on_error: what happens to images or patches that cannot be read.
            hold: bytes of pixels up to which a batch keeps all that it streams; default is the plan's.
        """
        hold = self.plan.hold if hold is None else hold
        stream = self.reader.stream(batches, self.plan.chunk, on_error, hold, self.stager.deliver)
        return timed(stream, self.timer)

    def select(
        self,
        batch: Batch,
        *,
        keep_logits: bool = False,
        on_chunk: Callable[[int], None] | None = None,
        known: Mapping[int, Kept] | None = None,
        on_image: Callable[[int, Callable[[], Kept]], None] | None = None,
        drawn: RandomPatches | None = None,
    ) -> list[Kept | None]:
        """Encode every patch of a batch without gradients and keep the best m of each image.

        Args:
            batch: chunks that are packed across the images.
            keep_logits: keep the logits of all patches.
            on_chunk: called with the number of patches after each chunk; may raise to stop.
            known: what images keep that were selected before; their patches are not streamed.
            on_image: called with an image's number and a function that returns what it keeps, as soon as its last
                patch has been scored. Under the rule "streaming" it is faster not to call that function before the
                batch ends: small images are then ranked together.
            drawn: keeps the embeddings of random patches.

        Returns:
            What each image keeps, on the host; None where the image could not be read. On a GPU the host waits for
            the device once, at the end.
        """
        known = known or {}
        counts = [0 if source is None else len(source) for source in batch.sources]
        settings = self.settings
        selector = Selector(counts, settings.m, settings.chunk or self.plan.chunk, settings.rule, keep_logits)
        reported, unread = set(known), dict.fromkeys(range(len(batch.names)), 0)
        scorer = ChunkScorer(self.encoders, self.pace, self.timer, batch.color, drawn)
        with self.encoders.inference():
            for part, pixels in prefetched(timed(batch.chunks(), self.timer), self.stager, self.pace):
                image, index, count = part.image[: part.count], part.index[: part.count], part.count
                logits = scorer.score(part, pixels, self._positions(batch, image, index))
                with self.timer.part("scoring"):
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
        with self.timer.part("scoring"):
            found = {number: selector.finish(number) for number in numbers if number not in known}
        found = {number: known[number] for number in numbers if number in known} | _on_host(found)
        return [one if (one := found.get(row)) and len(one.index) else None for row in range(len(batch.names))]

    def fetch(
        self, batch: Batch, kept: Sequence[Kept | None], *, together: bool = False, hold: int = MAX_HELD_BYTES
    ) -> Bags:
        """Fetch the kept patches: the input of the second pass.

        Args:
            batch: still open.
            kept: of each image, as `select` returns it.
            together: put the pixels of all images into one block, from which they are copied straight to the device.
                A caller that keeps the pixels of one image then keeps the whole block in memory.
            hold: bytes of pixels that stay in host memory; `Bags.part` reads all others from the files at each call.
        """
        with self.timer.part("reading"):
            return fetch_bags(self.model, batch, kept, hold, together)

    def backward(self, bags: Bags, criterion: Callable[[dict[str, Tensor]], Tensor], seed: int | None = None) -> Tensor:
        """Forward and backward over the kept patches, as many at a time as the plan says; gradients are replaced.

        Args:
            bags: of at least one image.
            criterion: logits of every task (b o) -> the loss.
            seed: of random numbers in the forward pass, such as dropout; the caller's random state stays as it is.

        Returns:
            The loss, detached, on the device.
        """

        def step(plan: Plan) -> Tensor:
            if seed is not None:
                # on a CPU `torch.manual_seed` would format a stack trace each time, for a CUDA that may start later
                (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(seed)
            self.model.zero_grad(set_to_none=True)
            return split_backward(
                self.model, bags.part, bags.position, bags.mask, criterion, plan.split, self.encoders.learn
            )

        self.model.train()
        self.weights_changed()  # statistics change now, weights in the step that follows
        devices = [self.device] if self.device.type == "cuda" else []
        with tf32(self.encoders.arithmetic.tf32), nullcontext() if seed is None else torch.random.fork_rng(devices):
            return self.pace.run("learn", step, self.encoders.out_of_memory)

    def infer(
        self,
        batches: Sequence[Sequence[Opener]],
        on_error: OnError = "raise",
        *,
        keep_logits: bool = False,
        on_chunk: Callable[[int], None] | None = None,
        compare: bool = False,
    ) -> Iterator[Inference]:
        """Run both passes without gradients, in evaluation mode, over many batches.

        Args:
            batches: openers of each batch.
            on_error, keep_logits, on_chunk: as in `stream` and `select`.
            compare: also measure the kept patches, see `Inference`. This encodes no further patch.
        """
        if self.settings.shuffles:  # alike for all, so that a result depends on no other image
            batches = [[Shuffled(opener, (0,)) for opener in openers] for openers in batches]
        for batch in self.stream(batches, on_error):
            drawn = RandomPatches(batch, self.settings.m) if compare else None
            kept = self.select(batch, keep_logits=keep_logits, on_chunk=on_chunk, drawn=drawn)
            bags = self.fetch(batch, kept)
            yield self._answer(batch, bags, drawn) if bags.rows else Inference(batch, bags, {})
            self.pace.after_pass()

    def _answer(self, batch: Batch, bags: Bags, drawn: RandomPatches | None) -> Inference:
        """Return what the kept patches say, and the drawn ones, without gradients."""
        with self.encoders.inference():
            scorer = ChunkScorer(self.encoders, self.pace, self.timer)
            embedding = torch.cat(scorer.encoded(bags.part, len(bags)))
            logits = self._classify(embedding, bags.position, bags.mask)
            if drawn is None:
                return Inference(batch, bags, logits)
            padded, mask = bags_of(embedding, bags.mask)
            position = None if bags.position is None else bags.position.flatten(0, 1)
            attention = self.encoders.logits(padded.flatten(0, 1), position)
            attended = attended_share(attention.view(*padded.shape[:2], *attention.shape[1:]), mask)
            if (found := drawn.bags(self.model)) is None:
                return Inference(batch, bags, logits, attended)
            random = self._classify(found.embedding, found.position, found.mask)
            return Inference(batch, bags, logits, attended, found.rows, random)

    def _classify(self, embedding: Tensor, position: Tensor | None, there: Tensor) -> dict[str, Tensor]:
        """Return the logits of every task from the embeddings of loose patches, inside `Encoders.inference`."""

        def classify(_plan: Plan) -> dict[str, Tensor]:
            padded, mask = bags_of(embedding, there)
            return self.model.classify(padded, position, mask)

        return self.pace.run("select", classify)

    def _positions(self, batch: Batch, image: NDArray[np.int64], index: NDArray[np.int64]) -> Tensor | None:
        if self.model.position is None:
            return None
        found = []
        for number in dict.fromkeys(image.tolist()):
            source = batch.sources[number]
            assert source is not None, "a chunk holds patches of an image that failed"
            found.append(positions(self.model, source, index[image == number]))
        return on_device(np.concatenate(found), self.device)

    def _stager(self) -> Stager:
        return Stager(self.device, self.timer, encoded=False if self.run.decode == "cpu" else None)


@dataclass(frozen=True)
class Inference:
    """One batch after both passes: the kept patches, and the logits of each task (rows o).

    With `compare` also `attended`: of each of the `bags.rows`, the share of its kept patches that the attention rests
    on; and `random`: the logits that as many patches drawn at random give, for the images `compared`, which are those
    of more than m patches.
    """

    batch: Batch
    bags: Bags
    logits: dict[str, Tensor]
    attended: Tensor | None = None
    compared: Sequence[int] = ()
    random: Mapping[str, Tensor] = field(default_factory=dict)


def _on_host(kept: Mapping[int, Kept]) -> dict[int, Kept]:
    """Return what images keep on the host, with one copy for all, without images that keep nothing."""
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
