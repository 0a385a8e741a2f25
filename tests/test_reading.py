"""Laws of reading ahead: same patches in the same order however they are packed, and nothing waits for ever."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_process

from keyhole.errors import ConfigError, ImageError, StalledRead
from keyhole.images import ArrayImage, Box
from keyhole.images.pixels import Pixels
from keyhole.loading import Batch, OnError, Reader
from keyhole.loading.chunks import is_alone
from keyhole.patches.grid import PatchGrid
from keyhole.patches.sources import FilePatches, PatchSource, TensorPatches, View
from keyhole.util.threads import beat

PATIENCE = 30.0
"""Seconds until a test that waits for something that must happen gives up."""


class Opener:
    """A source by name, made when called."""

    def __init__(self, name: str, make: Callable[[], PatchSource]) -> None:
        self.name = name
        self._make = make

    def __call__(self) -> PatchSource:
        return self._make()


class Probe(TensorPatches):
    """Five patches whose values tell which they are; records reads and its closing, and can wait or fail."""

    def __init__(self, name: str = "probe", n: int = 5, gate: threading.Event | None = None, fail_at: int = -1) -> None:
        super().__init__(np.arange(n * 4, dtype=np.int32).reshape(n, 2, 2), name)
        self.gate, self.fail_at = gate, fail_at
        self.reading, self.was_read, self.was_closed = threading.Event(), threading.Event(), threading.Event()
        self.error: Exception = ImageError(name, "damaged")

    def read(self, index: object, out: np.ndarray | None = None) -> np.ndarray:
        assert not self.was_closed.is_set(), "read after close"
        self.reading.set()
        if self.gate is not None:
            self.gate.wait(PATIENCE)
        if self.fail_at in np.asarray(index):
            raise self.error
        pixels = super().read(index, out)  # type: ignore[arg-type]
        self.was_read.set()
        return pixels

    def close(self) -> None:
        self.was_closed.set()

    def opener(self) -> Opener:
        return Opener(self.name, lambda: self)


def openers(*probes: Probe) -> list[Opener]:
    return [probe.opener() for probe in probes]


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something comes true before patience ends; waits no longer than needed."""
    end = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < end:
        time.sleep(0.002)
    return holds()


def read_all(reader: Reader, lists: Sequence[Sequence[Opener]], on_error: OnError = "raise") -> None:
    for batch in reader.stream(lists, 16, on_error):
        drain(batch)


def drain(batch: Batch) -> None:
    """Read all chunks of a batch."""
    for _ in batch.chunks():
        pass


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("keyhole")}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threads()
    yield
    assert eventually(lambda: not threads() - before), threads() - before


