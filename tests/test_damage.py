"""Laws of reading what is damaged, lost or stalled: nothing readable is missing, nothing else is wrong or waited for."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from make_images import picture, write_tiff
from test_reading import PATIENCE, Opener, eventually, no_thread_is_left

from keyhole.errors import ImageError, ImageLost, StalledRead
from keyhole.loading import Batch, OnError, Reader
from keyhole.loading.chunks import FetchOnly
from keyhole.patches.opener import FileOpener
from keyhole.patches.sources import TensorPatches, View

__all__ = ["no_thread_is_left"]  # a fixture that every test here uses

TILE = 32
WIDTH, HEIGHT = 200, 136
ROWS, COLUMNS = 5, 7

FILES: dict[str, dict[str, Any]] = {
    "jpeg": {"compression": "jpeg", "compressionargs": {"level": 90}},
    "deflate": {"compression": "deflate", "predictor": True},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound tiled TIFFs."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: write_tiff(folder / f"{name}.tif", picture(3, WIDTH, HEIGHT), tile=(TILE, TILE), **options)
        for name, options in FILES.items()
    }


def damage(path: Path, source: Path, tiles: Sequence[int]) -> Path:
    """A copy of a tiled TIFF in which some tiles are overwritten."""
    shutil.copy(source, path)
    with tifffile.TiffFile(path) as tif:
        places = [(tif.pages.first.dataoffsets[tile], tif.pages.first.databytecounts[tile]) for tile in tiles]
    with path.open("r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(np.random.default_rng(offset).bytes(count))
    return path


def touching(l0_boxes: np.ndarray, tiles: Sequence[int]) -> set[int]:
    """The patches whose box overlaps one of the tiles."""
    found = set()
    for tile in tiles:
        top, left = TILE * (tile // COLUMNS), TILE * (tile % COLUMNS)
        x, y, width, height = l0_boxes.T
        hit = (x < left + TILE) & (x + width > left) & (y < top + TILE) & (y + height > top)
        found |= set(np.flatnonzero(hit).tolist())
    return found


Seen = dict[tuple[int, int], np.ndarray]


def read_chunks(batch: Batch) -> Seen:
    """Pixels by image and patch, of images that have not failed; checks what a chunk promises on the way."""
    seen: Seen = {}
    last = (-1, -1)
    for chunk in batch.chunks():
        assert len(chunk.image) == len(chunk.index) == chunk.count > 0
        assert (chunk.pixels[chunk.count :] == 0).all()
        for row, key in enumerate(zip(chunk.image.tolist(), chunk.index.tolist(), strict=True)):
            assert key > last, "in order, once"
            last = key
            seen[key] = chunk.pixels[row].copy()
    return {key: pixels for key, pixels in seen.items() if key[0] not in batch.failed}


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    tiles=st.lists(st.integers(0, ROWS * COLUMNS - 1), max_size=4, unique=True),
    size=st.integers(8, 50),
    stride=st.integers(8, 50),
    view=st.builds(View, st.booleans(), st.booleans(), st.integers(0, 3)),
    chunk=st.integers(1, 40),
    threads=st.integers(1, 3),
    hold=st.sampled_from([0, 2**24]),
)
def test_exactly_the_patches_that_touch_a_damaged_tile_are_unreadable(
    whole: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    tiles: list[int],
    size: int,
    stride: int,
    view: View,
    chunk: int,
    threads: int,
    hold: int,
) -> None:
    bad = damage(tmp_path_factory.mktemp("damaged") / "bad.tif", whole[name], tiles)
    sound, damaged = (FileOpener(path, path.name, size, stride, view=view) for path in (whole[name], bad))
    before = sound()
    expected = before.read(slice(None))
    missing = touching(before.grid.boxes(slice(None)), tiles)
    with Reader(threads, ahead=2, stall=PATIENCE) as reader:
        for batch in reader.stream([[damaged, sound], [sound]], chunk, "mask", cache_bytes=hold):
            seen = read_chunks(batch)
            where = [0] if len(batch.names) == 2 else []
            for image in range(len(batch.names)):
                lacking = missing if image in where else set()
                if len(lacking) == len(before):
                    assert image in batch.failed
                    assert image not in batch.unreadable
                    continue
                assert set(batch.unreadable.get(image, {})) == lacking
                assert {index for each, index in seen if each == image} == set(range(len(before))) - lacking
                for (each, index), pixels in seen.items():
                    if each == image:
                        np.testing.assert_array_equal(pixels, expected[index])
            fetched = batch.fetch([np.arange(len(before))[::-1]] * len(batch.names))
            for image, rows in enumerate(fetched):
                assert (rows is None) == (image in batch.failed)
                if rows is not None:
                    zeroed = expected.copy()
                    zeroed[sorted(batch.unreadable.get(image, {}))] = 0
                    np.testing.assert_array_equal(rows[::-1], zeroed)
            assert hold == 0 or reader.reread_patches == 0
    before.close()


def test_reasons_say_what_is_wrong_where(whole: dict[str, Path], tmp_path: Path) -> None:
    opener = FileOpener(damage(tmp_path / "bad.tif", whole["jpeg"], [8]), "bad", TILE)
    with Reader(1, stall=PATIENCE) as reader:
        for batch in reader.stream([[opener]], 8, "mask"):
            read_chunks(batch)
            assert list(batch.unreadable) == [0]
            assert list(batch.unreadable[0]) == [8]
            assert batch.unreadable[0][8].startswith("damaged at (32, 32, 32, 32)")


def test_leaving_patches_out_costs_no_buffers(whole: dict[str, Path], tmp_path: Path) -> None:
    made = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(shape)
        return np.empty(shape, dtype)

    bad = FileOpener(damage(tmp_path / "bad.tif", whole["jpeg"], range(0, 35, 2)), "bad", 20)
    with Reader(2, ahead=2, stall=PATIENCE, allocate=allocate) as reader:
        for batch in reader.stream([[bad]] * 3, 4, "mask"):
            read_chunks(batch)
    assert len(made) <= 2 + 2


# A folder of one file per patch: removed files are lost sectors, a removed folder is a lost image, a named pipe stalls.

SHAPE = (4, 4)


class Folder(TensorPatches):
    """Patches of a folder, each read from its own file when it is asked for."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ImageLost(path, "no such folder.")
        super().__init__(np.zeros((int((path / "count").read_text()), *SHAPE), np.uint8), str(path))
        self.path, self.was_closed = path, threading.Event()
        self.losses = 0

    def read(self, index: Any, out: np.ndarray | None = None) -> np.ndarray:
        assert not self.was_closed.is_set(), "read after close"
        index = np.asarray(index)
        out = np.empty((len(index), *SHAPE), np.uint8) if out is None else out
        for row, patch in zip(out, index.tolist(), strict=True):
            try:
                data = (self.path / f"{patch}").read_bytes()
            except FileNotFoundError as error:
                self.losses += 1
                raise ImageLost(self.path, f"patch {patch} is gone.") from error
            if len(data) != row.size:
                raise ImageError(self.path, f"patch {patch} is damaged.")
            row[...] = np.frombuffer(data, np.uint8).reshape(SHAPE)
        return out

    def close(self) -> None:
        self.was_closed.set()


