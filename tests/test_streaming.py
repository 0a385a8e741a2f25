"""Images take the steps of the rule "streaming" together, and each keeps what it would keep alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import GPU, no_waiting
from test_reading import Opener
from torch import Tensor, nn

from keyhole.config.settings import RunConfig, SelectConfig
from keyhole.engine import Engine
from keyhole.engine.memory.plan import Plan
from keyhole.nn import CrossAttentionPool, IPSClassifier, Selector
from keyhole.nn.streaming import LATE
from keyhole.patches.sources import TensorPatches

CPU = torch.device("cpu")


def paper(logits: Tensor, m: int, chunk: int) -> list[int]:
    """The loop of the paper over one image, literally; best first at the end."""

    def best(candidates: Tensor) -> Tensor:
        score = logits[candidates].softmax(dim=0).mean(dim=(1, 2))
        return candidates[score.argsort(descending=True, stable=True)[:m]]

    memory = best(torch.arange(min(m, len(logits))))
    for start in range(m, len(logits), chunk):
        memory = best(torch.cat([memory, torch.arange(start, min(start + chunk, len(logits)))]))
    return best(memory).tolist()  # type: ignore[no-any-return]


def arrive(selector: Selector, logits: Sequence[Tensor], *sizes: int) -> None:
    """All patches of all images, one image after the other, in chunks of `sizes`, again and again."""
    image = torch.cat([torch.full((len(each),), number) for number, each in enumerate(logits)])
    index = torch.cat([torch.arange(len(each)) for each in logits])
    whole = torch.cat(list(logits))
    start = 0
    for size in cycle(sizes):
        part = slice(start, start + size)
        selector.add(image[part], index[part], whole[part])
        start += size
        if start >= len(image):
            break


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(1, 17),
    st.lists(st.integers(1, 99), min_size=1),
)
def test_each_image_keeps_what_the_paper_keeps_of_it_whatever_arrives_with_it(
    counts: list[int], m: int, chunk: int, sizes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    logits = [torch.randn(n, 4, 2, generator=generator) * 3 for n in counts]
    selector = Selector(counts, m, chunk, "streaming")
    arrive(selector, logits, *sizes)
    for number in reversed(range(len(counts))):
        assert selector.finished(number)
        assert selector.finish(number).index.tolist() == paper(logits[number], m, chunk)


def test_steps_that_are_taken_before_an_image_ends_are_the_same_steps() -> None:
    counts, m, chunk = [LATE, 30, 2 * LATE, 7, 900], 50, 3000
    logits = [torch.randn(n, 2, 1, generator=torch.Generator().manual_seed(n)) * 3 for n in counts]
    selector = Selector(counts, m, chunk, "streaming")
    arrive(selector, logits, 1000)
    assert [selector.finish(number).index.tolist() for number in range(5)] == [paper(each, m, chunk) for each in logits]


def test_a_tie_goes_to_the_earlier_patch_in_every_image() -> None:
    selector = Selector([40, 9, 40], 4, 8, "streaming")
    arrive(selector, [torch.zeros(n, 2, 2) for n in (40, 9, 40)], 16)
    assert [selector.finish(number).index.tolist() for number in range(3)] == [[0, 1, 2, 3]] * 3


def test_a_bounded_number_of_logits_waits() -> None:
    m, chunk, size = 20, 300, 1000
    selector, waiting = Selector([100_000], m, chunk, "streaming"), []
    for start in range(0, 100_000, size):
        index = torch.arange(start, start + size)
        logits = torch.randn(size, 2, 1)
        selector.add(torch.zeros(size, dtype=torch.long), index, logits)
        waiting.append(weakref.ref(logits))
        del logits
        assert sum(each() is not None for each in waiting) <= (LATE + m + chunk) // size + 1


@pytest.mark.cuda
@pytest.mark.parametrize("rule", ["streaming", "global"])
def test_on_a_gpu_the_same_patches_are_kept_and_the_host_does_not_wait(rule: Any) -> None:
    counts, m, chunk = [300, 7, 40, 299, 10, 300], 10, 32
    logits = [torch.randn(n, 8, 2, generator=torch.Generator().manual_seed(n + 1)) * 3 for n in counts]
    there = [each.to(GPU) for each in logits]
    with no_waiting():
        selector = Selector(counts, m, chunk, rule)
        arrive(selector, there, 128)
        kept = [selector.finish(number) for number in range(len(counts))]
    here = Selector(counts, m, chunk, rule)
    arrive(here, logits, 50)
    for number, found in enumerate(kept):
        assert set(found.index.tolist()) == set(here.finish(number).index.tolist())
        torch.testing.assert_close(found.score.cpu(), here.finish(number).score)


# How many operations it takes: counted through the reader and the pass that production makes.


@pytest.fixture(scope="module")
def operations(benchmark: Callable[[str], Any]) -> Any:
    """What counts operations."""
    return benchmark("operations")


def counted(operations: Any, counts: Sequence[int], rule: Any, m: int, chunk: int) -> tuple[int, list[Any]]:
    """Operations of scoring a batch in one chunk, the selection with it, and what is kept."""
    torch.manual_seed(0)
    model = IPSClassifier(nn.Linear(8, 16), CrossAttentionPool(16, 8), {"label": nn.Linear(16, 2)})
    features = [np.random.default_rng(n).normal(size=(n, 8)).astype(np.float32) for n in counts]
    openers = [Opener(str(n), partial(TensorPatches, each)) for n, each in enumerate(features)]
    counts_of = operations.Operations(model.parameters())
    engine = Engine(
        model,
        SelectConfig(m=m, chunk=chunk, rule=rule),
        RunConfig(threads=1),
        plan=Plan(chunk=4096),
        timer=operations.CountingTimer(counts_of),
    )
    with closing(engine), counts_of:
        (kept,) = (engine.select(batch) for batch in engine.stream([openers]))
    return counts_of.parts["scoring"].launched, kept


def test_a_batch_of_the_traffic_recipe_takes_as_many_operations_as_one_image(operations: Any) -> None:
    one, _ = counted(operations, [192], "streaming", 10, 32)
    many, kept = counted(operations, [192] * 16, "streaming", 10, 32)
    assert many == one <= 60
    assert all(len(image.index) == 10 for image in kept)


def test_images_of_different_size_take_few_operations_more(operations: Any) -> None:
    one, _ = counted(operations, [192], "streaming", 10, 32)
    many, kept = counted(operations, [192, 3, 50, 191, 10, 100, 11, 192], "streaming", 10, 32)
    assert many <= one + 20
    assert [len(image.index) for image in kept] == [10, 3, 10, 10, 10, 10, 10, 10]


def test_an_image_takes_few_operations_under_the_global_rule(operations: Any) -> None:
    one, _ = counted(operations, [192], "global", 10, 32)
    many, _ = counted(operations, [192] * 16, "global", 10, 32)
    assert many - one <= 15 * 4
