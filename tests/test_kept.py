"""Laws of the kept patches on their way to the encoder: copied once, as uint8, and the numbers of the other ways."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from on_device import GPU, no_waiting
from test_copies import ROW, taking
from test_reading import PATIENCE, Opener, drain, no_thread_is_left
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from keyhole.config.settings import ModelConfig, RunConfig
from keyhole.engine import Engine
from keyhole.engine.encoders import Encoders
from keyhole.engine.opening import open_reader
from keyhole.errors import ImageError
from keyhole.loading import Batch, Reader
from keyhole.nn import IPSClassifier, Kept, build_classifier
from keyhole.nn.tensors import AsRead, values_of
from keyhole.patches.sources import TensorPatches
from keyhole.tasks.kinds import Task

__all__ = ["no_thread_is_left"]  # a fixture that every test here uses

SIDE, N, HOLD = 32, 24, 2**24
CPU = torch.device("cpu")


def model_of() -> IPSClassifier:
    torch.manual_seed(0)
    return build_classifier(ModelConfig(encoder="small", width=4, heads=2), [Task("a", "binary", ("no", "yes"))], SIDE)


def drawn(image: int) -> np.ndarray:
    return np.random.default_rng(image).integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)


class Source(TensorPatches):
    """Patches in memory, of which some become unreadable."""

    def __init__(self, image: int) -> None:
        super().__init__(drawn(image), f"image {image}")
        self.bad: set[int] = set()

    def read(self, index: Any, out: np.ndarray | None = None) -> np.ndarray:
        if self.bad & set(np.arange(N)[index].tolist()):
            raise ImageError(self.name, "damaged")
        return super().read(index, out)


def kept_of(indices: Sequence[Sequence[int]]) -> list[Kept | None]:
    return [Kept(torch.tensor(index), torch.zeros(len(index))) for index in indices]


def colors_of(images: int) -> Tensor:
    return torch.eye(3, 4).repeat(images, 1, 1) * torch.linspace(0.5, 0.9, images)[:, None, None]


def looked(reader: Reader, sources: Sequence[TensorPatches], hold: int = HOLD) -> Batch:
    """A batch after the first pass; the stream stays with it."""
    stream = reader.stream([[Opener(one.name, lambda one=one: one) for one in sources]], 16, "mask", hold)
    batch = next(stream)
    batch.stream_of_the_test = stream  # type: ignore[attr-defined]
    drain(batch)
    return batch


KEPT = [[3, 1, 20], [7], [0, 23, 5, 9]]


@pytest.mark.parametrize("held", [0, HOLD])
def test_parts_for_learning_lie_where_they_were_read_to(held: int) -> None:
    with Reader(1, stall=PATIENCE) as reader:
        batch = looked(reader, [Source(image) for image in range(3)], held)
        bags = Engine(model_of()).fetch(batch, kept_of(KEPT), together=True)
        expected = np.concatenate([drawn(image)[index] for image, index in enumerate(KEPT)])
        with taking(4 * ROW):  # the smallest part has five rows, and the checks of types in tests take some bytes
            parts = [bags.part(0, 5), bags.part(3, 8), bags.part(0, 8)]
        for part, rows in zip(parts, (slice(0, 5), slice(3, 8), slice(0, 8)), strict=True):
            assert isinstance(part, AsRead)
            np.testing.assert_array_equal(part.pixels, expected[rows])
        assert np.shares_memory(parts[0].pixels, parts[1].pixels)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("hold", [0, HOLD])
def test_patches_that_become_unreadable_are_left_out_however_the_others_are_held(together: bool, hold: int) -> None:
    sources, colors = [Source(image) for image in range(3)], colors_of(3)
    with Reader(1, stall=PATIENCE) as reader:
        batch = looked(reader, sources, 0)
        batch.color = colors.numpy()
        sources[0].bad, sources[1].bad = {1}, {7}
        if not hold:  # then nothing is read before a part is asked for, and that of an unreadable patch is an error
            bags = Engine(model_of()).fetch(batch, kept_of(KEPT), hold=hold, together=together)
            with pytest.raises(ImageError, match=r"image 0: .*cannot be read again \(damaged\)"):
                bags.part(0, 8)
            return
        bags = Engine(model_of()).fetch(batch, kept_of(KEPT), hold=hold, together=together)
        good = [[3, 20], [], [0, 23, 5, 9]]
        assert [None if each is None else each.index.tolist() for each in bags.kept] == [good[0], None, good[2]]
        assert bags.rows == [0, 2]
        assert bags.mask.sum(dim=1).tolist() == [2, 4]
        part = bags.part(1, 5)
        assert isinstance(part, AsRead)
        np.testing.assert_array_equal(part.pixels, np.concatenate([drawn(0)[[20]], drawn(2)[[0, 23, 5]]]))
        assert part.color is not None
        assert part.color.equal(colors[[0, 2, 2, 2]])
        np.testing.assert_array_equal(bags.pixels[0], drawn(0)[good[0]])
        assert bags.pixels[1] is None


def test_pixels_that_were_read_again_beside_a_stuck_thread_are_taken_from_where_they_are() -> None:
    gate, stuck = threading.Event(), threading.Event()

    class Stuck(Source):
        def read(self, index: Any, out: np.ndarray | None = None) -> np.ndarray:
            if stuck.is_set():
                stuck.clear()
                gate.wait(PATIENCE)
                raise ImageError(self.name, "too late")
            return super().read(index, out)

    sources = [Source(0), Stuck(1), Source(2)]
    with Reader(2, stall=0.5, retry_wait=0.01) as reader:
        batch = looked(reader, sources, 0)
        stuck.set()
        bags = Engine(model_of()).fetch(batch, kept_of(KEPT), together=True)
        assert None not in bags.kept
        part = bags.part(0, 8)
        assert isinstance(part, AsRead)
        np.testing.assert_array_equal(
            part.pixels, np.concatenate([drawn(image)[index] for image, index in enumerate(KEPT)])
        )
        gate.set()


def test_images_that_keep_nothing_leave_no_hole() -> None:
    with Reader(1, stall=PATIENCE) as reader:
        batch = looked(reader, [Source(image) for image in range(3)])
        bags = Engine(model_of()).fetch(batch, [*kept_of(KEPT[:1]), None, *kept_of(KEPT[2:])], together=True)
        with taking(ROW):
            part = bags.part(0, 7)
        np.testing.assert_array_equal(
            values_of(part), values_of(AsRead(torch.from_numpy(np.concatenate([drawn(0)[KEPT[0]], drawn(2)[KEPT[2]]]))))
        )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("color", [None, colors_of(N)])
def test_pixels_as_read_give_what_numbers_made_before_give(precision: torch.dtype, color: Tensor | None) -> None:
    model, read = model_of(), AsRead(torch.from_numpy(drawn(0)), color)
    model.precision = precision
    for mode in (True, False):
        model.train(mode)
        assert model.encode(read).equal(model.encode(values_of(read)))
    encoders = Encoders(model)
    with encoders.inference():
        assert encoders.embed(read).equal(encoders.embed(values_of(read)))


class Maps(TorchDispatchMode):
    """Counts the tensors of the size of all pixels that are made before the first convolution, by type."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.made, self.done = numel, [], False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.done = self.done or "convolution" in str(function)
        before = {id(each) for each in [*args, *(kwargs or {}).values()]}
        if isinstance(result, Tensor) and not self.done and result.numel() == self.numel and id(result) not in before:
            self.made += [] if function.is_view else [result.dtype]
        return result