class Disk:
    """Folders that tests break and mend, and the openers of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opened: list[Folder] = []

    def write(self, name: str, n: int) -> Opener:
        folder = self.path / name
        folder.mkdir()
        (folder / "count").write_text(str(n))
        for patch in range(n):
            (folder / f"{patch}").write_bytes(self.pixels(patch).tobytes())
        return Opener(name, partial(self.open, folder))

    def open(self, folder: Path) -> Folder:
        source = Folder(folder)
        self.opened.append(source)
        return source

    def take_away(self, name: str) -> None:
        (self.path / name).rename(self.path / f"{name} away")

    def put_back(self, name: str) -> None:
        (self.path / f"{name} away").rename(self.path / name)

    @staticmethod
    def pixels(patch: int) -> np.ndarray:
        return np.random.default_rng(patch).integers(1, 255, SHAPE, dtype=np.uint8)

    def check(self, seen: Seen, image: int, patches: Sequence[int] | range) -> None:
        """These patches of an image were seen, no others, and as they are."""
        assert [index for each, index in seen if each == image] == list(patches)
        for index in patches:
            np.testing.assert_array_equal(seen[image, index], self.pixels(index))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    yield disk
    assert eventually(lambda: all(source.was_closed.is_set() for source in disk.opened))


def elsewhere(function: Callable[[], object]) -> None:
    """Done by another thread, by the time this returns."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(PATIENCE)


