"""Laws of the first pass over one chunk: blank patches cost nothing, nothing waits for the device, nothing is rebuilt."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from on_device import GPU, waits_counted
from PIL import Image
from processes import run_process
from torch import Tensor, nn
from torch._dynamo.utils import counters

from keyhole.config.settings import RunConfig, SelectConfig
from keyhole.engine import Engine
from keyhole.engine.device import Arithmetic
from keyhole.engine.encoders import Encoders
from keyhole.engine.fast import FastEncoder
from keyhole.engine.memory.pace import Pace
from keyhole.engine.memory.plan import Plan, unlimited
from keyhole.engine.scoring import ChunkScorer, blank_rows, filled_rows
from keyhole.loading import Chunk
from keyhole.nn import CrossAttentionPool, IPSClassifier, SmallEncoder
from keyhole.nn.selection import RULES
from keyhole.patches.sources import TensorPatches
from keyhole.training.augment import color_matrix
from keyhole.util.timing import NO_TIMER, Timer

Array = NDArray[Any]


class Counting(SmallEncoder):
    """Counts the patches that it embeds."""

    seen = 0

    def embed(self, patches: Tensor) -> Tensor:
        type(self).seen += len(patches)
        return super().embed(patches)


def model_of(seed: int = 0, channels: int = 3, encoder: type[SmallEncoder] = Counting) -> IPSClassifier:
    torch.manual_seed(seed)
    built = encoder(channels, width=8)
    return IPSClassifier(built, CrossAttentionPool(built.dim, 2), {"a": nn.Linear(built.dim, 2)}).eval()


def patches_of(kinds: list[int], rng: np.random.Generator) -> Array:
    """Patches of 24 px: noise for 0, else one colour everywhere."""
    block = rng.integers(0, 256, (len(kinds), 24, 24, 3), np.uint8)
    for row, kind in enumerate(kinds):
        if kind:
            block[row] = (kind * 40, 255 - kind * 30, kind)
    return block


def chunk_of(kinds: list[int], images: list[int], rng: np.random.Generator) -> Chunk:
    pixels = patches_of(kinds, rng)
    return Chunk(pixels, len(kinds), np.array(images), np.arange(len(kinds)))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=24), st.booleans())
def test_patches_of_one_colour_are_encoded_once_and_get_what_they_would_get(
    rows: list[tuple[int, int]], colored: bool
) -> None:
    kinds, images = [kind for kind, _ in rows], sorted(image for _, image in rows)
    chunk = chunk_of(kinds, images, np.random.default_rng(0))
    encoders = Encoders(model_of())
    encoders.fast(torch.from_numpy(chunk.pixels))  # built before counting
    colors = torch.stack([color_matrix(np.full(4, 0.05 * image), 3) for image in range(3)]) if colored else None
    scorer = ChunkScorer(
        encoders, Pace(unlimited(SelectConfig(m=2))), NO_TIMER, None if colors is None else colors.numpy()
    )
    with encoders.inference():
        each = None if colors is None else colors[torch.tensor(images)]
        expected = encoders.logits(encoders.embed(torch.from_numpy(chunk.pixels), each))
        for repeat in range(2):  # in the second chunk every colour is known
            Counting.seen = 0
            found = scorer.score(chunk, torch.from_numpy(chunk.pixels), None)
            keys = {(kind, image) for kind, image in zip(kinds, images, strict=True) if kind}
            needed = kinds.count(0) + (0 if repeat else len(keys))
            assert Counting.seen == filled_rows(needed, unlimited(SelectConfig(m=2)).chunk)
            assert torch.allclose(found, expected, atol=1e-5)
            equal = [found[row] for row, key in enumerate(zip(kinds, images, strict=True)) if key == (1, 0)]
            assert all(torch.equal(one, equal[0]) for one in equal), "equal patches have equal logits, to the bit"


def test_the_query_is_folded_once_for_all_chunks_and_anew_for_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, embedding = Encoders(model_of()), torch.rand(5, 64)
    model = encoders.model
    calls, folded_query = [], CrossAttentionPool.folded_query
    monkeypatch.setattr(CrossAttentionPool, "folded_query", lambda pool: (calls.append(1), folded_query(pool))[1])
    for _ in range(2):
        expected = model.pool.logits(embedding[None])[0]
        calls.clear()
        with encoders.inference():
            found = [encoders.logits(embedding) for _ in range(3)]
        assert len(calls) == 1
        assert all(torch.equal(each, expected) for each in found)
        with torch.no_grad():
            model.pool.query.mul_(2)
    model.logits(embedding).sum().backward()
    assert model.pool.query.grad is not None
    assert model.pool.key_proj.weight.grad is not None


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_blank_is_one_colour_in_every_pixel(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    block = np.broadcast_to(rng.integers(0, 3, (k, 1, 1, 2), np.uint8), (k, 5, 5, 2)).copy()
    changed = rng.random(k) < 0.5
    for row in changed.nonzero()[0]:
        block[row, rng.integers(5), rng.integers(5), rng.integers(2)] += 1
    assert (blank_rows(block) == ~changed).all()
    assert not blank_rows(np.zeros((k, 8), np.float32)).any(), "features are never blank"


def opener_of(source: TensorPatches) -> Any:
    class Opener:
        name = source.name

        def __call__(self) -> TensorPatches:
            return source

    return Opener()


def sources(count: int, n: int) -> list[TensorPatches]:
    rng = np.random.default_rng(1)
    return [TensorPatches(rng.integers(0, 256, (n, 24, 24, 3), np.uint8), f"image {row}") for row in range(count)]


@pytest.mark.cuda
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_waits_for_the_device_once_and_not_in_the_chunk_loop(rule: Any, compiled: bool) -> None:
    device = GPU
    model = model_of(encoder=SmallEncoder).to(device)  # no counter: dynamo would compile again as it counts
    engine = Engine(
        model,
        SelectConfig(m=4, chunk=32, rule=rule),
        RunConfig(threads=2),
        arithmetic=Arithmetic(torch.bfloat16, torch.bfloat16),
        timer=Timer(device),
    )
    if compiled:
        engine.encoders.compile()
    colors = torch.stack([color_matrix(np.full(4, 0.05), 3)] * 3)
    with closing(engine):
        batches = [[opener_of(source) for source in sources(3, 100)] for _ in range(3)]
        for number, batch in enumerate(engine.stream(batches)):
            batch.color = colors.numpy()
            with waits_counted() as waits:
                kept = engine.select(batch)
            assert not number or len(waits) == 1, "once, for what was selected; the first batch builds and compiles"
            assert [len(image.index) for image in kept if image is not None] == [4, 4, 4]


def test_what_is_kept_is_not_read_again_where_a_batch_fits() -> None:
    engine = Engine(model_of(), SelectConfig(m=5, chunk=16), RunConfig(threads=2))
    for hold, again in ((2**20, 0), (0, 10)):
        with closing(engine):
            batches = [[opener_of(source) for source in sources(2, 40)]]
            for batch in engine.stream(batches, hold=hold):
                kept = engine.select(batch)
                bags = engine.fetch(batch, kept)
            assert engine.reader.reread_patches == again
        for source, image, block in zip(sources(2, 40), kept, bags.pixels, strict=True):
            assert image is not None
            assert block is not None
            assert np.array_equal(block, source.array[image.index.numpy()])


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_nothing_is_compiled_after_the_first_epoch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("bright", "dark"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(7):  # not a multiple of the batch: the last batch of an epoch is smaller
            pixels = rng.integers(0, 100, (64, 96, 3), np.uint8) + (100 if label == "bright" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / label / f"{number}.png")
    # a process of its own: the tests' checks of shapes and the compiler do not go together
    done = run_process("compiled_run", tmp_path / "data", tmp_path / "run")
    assert "encoder compiled: as asked for" in done.stderr
    graphs = [int(word) for word in done.stdout.split("graphs ")[1].split()]
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_learning_has_the_gradients_of_plain_learning() -> None:
    run_process("compiled_gradients")


class OnDevice:
    """Stands in for encoders on a GPU: says how many rows it was given, and of how many its compiled encoder is."""

    def __init__(self, compiled: bool) -> None:
        self.device = torch.device("meta")
        self.compiled, self.given = compiled, []

    def embed(self, pixels: Tensor, color: Tensor | None, rows: int) -> Tensor:
        self.given.append((len(pixels), rows))
        return pixels[:, 0, 0].float()

    def logits(self, embedding: Tensor, position: Tensor | None) -> Tensor:
        return embedding[:, None, :1]


@pytest.mark.parametrize(
    ("compiled", "used", "given"),
    [
        (True, 64, (64, 64)),
        (True, 33, (64, 64)),
        (True, 32, (32, 0)),
        (True, 9, (16, 0)),
        (True, 1, (8, 0)),
        (False, 33, (40, 0)),
        (False, 60, (64, 64)),
        (False, 3, (8, 0)),
    ],
)
def test_a_gpu_encodes_no_more_of_the_last_chunk_than_it_needs_to(
    compiled: bool, used: int, given: tuple[int, int]
) -> None:
    model, pace = OnDevice(compiled), Pace(Plan(chunk=64), warn=print)
    pixels = torch.randint(0, 256, (64, 8, 8, 3), dtype=torch.uint8)
    chunk = Chunk(pixels.numpy(), used, np.zeros(used, np.int64), np.arange(used))
    logits = ChunkScorer(model, pace, NO_TIMER).score(chunk, pixels, None)  # type: ignore[arg-type]
    assert logits[:, 0, 0].tolist() == pixels[:used, 0, 0, 0].tolist()
    assert model.given == [given]


def test_after_a_plan_was_halved_only_the_last_part_of_a_chunk_is_cut_short() -> None:
    model, pace = OnDevice(compiled=True), Pace(Plan(chunk=16), warn=print)
    pixels = torch.zeros(64, 8, 8, 3, dtype=torch.uint8)
    chunk = Chunk(pixels.numpy(), 37, np.zeros(37, np.int64), np.arange(37))
    assert len(ChunkScorer(model, pace, NO_TIMER).score(chunk, pixels, None)) == 37  # type: ignore[arg-type]
    assert model.given == [(16, 16), (16, 16), (6, 0)]


def test_too_few_patches_for_a_compiled_encoder_go_uncompiled() -> None:
    torch.manual_seed(0)
    encoder, before = SmallEncoder(3, 8).eval(), counters["stats"]["unique_graphs"]
    pixels = torch.randint(0, 256, (5, 24, 24, 3), dtype=torch.uint8)
    found = FastEncoder(encoder, compile=True)(pixels, rows=0)
    assert found.equal(FastEncoder(encoder)(pixels))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.cuda
def test_on_a_gpu_the_last_chunk_and_the_kept_patches_score_as_in_a_whole_chunk() -> None:
    torch.manual_seed(0)
    model = model_of(encoder=SmallEncoder).to(GPU)
    pixels = torch.randint(0, 256, (20, 24, 24, 3), dtype=torch.uint8, device=GPU)
    encoders = Encoders(model)
    encoders.compile()
    with encoders.inference():
        whole, few = encoders.embed(pixels, rows=64), encoders.embed(pixels, rows=0)
    torch.testing.assert_close(few, whole, rtol=0.02, atol=0.02)