@pytest.mark.parametrize("training", [True, False])
def test_on_a_gpu_the_numbers_are_made_once_where_the_encoder_runs(training: bool) -> None:
    with FakeTensorMode(), torch.device("cuda"):  # goes the way of a GPU, without data
        model = model_of().train(training)
        read = AsRead(torch.empty(N, SIDE, SIDE, 3, dtype=torch.uint8))
        with Maps(read.pixels.numel()) as maps:
            model.encode(read)
        assert maps.made == [torch.float32]
        with Maps(read.pixels.numel()) as maps:
            model.encode(values_of(read))
        assert len(maps.made) >= 2


@pytest.mark.cuda
def test_on_a_gpu_parts_come_without_waiting_and_learn_as_on_the_host() -> None:
    device, results = GPU, []
    for where in (CPU, device):
        model, sources = model_of().to(where).train(), [Source(image) for image in range(3)]
        with open_reader(RunConfig(), where) as reader:
            batch = looked(reader, sources)
            for together in (True, False):
                batch.color = colors_of(3).numpy()
                bags = Engine(model).fetch(batch, kept_of(KEPT), together=together)
                model.encode(bags.part(0, 8))  # loads what the device needs
                if where == CPU:
                    part = bags.part(2, 8)
                else:
                    with no_waiting():
                        part = bags.part(2, 8)
                        embedding = model.encode(part)
                        embedding.square().sum().backward()
                embedding = model.encode(part)
                assert isinstance(part, AsRead)
                assert part.pixels.dtype == torch.uint8
                results.append((part.pixels.cpu(), values_of(part).cpu(), embedding.detach().cpu()))
    for found in results[1:]:
        assert found[0].equal(results[0][0])
        torch.testing.assert_close(found[1], results[0][1], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[2], results[0][2], rtol=0.05, atol=0.05)