@pytest.mark.parametrize("on_error", ["raise", "skip", "mask"])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_that_is_away_for_a_while_is_read_whole(disk: Disk, on_error: OnError, threads: int) -> None:
    lists = [[disk.write("a", 90), disk.write("b", 10)], [disk.write("c", 30)]]
    told: list[tuple[str, str]] = []

    def on_retry(name: str, reason: str) -> None:
        told.append((name, reason))
        if (disk.path / f"{name} away").exists() and len(told) > 1:
            elsewhere(lambda: disk.put_back(name))

    with Reader(threads, ahead=1, stall=PATIENCE, retry_wait=0.01, on_retry=on_retry) as reader:
        seen: list[Seen] = []
        for batch in reader.stream(lists, 4, on_error):
            part: Seen = {}
            for chunk in batch.chunks():
                if not part and not seen:
                    disk.take_away("a")
                for row, key in enumerate(zip(chunk.image.tolist(), chunk.index.tolist(), strict=True)):
                    part[key] = chunk.pixels[row].copy()
            seen.append(part)
            assert batch.failed == {}
            assert batch.unreadable == {}
        assert reader.read_patches == 130
    disk.check(seen[0], 0, range(90))
    disk.check(seen[0], 1, range(10))
    disk.check(seen[1], 0, range(30))
    assert [name for name, _ in told] == ["a", "a"], "what was lost together is opened anew once"
    if threads == 1:
        assert max(source.losses for source in disk.opened) == 1, "nobody touches a lost source again"
    assert told[0][1].endswith("; try 1 of 3 in 0.01 s")


@pytest.mark.parametrize("on_error", ["raise", "skip", "mask"])
def test_an_image_that_stays_away_fails_once_and_the_others_are_read(disk: Disk, on_error: OnError) -> None:
    lists = [[disk.write("a", 90), disk.write("b", 10)], [disk.write("c", 30)]]
    told: list[str] = []
    with Reader(2, ahead=1, stall=PATIENCE, retry_wait=0.01, on_retry=lambda *args: told.append(args[0])) as reader:
        stream = reader.stream(lists, 4, on_error)
        batch = next(stream)
        chunks = batch.chunks()
        next(chunks)
        disk.take_away("a")
        if on_error == "raise":
            with pytest.raises(ImageLost, match="no such folder"):
                list(chunks)
        else:
            assert [index for chunk in chunks for index in chunk.index[chunk.image == 1]] == list(range(10))
            assert batch.unreadable == {}
            assert [type(error) for error in batch.failed.values()] == [ImageLost]
            assert batch.sources[0] is None
            kept = batch.fetch([[3], [3]])
            assert kept[0] is None
            np.testing.assert_array_equal(kept[1], disk.pixels(3)[None])
            disk.check(read_chunks(next(stream)), 0, range(30))
    assert told == ["a"] * 3


@pytest.mark.parametrize("on_error", ["raise", "mask"])
@pytest.mark.parametrize("comes", [True, False])
def test_opening_is_tried_again_too(disk: Disk, on_error: OnError, comes: bool) -> None:
    lists = [[disk.write("a", 9), disk.write("b", 10), disk.write("c", 7)]]
    disk.take_away("a")
    disk.take_away("c")
    told: list[str] = []

    def on_retry(name: str, reason: str) -> None:
        told.append(name)
        if comes and len(told) == 2:
            disk.put_back("a")
            disk.put_back("c")

    with Reader(2, stall=PATIENCE, retries=2, retry_wait=0.01, on_retry=on_retry) as reader:
        stream = reader.stream(lists, 4, on_error)
        if on_error == "raise" and not comes:
            with pytest.raises(ImageLost, match="no such folder"):
                next(stream)
            return
        batch = next(stream)
        seen = read_chunks(batch)
    assert told == ["a", "c"] * (1 if comes else 2)
    assert list(batch.failed) == ([] if comes else [0, 2])
    for image, n in enumerate([9, 10, 7]):
        disk.check(seen, image, range(n) if comes or image == 1 else [])


def test_parts_that_stay_lost_are_left_out_and_waited_for_once(disk: Disk) -> None:
    opener = disk.write("a", 100)
    lost = [7, 8, 50, 99]
    for patch in lost:
        (disk.path / "a" / f"{patch}").unlink()
    (disk.path / "a" / "60").write_bytes(b"damaged")
    told: list[str] = []
    with Reader(2, ahead=2, stall=PATIENCE, retry_wait=0.01, on_retry=lambda *args: told.append(args[1])) as reader:
        for batch in reader.stream([[opener]], 10, "mask"):
            disk.check(read_chunks(batch), 0, [patch for patch in range(100) if patch not in [*lost, 60]])
            assert batch.unreadable[0] == {patch: f"patch {patch} is gone." for patch in lost} | {
                60: "patch 60 is damaged."
            }
            assert batch.failed == {}
            (rows,) = batch.fetch([[8, 9, 60, 3]])
            assert rows is not None
            assert [bool(row.any()) for row in rows] == [False, True, False, True]
    assert len(told) == 3


