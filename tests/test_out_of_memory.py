"""What a device without room does to a run: the plan becomes smaller, and nothing of what was read is lost.

`narrow` stands in for a GPU's buffers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import SMALL, csv_rows
from make_images import picture, write_tiff
from narrow_device import FULL, narrow
from on_device import DRY, GPU
from test_encoded import break_quietly
from test_reading import PATIENCE, Opener
from torch import Tensor

import keyhole
from keyhole.config.settings import ModelConfig, SelectConfig
from keyhole.engine import Engine
from keyhole.engine.bags import fetch_bags
from keyhole.engine.jpeg import Decoder
from keyhole.engine.memory.bill import BUFFERS, DECODED, TURNED
from keyhole.engine.memory.meter import growth, taken, tensor_bytes
from keyhole.engine.memory.pace import Pace, cap
from keyhole.engine.memory.plan import Plan
from keyhole.engine.to_device import Stager, prefetched
from keyhole.errors import ConfigError
from keyhole.loading import Reader
from keyhole.loading.chunks import Chunk, Coded, Delivery
from keyhole.nn import build_classifier
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import TensorPatches, View
from keyhole.tasks.kinds import Task
from keyhole.util.budget import out_of_memory

CPU = torch.device("cpu")
NO_ENGINE = "GET was unable to find an engine to execute this computation"


def test_a_run_without_room_to_stage_goes_on_with_less(
    toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = narrow(monkeypatch, 4)
    run = keyhole.train(toy, tmp_path / "run", **SMALL)
    assert (run.path / "log.txt").read_text().count("out of memory; going on with less at a time") == 2, "16, 8, 4"
    assert [size for size in kind.sizes if size > 4] == [16, 8]
    found, expected = csv_rows(run.path / "metrics.csv"), csv_rows(toy_run / "metrics.csv")
    assert [row["patches"] for row in found] == [row["patches"] for row in expected]
    for name in ("train.loss", "val.loss"):
        np.testing.assert_allclose(
            [float(row[name]) for row in found], [float(row[name]) for row in expected], rtol=1e-3
        )
    for split in ("train", "val"):
        table = f"predictions/{split}.csv"
        assert len(csv_rows(run.path / table)) == len(csv_rows(toy_run / table))


def test_a_prediction_without_room_to_stage_scores_every_patch(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = toy / "red" / "0.png"
    expected = keyhole.load(toy_run).predict(image)
    narrow(monkeypatch, 2)
    found = keyhole.load(toy_run).predict(image)
    assert "out of memory; going on with less at a time" in capsys.readouterr().err
    assert found.scores is not None
    assert expected.scores is not None
    np.testing.assert_allclose(found.scores.score, expected.scores.score, rtol=1e-3)
    np.testing.assert_array_equal(found.kept.boxes, expected.kept.boxes)


def test_a_chunk_that_was_copied_in_parts_is_filled_again_after_the_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = narrow(monkeypatch, 4)
    index = np.arange(14)
    chunk = Chunk(np.zeros((16, 2, 2, 3), np.uint8), len(index), np.zeros_like(index), index)
    parts = [part for part, _ in prefetched([chunk], Stager(CPU), Pace(Plan(16), lambda _: None))]
    assert [part.count for part in parts] == [4, 4, 4, 2]
    assert chunk.copied is not None
    chunk.copied()
    assert kind.waited == [len(kind.sizes) - 1]


def test_without_room_for_one_patch_the_message_says_what_to_do(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"even with the smallest plan .* raise --memory"):
        keyhole.load(toy_run).predict(toy / "red" / "0.png")


def test_kept_patches_that_do_not_fit_come_to_the_device_in_parts(
    toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*given: Any, **options: Any) -> Any:
        bags = fetch_bags(*given, **options)

        def part(start: int, stop: int) -> Tensor:
            if stop - start > 4:
                raise torch.OutOfMemoryError(FULL)
            return bags.part(start, stop)

        return replace(bags, part=part)

    monkeypatch.setattr("keyhole.engine.engine.fetch_bags", fetch)
    run = keyhole.train(toy, tmp_path / "run", **SMALL)
    assert "learning from 16 kept patches in chunks of 4;" in (run.path / "log.txt").read_text()
    assert len(csv_rows(run.path / "metrics.csv")) == 2
    assert len(csv_rows(run.path / "predictions" / "train.csv")) == len(csv_rows(toy_run / "predictions" / "train.csv"))


def full_decoder(monkeypatch: pytest.MonkeyPatch, room: int, text: str) -> list[int]:
    """The decoder takes `room` streams at a time, and refuses more in these words; returned: what it was given."""
    right, given = Decoder.__call__, []

    def decode(self: Decoder, streams: Sequence[bytes], channels: int) -> Tensor:
        given.append(len(streams))
        if len(streams) > room:
            raise RuntimeError(text)
        return right(self, streams, channels)

    monkeypatch.setattr(Decoder, "__call__", decode)
    return given


def looked_at(openers: Sequence[FileOpener], warn: Callable[[str], None], stager: Stager, on_error: str) -> Any:
    """What is inferred of one batch of images that come encoded, in chunks of 32."""
    torch.manual_seed(0)
    model = build_classifier(
        ModelConfig(encoder="small", width=4, heads=2), [Task("a", "binary", ("no", "yes"))], 16
    ).eval()
    assert stager.deliver is not None
    stager.deliver = Delivery(stager.deliver.colors, always=True)
    engine = Engine(model, SelectConfig(m=3), plan=Plan(32), warn=warn)
    engine.stager = stager
    with Reader(2, stall=PATIENCE) as reader:
        engine.reader = reader
        (found,) = list(engine.infer([openers], on_error, keep_logits=True))  # type: ignore[arg-type]
    return found.bags


@pytest.mark.parametrize(
    "text", [f"Error while decoding JPEG images: {FULL}", "Error while decoding JPEG images: Failed to decode batch: 5"]
)
def test_a_decoder_without_room_is_given_fewer_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    pytest.importorskip("torchvision")
    path = write_tiff(tmp_path / "a.tif", picture(3, 160, 96), tile=(16, 16), compression="jpeg")
    openers = [FileOpener(path, str(turns), 16, view=View(turns=turns)) for turns in (0, 1)]
    stager, said = Stager(CPU, encoded=True), []
    expected = looked_at(openers, said.append, stager, "raise")
    given = full_decoder(monkeypatch, 5, text)
    found = looked_at(openers, said.append, stager, "raise")
    assert stager.refused == 0, "nothing is wrong with the tiles"
    assert len(said) == 3, "32, 16, 8, 4"
    assert sum(count for count in given if count <= 5) == 2 * 60, "each tile was decoded on the device, once"
    for one, other in zip(found.kept, expected.kept, strict=True):
        torch.testing.assert_close(one.logits, other.logits)
        assert one.index.tolist() == other.index.tolist()


@pytest.mark.parametrize("view", [View(), View(True), View(turns=1), View(False, True, 2), View(True, True, 3)])
def test_a_chunk_that_is_decoded_takes_what_the_plan_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: View
) -> None:
    """A buffer, what the decoder gives, the same in one tensor, and one copy more where patches are turned."""
    pytest.importorskip("torchvision")
    narrow(monkeypatch, 100)
    path = write_tiff(tmp_path / "a.tif", picture(3, 512, 512), tile=(128, 128), compression="jpeg")
    opener = FileOpener(path, "a", 128, view=view)
    with closing(opener()) as source:
        streams = source.encoded(slice(None), frozenset(("ycbcr",)))
        expected = source.read(slice(None)).astype(int)
    encoded = {row: Coded(stream, view) for row, stream in enumerate(streams)}
    pixels, index = np.zeros((16, 128, 128, 3), np.uint8), np.arange(16)
    stager = Stager(CPU, encoded=True)
    found: list[Tensor] = []
    peak = tensor_bytes(lambda: found.append(stager(Chunk(pixels, 16, np.zeros(16, np.int64), index, encoded))))
    assert np.abs(found[0].numpy() - expected).max() <= 1
    on_host = pixels.nbytes + sum(map(len, streams))  # counted too, since the device is the CPU here
    copies = BUFFERS - 1 + DECODED - 1 + (TURNED if view != View() else 0)
    assert peak - on_host <= (copies + 0.05) * pixels.nbytes


def test_an_image_that_fails_in_one_part_of_a_chunk_is_not_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    whole = write_tiff(tmp_path / "good.tif", picture(3, 64, 64), tile=(16, 16), compression="jpeg")
    bad = break_quietly(tmp_path / "bad.tif", whole, [5])
    openers = [FileOpener(path, path.stem, 16) for path in (bad, whole)]
    stager = Stager(CPU, encoded=True)
    found = looked_at(openers, print, stager, "skip")
    full_decoder(monkeypatch, 4, FULL)
    parted = looked_at(openers, print, stager, "skip")
    assert [each.rows for each in (found, parted)] == [[1], [1]]
    assert parted.kept[0] is None
    torch.testing.assert_close(parted.kept[1].logits, found.kept[1].logits)


# Errors that may mean something else


def compiled(error: Exception) -> Exception:
    """An error inside a compiler, as `torch.compile` raises it."""
    from torch._dynamo.exc import BackendCompilerFailed

    def inductor() -> None: ...

    return BackendCompilerFailed(inductor, error, None)


def test_a_compiler_that_runs_out_of_memory_is_understood() -> None:
    assert out_of_memory(compiled(torch.OutOfMemoryError(FULL)))
    assert out_of_memory(compiled(RuntimeError(NO_ENGINE)))
    assert not out_of_memory(compiled(ValueError("no kernel for float8")))


@pytest.mark.parametrize("wrap", [lambda error: error, compiled])
def test_an_error_that_may_be_another_ends_with_its_own_words(wrap: Callable[[Exception], Exception]) -> None:
    """A computation that cuDNN cannot do at all says the same as one that finds no work space."""
    said: list[str] = []
    pace, sizes = Pace(Plan(4, None, 4), said.append), []

    def work(plan: Plan) -> None:
        sizes.append(plan.chunk)
        raise wrap(RuntimeError(NO_ENGINE))

    with pytest.raises(ConfigError, match=NO_ENGINE) as raised:
        pace.run("select", work)
    assert sizes == [4, 2, 1]
    assert "--run.device cpu" in str(raised.value)
    assert "--memory" in str(raised.value)
    assert len(said) == 2
    assert all(NO_ENGINE in line for line in said)


# On a GPU


def no_room(plan: Plan, more: int) -> Plan:
    """The plan with a budget of `more` bytes beyond what is taken on the GPU now."""
    return replace(plan, budget=taken(GPU) + more)


@pytest.mark.cuda
def test_a_gpu_without_room_for_a_chunk_looks_at_it_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = GPU
    chunk, side = (64, 16) if DRY else (1024, 128)
    noise = np.random.default_rng(0).integers(0, 32, (chunk, side, side, 3), dtype=np.uint8)  # 50 MB, and two buffers
    pixels = noise + np.arange(chunk, dtype=np.uint16).astype(np.uint8)[:, None, None, None] % 224
    torch.manual_seed(0)
    model = (
        build_classifier(ModelConfig(encoder="small", width=4, heads=2), [Task("a", "binary", ("no", "yes"))], side)
        .eval()
        .to(device)
    )
    found: list[Any] = []
    for more in (4 * 10**9, 80 * 10**6):
        said: list[str] = []
        if DRY and found:
            narrow(monkeypatch, chunk // 3)
        plan = no_room(Plan(chunk), more)
        engine = Engine(model, SelectConfig(m=8), plan=plan, warn=said.append)
        with engine.limit(), closing(engine):
            opener = Opener("a", lambda: TensorPatches(pixels))
            found += engine.infer([[opener]], keep_logits=True)
        assert bool(said) == (more < 10**9)
        del engine  # else its buffers count as taken, and are room for the next
    (one,), (other,) = (each.bags.kept for each in found)
    assert one.logits.isfinite().all()
    difference = (one.logits - other.logits).abs().max()
    assert difference <= 0.02 * (one.logits.max() - one.logits.min()), "each patch has its own score"


@pytest.mark.cuda
def test_a_gpu_decoder_without_room_says_so_in_words_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    device = GPU
    if Stager(device, encoded=True).deliver is None:
        pytest.skip("no decoder on the device")
    streams = [jpeg(256)] * 512  # 100 MB of pixels
    plan = no_room(Plan(512), 30 * 10**6)
    if DRY:
        full_decoder(monkeypatch, 100, f"Error while decoding JPEG images: {FULL}")
    with cap(plan, device), pytest.raises(RuntimeError) as raised:
        Decoder(device)(streams, 3)
    assert out_of_memory(raised.value), raised.value
    monkeypatch.undo()
    assert Decoder(device)(streams, 3).shape == (512, 256, 256, 3)


@pytest.mark.cuda
@pytest.mark.parametrize("view", [View(), View(True, False, 1)])
def test_staging_on_a_gpu_takes_what_the_plan_counts(view: View) -> None:
    device = GPU
    stager = Stager(device, encoded=True)
    if stager.deliver is None:
        pytest.skip("no decoder on the device")
    side = 32 if DRY else 256
    pixels = torch.zeros(256, side, side, 3, dtype=torch.uint8, pin_memory=not DRY).numpy()
    encoded = dict.fromkeys(range(256), Coded(jpeg(side), view))
    image, index = np.zeros(256, np.int64), np.arange(256)

    def three() -> None:
        for _ in range(3):
            stager(Chunk(pixels, 256, image, index, encoded)).float().sum()

    three()
    stager = Stager(device, encoded=True)
    looked = 4 * pixels.nbytes  # what this test makes of them
    copies = BUFFERS + DECODED + (TURNED if view != View() else 0)
    grown = growth(device, three)
    assert DRY or grown <= copies * pixels.nbytes + looked + 40 * 10**6


def jpeg(side: int) -> bytes:
    data = io.BytesIO()
    PIL.Image.fromarray(picture(3, side, side)).save(data, "JPEG", quality=90)
    return data.getvalue()
