"""Law 6: both passes see the same pixels; and what streams from files is what the modules see in memory."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keyhole.config.settings import (
    AugmentConfig,
    Config,
    ModelConfig,
    PatchConfig,
    RunConfig,
    SelectConfig,
)
from keyhole.data.item import Item
from keyhole.engine import Engine
from keyhole.engine.bags import positions
from keyhole.engine.opening import open_reader, opener
from keyhole.loading import Batch, Reader
from keyhole.nn import IPSClassifier, Kept, build_classifier
from keyhole.nn.selection import RULES
from keyhole.nn.tensors import as_read, values_of
from keyhole.patches.image_cache import ImageCache
from keyhole.patches.sources import View
from keyhole.tasks.kinds import Task
from keyhole.training.augment import Draw, draw, stack_colors

SIZE = 16
TASKS = [Task("a", "binary", ("no", "yes")), Task("b", "multiclass", ("x", "y", "z"))]
CPU = torch.device("cpu")


def values(pixels: np.ndarray, color: torch.Tensor | None = None) -> torch.Tensor:
    """What the encoder is given."""
    return values_of(as_read(torch.from_numpy(pixels.copy()), CPU, color))


LAW = settings(max_examples=15, deadline=None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images of different size, the last one grey."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for number, shape in enumerate([(70, 50, 3), (33, 90, 3), (64, 64)]):
        paths.append(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    return paths


def config(stride: int = SIZE, position: str = "none") -> Config:
    return Config(
        patch=PatchConfig(size=SIZE, stride=stride),
        model=ModelConfig(encoder="small", width=4, heads=2, position=position),  # type: ignore[arg-type]
    )


def model_of(config: Config, seed: int = 0) -> IPSClassifier:
    torch.manual_seed(seed)
    return build_classifier(config.model, TASKS, SIZE).eval()


def only_batch(config: Config, images: list[Path], draws: list[Draw], chunk: int) -> tuple[Batch, object, Reader]:
    reader = open_reader(config.run, CPU)
    store = ImageCache()
    openers = [
        opener(config, store, Item(path.name, path, {}), each.view, each.offset)
        for path, each in zip(images, draws, strict=True)
    ]
    stream = reader.stream([openers], chunk)
    return next(iter(stream)), stream, reader


@LAW
@given(
    st.integers(0, 999),
    st.integers(0, 9),
    st.integers(1, 30),
    st.sampled_from([8, 16, 20]),
    st.sampled_from([0, 2**30]),
)
def test_both_passes_see_the_same_pixels(
    images: list[Path], seed: int, epoch: int, chunk: int, stride: int, hold: int
) -> None:
    conf = config(stride)
    changes = [draw(AugmentConfig(color=0.5), seed, epoch, path.name, stride, 3) for path in images]
    colors = stack_colors(changes)
    assert colors is not None
    batch, _stream, reader = only_batch(conf, images, changes, chunk)
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for part in batch.chunks():
        rows = torch.from_numpy(part.image[: part.count])
        tensors = values(part.pixels[: part.count], torch.from_numpy(colors)[rows])
        for image, index, tensor in zip(part.image, part.index, tensors, strict=False):
            seen[int(image), int(index)] = tensor
    model, rng = model_of(conf), np.random.default_rng(seed)
    wanted = [rng.permutation(len(source))[:5] for source in batch.sources if source is not None]

    kept = [Kept(torch.from_numpy(index), torch.zeros(len(index))) for index in wanted]
    batch.color = colors
    bags = Engine(model).fetch(batch, kept, hold=hold)
    every = [seen[row, int(patch)] for row, index in enumerate(wanted) for patch in index]
    torch.testing.assert_close(values_of(bags.part(0, len(bags))), torch.stack(every), rtol=0, atol=1e-6)
    assert bags.mask.sum(dim=1).tolist() == [len(index) for index in wanted]
    reader.close()


@LAW
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(["none", "1d", "2d"]),
)
def test_streaming_from_files_selects_what_the_modules_select_in_memory(
    images: list[Path], chunk: int, m: int, rule: str, position: str
) -> None:
    conf = config(position=position)
    model = model_of(conf)
    batch, _stream, reader = only_batch(conf, images, [Draw()] * 3, chunk)
    engine = Engine(model, SelectConfig(m=m, chunk=chunk, rule=rule))  # type: ignore[arg-type]
    kept = engine.select(batch, keep_logits=True)
    for source, found in zip(batch.sources, kept, strict=True):
        assert source is not None
        assert found is not None
        every = np.arange(len(source))
        patches = values(source.read(every))[None]
        where = None if model.position is None else torch.from_numpy(positions(model, source, every))[None]
        expected = model.select(patches, m, chunk, rule, where)  # type: ignore[arg-type]
        assert set(found.index.tolist()) == set(expected.index[0].tolist())
        torch.testing.assert_close(found.score, expected.score[0], atol=1e-5, rtol=1e-4)
    reader.close()


def test_colour_reaches_patches_as_one_affine_map() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    torch.testing.assert_close(values(pixels), torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    identity = torch.cat([torch.eye(3), torch.zeros(3, 1)], dim=1).expand(4, 3, 4)
    torch.testing.assert_close(values(pixels, identity), values(pixels))
    features = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    assert torch.equal(values(features), torch.from_numpy(features))


def test_an_image_that_fails_between_the_passes_is_left_out_alone(images: list[Path], tmp_path: Path) -> None:
    conf, broken = config(position="1d"), tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:-3000])
    store = ImageCache()
    openers = [opener(conf, store, Item(path.name, path, {})) for path in (images[0], broken, images[1])]
    engine = Engine(model_of(conf), SelectConfig(m=4, chunk=8))
    for batch in engine.stream([openers], "skip"):
        bags = engine.fetch(batch, engine.select(batch))
        assert list(batch.failed) == [1]
        assert "broken.png" in str(batch.failed[1])
        assert bags.rows == [0, 2]
        assert bags.pixels[1] is None
        assert bags.mask.shape == (2, 4)
        assert len(bags.part(0, 8)) == 8
    engine.close()


def test_weights_are_taken_over_once_for_many_batches(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    conf = config()
    engine, store = Engine(model_of(conf), SelectConfig(m=4, chunk=8)), ImageCache()
    copies, real = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *args: (copies.append(1), real(*args))[1])
    counts = []
    with closing(engine):
        batches = [[opener(conf, store, Item(path.name, path, {}))] for path in images]
        for each in (batches[:1], batches[:1], batches):
            engine.weights_changed()
            copies.clear()
            assert len(list(engine.infer(each))) == len(each)
            counts.append(len(copies))
        copies.clear()
        assert len(list(engine.infer(batches))) == len(batches)
    assert counts[1] > 0, "it was told that weights have changed, which torch may not have counted"
    assert counts[2] == counts[1]
    assert not copies, "nothing has changed since"


def test_positions_are_those_of_the_turned_image(images: list[Path]) -> None:
    """A patch that a flip moves to the right has the position of the place it moves to."""
    conf = config(position="2d")
    model = model_of(conf)
    batch, _stream, reader = only_batch(conf, [images[2]], [Draw(view=View(flip_x=True))], 8)
    source = batch.sources[0]
    assert source is not None
    where = positions(model, source, np.arange(len(source)))
    assert where[0].tolist() == [64 - SIZE / 2, SIZE / 2]
    reader.close()


@pytest.mark.parametrize(("cores", "on_cpu", "on_gpu"), [(1, 1, 1), (2, 2, 2), (4, 4, 3), (16, 16, 15), (64, 16, 16)])
def test_reading_leaves_a_core_to_the_thread_that_launches_the_work_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, cores: int, on_cpu: int, on_gpu: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for device, threads in (("cpu", on_cpu), ("cuda", on_gpu)):
        with open_reader(RunConfig(), torch.device(device)) as reader:
            assert reader.threads.count == threads
        with open_reader(RunConfig(threads=cores), torch.device(device)) as reader:
            assert reader.threads.count == cores