def test_a_lost_patch_found_by_fetch_is_noted(disk: Disk) -> None:
    with Reader(2, stall=PATIENCE, retry_wait=0.01) as reader:
        for batch in reader.stream([[FetchOnly(disk.write("a", 40))]], 8, "mask"):
            assert read_chunks(batch) == {}
            (disk.path / "a" / "20").unlink()
            (rows,) = batch.fetch([list(range(10, 30))])
            assert rows is not None
            for index, row in zip(range(10, 30), rows, strict=True):
                np.testing.assert_array_equal(row, 0 if index == 20 else disk.pixels(index))
            assert batch.unreadable == {0: {20: "patch 20 is gone."}}


@pytest.mark.parametrize("harm", ["damaged", "lost"])
def test_an_image_of_which_nothing_is_readable_has_failed(disk: Disk, harm: str) -> None:
    lists = [[disk.write("a", 12), disk.write("b", 12)]]
    for patch in range(12):
        (disk.path / "a" / f"{patch}").write_bytes(b"") if harm == "damaged" else (
            disk.path / "a" / f"{patch}"
        ).unlink()
    with Reader(2, stall=PATIENCE, retry_wait=0.01) as reader:
        for batch in reader.stream(lists, 5, "mask"):
            disk.check(read_chunks(batch), 1, range(12))
            assert batch.unreadable == {}
            assert str(batch.failed[0]).startswith("a: none of its 12 patches can be read (patch 0 is ")


def test_an_image_that_comes_back_as_another_one_fails(disk: Disk) -> None:
    opener = disk.write("a", 90)

    def swap(name: str, reason: str) -> None:
        disk.write("a", 91)

    with Reader(1, ahead=1, stall=PATIENCE, retry_wait=0.01, on_retry=swap) as reader:
        stream = reader.stream([[opener]], 4, "mask")
        batch = next(stream)
        for number, _ in enumerate(batch.chunks()):
            if number == 0:
                disk.take_away("a")
        assert "a: changed while it was read: 90 patches (4, 4) before, 91" in str(batch.failed[0])


class Pipe:
    """A patch file that blocks whoever opens it, until it is let go with wrong pixels."""

    def __init__(self, path: Path) -> None:
        self.path, self.link = path, path.with_name(f"{path.name} pipe")
        self.data = path.read_bytes()
        path.unlink()
        os.mkfifo(self.link)
        os.link(self.link, path)

    def mend(self) -> None:
        """Who opens the file from now on is not blocked."""
        whole = self.path.with_name("whole")
        whole.write_bytes(self.data)
        whole.replace(self.path)

    def let_go(self) -> None:
        """Everybody who is stuck reads wrong pixels of the right size."""
        end = os.open(self.link, os.O_RDWR)
        os.write(end, bytes([255] * len(self.data)))
        os.close(end)


@pytest.fixture
def pipe(disk: Disk) -> Iterator[Callable[[str, int], Pipe]]:
    pipes: list[Pipe] = []

    def make(name: str, patch: int) -> Pipe:
        pipes.append(Pipe(disk.path / name / f"{patch}"))
        return pipes[-1]

    yield make
    for each in pipes:
        each.let_go()


MakePipe = Callable[[str, int], Pipe]


@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_a_chunk_that_stalls_is_read_again_and_what_comes_late_is_not_seen(
    disk: Disk, pipe: MakePipe, on_error: OnError
) -> None:
    openers = [disk.write("a", 40), disk.write("b", 10)]
    stalled = pipe("a", 12)
    made = []
    told: list[str] = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(shape)
        return np.empty(shape, dtype)

    def on_retry(name: str, reason: str) -> None:
        told.append(reason)
        stalled.mend()

    with Reader(2, ahead=2, stall=1.0, allocate=allocate, retry_wait=0.01, on_retry=on_retry) as reader:
        for number, batch in enumerate(reader.stream([openers] * 3, 16, on_error)):
            if number == 1:  # its first chunks are read by now
                stalled.let_go()
                assert disk.opened[0].was_closed.wait(PATIENCE)
            seen = read_chunks(batch)
            disk.check(seen, 0, range(40))
            disk.check(seen, 1, range(10))
            assert batch.failed == batch.unreadable == {}
    assert "no data for 1 s" in told[0]
    assert len(made) <= 2 + 2 + 2 * len(told)