@st.composite
def sources(draw: st.DrawFn) -> FilePatches:
    size, seed = 4, draw(st.integers(0, 9))
    width, height = draw(st.integers(size, 40)), draw(st.integers(size, 40))
    image = ArrayImage(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    view = View(draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 3)))
    return FilePatches(image, PatchGrid(image, size, draw(st.integers(2, 5))), view)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(sources(), max_size=4), max_size=4),
    st.integers(1, 70),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(0, 30_000),
    st.integers(0, 99),
)
def test_chunks_are_all_patches_in_order_and_fetch_sees_the_same_pixels(
    batches: list[list[FilePatches]], size: int, ahead: int, workers: int, hold: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with Reader(workers, ahead, stall=PATIENCE) as reader:
        lists = [[Opener(f"{i}", lambda source=source: source) for i, source in enumerate(b)] for b in batches]
        streamed = reader.stream(lists, size, cache_bytes=hold)
        seen = again = 0
        for sources_, batch in zip(batches, streamed, strict=True):
            assert batch.sources == sources_
            pixels, image, index = [], [], []
            counts = []
            for chunk in batch.chunks():
                assert chunk.pixels.shape == (size, 4, 4, 3)
                assert (chunk.pixels[chunk.count :] == 0).all()
                pixels.append(chunk.pixels[: chunk.count].copy())
                image.extend(chunk.image.tolist())
                index.extend(chunk.index.tolist())
                counts.append(chunk.count)
            assert image == [i for i, source in enumerate(sources_) for _ in range(len(source))]
            assert index == [j for source in sources_ for j in range(len(source))]
            ends = np.cumsum(counts)
            for count, end in zip(counts[:-1], ends, strict=False):  # full, but beside an image that shares no chunk
                beside = {image[end - 1], image[end]}
                assert count == size or any(is_alone(len(sources_[i]), size) for i in beside)
            everything = np.concatenate([source.read(slice(None)) for source in sources_]) if image else np.empty(0)
            np.testing.assert_array_equal(np.concatenate(pixels) if pixels else np.empty(0), everything)

            kept = [rng.integers(0, len(source), rng.integers(0, 20)) for source in sources_]
            for source, wanted, fetched in zip(sources_, kept, batch.fetch(kept), strict=True):
                np.testing.assert_array_equal(fetched, source.read(wanted))
            seen += len(image) + sum(map(len, kept))
            again += 0 if len(image) * 4 * 4 * 3 <= hold else sum(map(len, kept))
        assert (reader.read_patches, reader.reread_patches) == (seen, again)


def test_the_next_batch_is_read_while_this_one_is_learnt_from() -> None:
    first, second = Probe("first"), Probe("second")
    with Reader(1, ahead=2, stall=PATIENCE) as reader:
        stream = reader.stream([openers(first), openers(second)], 2)
        batch = next(stream)
        drain(batch)
        assert second.was_read.wait(PATIENCE)
        assert not first.was_closed.is_set()
        assert batch.fetch([[4]])[0] is not None


def test_no_more_is_read_ahead_than_the_buffers_hold() -> None:
    made = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(shape)
        return np.empty(shape, dtype)

    probes = [Probe(f"{i}", n=64) for i in range(6)]
    with Reader(2, ahead=3, stall=PATIENCE, allocate=allocate) as reader:
        for batch in reader.stream([openers(*probes[:3]), openers(*probes[3:])], 8):
            drain(batch)
    assert set(made) == {(8, 2, 2)}
    assert len(made) <= 3 + 2


def test_a_chunk_is_not_overwritten_before_the_one_after_the_next_is_asked_for() -> None:
    with Reader(2, ahead=1, stall=PATIENCE) as reader:
        for batch in reader.stream([openers(Probe(n=40)) for _ in range(3)], 4):
            before: tuple[np.ndarray, np.ndarray] | None = None
            for chunk in batch.chunks():
                if before is not None:
                    np.testing.assert_array_equal(*before)
                before = chunk.pixels, chunk.pixels.copy()


@pytest.mark.parametrize("leave", ["break", "raise", "early", "exhaust"])
def test_leaving_a_stream_in_any_way_closes_every_source(leave: str) -> None:
    probes = [Probe(f"{i}") for i in range(8)]
    opened: list[Probe] = []

    def make(probe: Probe) -> Probe:
        opened.append(probe)
        return probe

    lists = [[Opener(probe.name, lambda probe=probe: make(probe))] for probe in probes]

    def consume() -> None:
        with Reader(2, ahead=3, stall=PATIENCE) as reader:
            for batch in reader.stream(lists, 2):
                if leave == "early":
                    continue
                for _ in batch.chunks():
                    if leave == "break":
                        break
                    if leave == "raise":
                        raise KeyboardInterrupt
                if leave == "break":
                    break

    if leave == "raise":
        with pytest.raises(KeyboardInterrupt):
            consume()
    else:
        consume()
    assert len(opened) >= 1
    assert eventually(lambda: all(probe.was_closed.is_set() for probe in opened))
    if leave in ("early", "exhaust"):
        assert opened == probes


def test_a_stream_that_is_dropped_closes_its_sources_without_the_reader() -> None:
    probe = Probe()
    with Reader(1, stall=PATIENCE) as reader:
        stream = reader.stream([openers(probe)], 2)
        next(stream)
        del stream
        gc.collect()
        assert probe.was_closed.wait(PATIENCE)


def test_a_source_is_closed_only_after_its_last_read() -> None:
    gate = threading.Event()
    probe = Probe(gate=gate)
    with Reader(1, stall=PATIENCE) as reader:
        stream = reader.stream([openers(probe)], 2)
        next(stream)
        assert probe.reading.wait(PATIENCE)
    assert not probe.was_closed.is_set()
    gate.set()
    assert probe.was_closed.wait(PATIENCE)  # and Probe.read would have failed after it


def test_sources_of_a_batch_close_when_the_next_is_asked_for() -> None:
    first, second = Probe("first"), Probe("second")
    with Reader(1, stall=PATIENCE) as reader:
        stream = reader.stream([openers(first), openers(second)], 2)
        batch = next(stream)
        assert not first.was_closed.is_set()
        next(stream)
        assert first.was_closed.is_set()
        assert not second.was_closed.is_set()
        with pytest.raises(RuntimeError, match="before the next batch"):
            batch.fetch([[0]])


@pytest.mark.parametrize("where", ["open", "read", "fetch"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_broken_image_ends_the_stream_or_is_left_out(where: str, on_error: str) -> None:
    good, other = Probe("good"), Probe("other", n=9)
    bad = Probe("bad", n=7, fail_at=3 if where == "read" else -1)

    def make() -> Probe:
        if where == "open":
            raise bad.error
        return bad

    lists = [[good.opener(), Opener("bad", make), other.opener()]]

    def consume() -> tuple[dict[int, Exception], list[int], list[np.ndarray | None]]:
        with Reader(2, stall=PATIENCE) as reader:
            (batch,) = (batch for batch in reader.stream(lists, 4, on_error=on_error) if keep(batch))  # type: ignore[arg-type]
            return dict(batch.failed), seen, kept

    seen: list[int] = []
    kept: list[np.ndarray | None] = []

    def keep(batch: object) -> bool:
        for chunk in batch.chunks():  # type: ignore[attr-defined]
            valid = [p not in batch.failed for p in chunk.image]  # type: ignore[attr-defined]
            seen.extend(chunk.image[valid].tolist())
            for row in np.flatnonzero(valid):
                assert chunk.pixels[row, 0, 0] == 4 * chunk.index[row]
            assert (chunk.pixels[chunk.count :] == 0).all()
        if where == "fetch":
            bad.fail_at = 2
        kept.extend(batch.fetch([[1, 0], [2], [8]]))  # type: ignore[attr-defined]
        return True

    if on_error == "raise":
        with pytest.raises(ImageError, match="bad: damaged"):
            consume()
        return
    failed, seen, kept = consume()
    assert list(failed) == [1]
    assert [image for image in seen if image != 1] == [0] * 5 + [2] * 9
    assert kept[1] is None
    assert kept[0] is not None
    assert kept[0][:, 0, 0].tolist() == [4, 0]
    assert kept[2] is not None
    assert kept[2][:, 0, 0].tolist() == [32]


@pytest.mark.parametrize("on_error", ["skip", "mask"])
def test_what_is_not_the_images_fault_is_raised_even_when_faults_are_skipped(on_error: OnError) -> None:
    probe = Probe(fail_at=4)
    probe.error = ZeroDivisionError("a bug")
    with Reader(1, stall=PATIENCE) as reader, pytest.raises(ZeroDivisionError, match="a bug"):
        read_all(reader, [openers(probe)], on_error)


def test_an_error_in_the_list_of_batches_reaches_the_consumer_after_what_came_before() -> None:
    def lists() -> Iterator[Sequence[Opener]]:
        yield openers(Probe())
        raise LookupError("no more images")

    with Reader(1, stall=PATIENCE) as reader:
        stream = reader.stream(lists(), 2)
        assert sum(chunk.count for chunk in next(stream).chunks()) == 5
        with pytest.raises(LookupError, match="no more images"):
            next(stream)


def test_patches_of_different_shapes_are_refused() -> None:
    odd = Opener("odd", lambda: TensorPatches(np.zeros((3, 9)), "odd"))
    with Reader(1, stall=PATIENCE) as reader, pytest.raises(ConfigError, match=r"odd: patches of float64 \(9,\)"):
        next(reader.stream([[Probe().opener(), odd]], 2))


def test_counts_must_match() -> None:
    with Reader(1, stall=PATIENCE) as reader:
        with pytest.raises(ConfigError, match=r"chunk \(=0\)"):
            next(reader.stream([], 0))
        batch = next(reader.stream([openers(Probe())], 2))
        with pytest.raises(ValueError, match="2 index arrays for 1 images"):
            batch.fetch([[0], [1]])


class Stuck(ArrayImage):
    """An image on a share that does not answer."""

    def __init__(self, gate: threading.Event, name: str) -> None:
        super().__init__(np.zeros((64, 64), np.uint8), name)
        self.gate = gate
        self.reading, self.was_closed = threading.Event(), threading.Event()

    def in_memory(self, level: int) -> None:
        return None

    def _read(self, box: Box, level: int) -> Pixels:
        self.reading.set()
        self.gate.wait()
        return super()._read(box, level)

    def close(self) -> None:
        self.was_closed.set()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    gate = threading.Event()
    yield Stuck(gate, "share/slide.svs")
    gate.set()


def patches(image: ArrayImage) -> FilePatches:
    return FilePatches(image, PatchGrid(image, 8))


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_stalled_read_is_an_error_that_names_the_file(stuck: Stuck, where: str) -> None:
    def make() -> FilePatches:
        if where == "open":
            stuck.gate.wait()
        return patches(stuck)

    match = r"share/slide\.svs: no data for 0\.05 s"
    with Reader(2, stall=0.05, retry_wait=0.01) as reader, pytest.raises(StalledRead, match=match):
        read_all(reader, [[Opener("share/slide.svs", make)]])


@pytest.mark.parametrize("where", ["open", "read"])
def test_other_images_go_on_when_one_stalls(stuck: Stuck, where: str) -> None:
    def make() -> FilePatches:
        if where == "open":
            stuck.gate.wait()
        return patches(stuck)

    good = ArrayImage(np.full((64, 64), 9, np.uint8), "good")
    lists = [[Opener("stuck", make), Opener("good", lambda: patches(good))]] + [
        [Opener("good", lambda: patches(good))] for _ in range(3)
    ]
    with Reader(1, ahead=2, stall=1.0, retries=0) as reader:
        seen = 0
        for i, batch in enumerate(reader.stream(lists, 24, on_error="skip")):
            for chunk in batch.chunks():
                valid = np.array([position not in batch.failed for position in chunk.image])
                assert (chunk.pixels[: chunk.count][valid] == 9).all()
                stuck.gate.set() if i == 2 else None  # the lost read ends late and must not spoil a later chunk
                seen += valid.sum()
            if i == 0:
                assert [type(error) for error in batch.failed.values()] == [StalledRead]
        assert seen == 4 * 64
    assert stuck.was_closed.wait(PATIENCE)


def test_closing_never_waits_for_a_stuck_read(stuck: Stuck) -> None:
    reader = Reader(1, stall=PATIENCE)
    stream = reader.stream([[Opener("stuck", lambda: patches(stuck))]], 16)
    next(stream)
    assert stuck.reading.wait(PATIENCE)
    reader.close()
    assert not stuck.was_closed.is_set()  # somebody is still in it
    stuck.gate.set()
    assert stuck.was_closed.wait(PATIENCE)
    with pytest.raises(RuntimeError, match="closed"):
        reader.run("x", lambda: None)


def test_a_slow_read_that_gives_signs_of_life_is_not_stalled() -> None:
    def slow() -> str:
        for _ in range(6):
            time.sleep(0.2)
            beat()
        return "done"

    with Reader(1, stall=1.0) as reader:
        assert reader.run("slow", slow) == "done"


def test_run_gives_the_result_or_the_error_under_the_stall_limit() -> None:
    gate = threading.Event()
    with Reader(1, stall=0.5) as reader:
        assert reader.run("a", lambda: 1) == 1
        with pytest.raises(ZeroDivisionError):
            reader.run("a", lambda: 1 // 0)
        with pytest.raises(StalledRead, match="b: no data"):
            reader.run("b", gate.wait)
        assert reader.run("c", lambda: 2) == 2
        assert reader.waited >= 0.5
    gate.set()


def test_a_process_with_a_stuck_read_ends() -> None:
    done = run_process("stuck_read", timeout=60)
    assert done.stdout.startswith("a.svs: no data for 0.1 s")
    assert done.stderr == ""


def test_buffers_serve_the_next_stream_and_go_with_the_reader_and_not_when_garbage_is_collected() -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        buffer = np.empty(shape, dtype)
        made.append(weakref.ref(buffer))
        return buffer

    def living() -> int:
        return len([buffer for buffer in made if buffer() is not None])

    gc.collect()
    gc.disable()
    try:
        with Reader(threads=2, ahead=3, allocate=allocate) as reader:
            for size, most in ((8, 5), (8, 5), (8, 5), (4, 10), (4, 10)):
                for batch in reader.stream([[Probe(f"p{number}", 40).opener() for number in range(2)]], size):
                    drain(batch)
                del batch
                assert len(made) <= most
                assert living() <= 5, "buffers of another size stay when nobody wants them"
            assert living() == 5
        assert living() == 0
    finally:
        gc.enable()


def test_one_chunk_after_another_is_read_ahead_while_the_consumer_is_busy_with_a_batch() -> None:
    seen: list[int] = []

    class Counted(Probe):
        def read(self, index: object, out: np.ndarray | None = None) -> np.ndarray:
            seen.extend(np.asarray(index).tolist())
            return super().read(index, out)

    ahead, size = 3, 16
    first, second = Probe("first", n=40), Counted("second", n=400)
    with Reader(2, ahead=ahead, stall=PATIENCE) as reader:
        stream = reader.stream([openers(first), openers(second)], size)
        batch = next(stream)
        drain(batch)
        # Every buffer but that of the last chunk, which the consumer may still be looking at.
        assert eventually(lambda: sorted(seen) == list(range((ahead + 1) * size)))
        assert not first.was_closed.is_set()
        rows = batch.fetch([[0, 39]])[0]
        assert rows is not None
        assert len(seen) == (ahead + 1) * size


def test_a_program_ends_though_a_stream_is_open_and_its_lock_is_held() -> None:
    done = run_process("ends_with_open_stream", timeout=60)
    assert (done.stdout, done.stderr) == ("the end\n", "")