def test_a_fetch_that_stalls_is_done_again_and_what_comes_late_is_not_seen(disk: Disk, pipe: MakePipe) -> None:
    with Reader(2, stall=1.0, retry_wait=0.01, on_retry=lambda *_: stalled.mend()) as reader:
        for batch in reader.stream([[FetchOnly(disk.write("a", 40))]], 16):
            assert read_chunks(batch) == {}
            stalled = pipe("a", 12)
            (rows,) = batch.fetch([range(5, 25)])
            stalled.let_go()
            assert disk.opened[0].was_closed.wait(PATIENCE)
            assert rows is not None
            for index, row in zip(range(5, 25), rows, strict=True):
                np.testing.assert_array_equal(row, disk.pixels(index))


def test_an_image_that_stalls_for_good_fails_and_the_others_are_read(disk: Disk, pipe: MakePipe) -> None:
    openers = [disk.write("a", 40), disk.write("b", 10)]
    pipe("a", 12)
    with Reader(2, stall=0.5, retries=1, retry_wait=0.01) as reader:
        for batch in reader.stream([openers], 8, "mask"):
            disk.check(read_chunks(batch), 1, range(10))
            assert [type(error) for error in batch.failed.values()] == [StalledRead]
            assert batch.unreadable == {}


def test_a_source_that_opens_too_late_is_closed_at_once(disk: Disk) -> None:
    first = disk.write("a", 9)
    gate, calls = threading.Event(), []

    def slow() -> Folder:
        calls.append(1)
        late = len(calls) == 1
        if late:
            gate.wait(PATIENCE)
        source = first()
        if late:
            source.was_late = True  # type: ignore[attr-defined]
        return source  # type: ignore[return-value]

    with Reader(2, stall=0.5, retry_wait=0.01) as reader:
        stream = reader.stream([[Opener("a", slow)]], 4, "mask")
        batch = next(stream)
        disk.check(read_chunks(batch), 0, range(9))
        gate.set()
        assert eventually(lambda: any(s.was_closed.is_set() and hasattr(s, "was_late") for s in disk.opened))
        assert batch.fetch([[3]])[0] is not None  # the one in use is open


@pytest.mark.parametrize("where", ["open", "read"])
def test_closing_does_not_wait_for_a_retry(disk: Disk, where: str) -> None:
    lists = [[disk.write("a", 90)]]
    waits, ended = threading.Event(), []
    reader = Reader(1, ahead=1, stall=PATIENCE, retry_wait=1e6, on_retry=lambda *_: waits.set())

    def consume() -> None:
        try:
            for batch in reader.stream(lists, 4, "mask"):
                for number, _ in enumerate(batch.chunks()):
                    if number == 0:
                        disk.take_away("a")
        except RuntimeError as error:
            ended.append(str(error))

    if where == "open":
        disk.take_away("a")
    thread = threading.Thread(target=consume)
    thread.start()
    assert waits.wait(PATIENCE)
    reader.close()
    thread.join(PATIENCE)
    assert len(ended) == 1
    assert "closed" in ended[0]


def test_what_on_retry_raises_reaches_the_consumer(disk: Disk) -> None:
    def stop(name: str, reason: str) -> None:
        raise InterruptedError("asked to stop")

    lists = [[disk.write("a", 90)]]
    with Reader(1, ahead=1, stall=PATIENCE, on_retry=stop) as reader:
        stream = reader.stream(lists, 4, "mask")
        chunks = next(stream).chunks()
        next(chunks)
        disk.take_away("a")
        with pytest.raises(InterruptedError, match="asked to stop"):
            list(chunks)


def test_images_that_are_only_fetched_from_are_open_but_not_streamed(disk: Disk) -> None:
    openers: list[Any] = [disk.write("a", 9), FetchOnly(disk.write("b", 10)), disk.write("c", 7)]
    assert openers[1].name == "b"
    with Reader(2, stall=PATIENCE) as reader:
        for batch in reader.stream([openers], 4, "mask"):
            seen = read_chunks(batch)
            for image, n in enumerate([9, 0, 7]):
                disk.check(seen, image, range(n))
            assert [None if source is None else len(source) for source in batch.sources] == [9, 10, 7]
            rows = batch.fetch([[], [9, 2], []])[1]
            assert rows is not None
            np.testing.assert_array_equal(rows, np.stack([disk.pixels(9), disk.pixels(2)]))
            assert batch.failed == batch.unreadable == {}


def test_batches_that_need_no_buffers_are_not_all_opened_ahead(disk: Disk) -> None:
    opener = FetchOnly(disk.write("a", 9))
    with Reader(1, ahead=2, stall=PATIENCE) as reader:
        for number, batch in enumerate(reader.stream([[opener]] * 20, 4)):
            assert batch.fetch([[number % 9]])[0] is not None
            if number == 0:
                time.sleep(0.2)  # enough to open them all
            assert len(disk.opened) <= number + 1 + 2 + 2
    assert len(disk.opened) == 20
