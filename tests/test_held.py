"""Laws of pixels that stay with their batch: fetched without a file, the same as from it, gone with the batch."""

from __future__ import annotations

import os
import shutil
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from make_images import picture, write_tiff
from test_damage import Disk, MakePipe, disk, pipe, read_chunks, whole
from test_reading import PATIENCE, Probe, drain, eventually, no_thread_is_left, openers

from keyhole.loading import Batch, FetchOnly, OnError, Reader
from keyhole.patches.opener import FileOpener

__all__ = ["disk", "no_thread_is_left", "pipe", "whole"]  # fixtures that tests here use

PLENTY = 2**24


def test_what_is_held_is_fetched_without_the_file(tmp_path: Path) -> None:
    files = [write_tiff(tmp_path / f"{k}.tif", picture(3, 200, 136, k), tile=(32, 32)) for k in range(3)]
    lists = [[FileOpener(path, path.name, 20) for path in files]] * 2
    expected = []
    for opener in lists[0]:
        with closing(opener()) as source:
            expected.append(source.read(slice(None)))
    with Reader(2, stall=PATIENCE) as reader:
        stream = reader.stream(lists, 16, cache_bytes=PLENTY)
        drain(next(stream))
        batch = next(stream)
        drain(batch)
        for path in files:
            os.truncate(path, 0)
        kept = [np.array([5, 0, 5, len(pixels) - 1]) for pixels in expected]
        for wanted, pixels, rows in zip(kept, expected, batch.fetch(kept), strict=True):
            np.testing.assert_array_equal(rows, pixels[wanted])
        assert reader.reread_patches == 0


def test_patches_that_have_not_come_yet_are_read() -> None:
    probe = Probe(n=40)
    with Reader(1, stall=PATIENCE) as reader:
        stream = reader.stream([openers(probe)], 4, cache_bytes=PLENTY)
        batch = next(stream)
        next(batch.chunks())
        (rows,) = batch.fetch([[39, 2, 17]])
        np.testing.assert_array_equal(rows, probe.array[[39, 2, 17]])
        assert reader.reread_patches == 2


def test_images_that_were_not_streamed_are_read_and_the_others_are_not() -> None:
    first, second = Probe("first"), Probe("second")
    with Reader(1, stall=PATIENCE) as reader:
        stream = reader.stream([[FetchOnly(first.opener()), second.opener()]], 4, cache_bytes=PLENTY)
        batch = next(stream)
        drain(batch)
        rows = batch.fetch([[3, 1], [0, 2]])
        np.testing.assert_array_equal(rows[0], first.array[[3, 1]])
        np.testing.assert_array_equal(rows[1], second.array[[0, 2]])
        assert reader.reread_patches == 2


def test_two_batches_are_held_at_most_and_each_goes_with_its_batch() -> None:
    probes = [Probe(f"{k}", n=20) for k in range(5)]
    closed: list[Batch] = []
    with Reader(2, ahead=30, stall=PATIENCE) as reader:
        stream = reader.stream([openers(probe) for probe in probes], 4, cache_bytes=probes[0].array.nbytes)
        for number, probe in enumerate(probes):
            batch = next(stream)
            drain(batch)
            held = weakref.ref(batch.cache)
            assert batch.cache is not None
            if number + 1 < len(probes):
                assert probes[number + 1].was_read.wait(PATIENCE)
            assert not any(later.reading.is_set() for later in probes[number + 2 :])
            (rows,) = batch.fetch([[7, 3]])
            np.testing.assert_array_equal(rows, probe.array[[7, 3]])
            assert not any(before.cache for before in closed)
            closed.append(batch)
        assert reader.reread_patches == 0
        with pytest.raises(StopIteration):
            next(stream)
        assert not any(before.cache for before in closed)
    assert eventually(lambda: held() is None)


@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_what_a_stuck_thread_writes_late_is_not_fetched(disk: Disk, pipe: MakePipe, on_error: OnError) -> None:
    opener = disk.write("a", 40)
    stalled = pipe("a", 12)
    with Reader(2, ahead=2, stall=0.5, retry_wait=0.01, on_retry=lambda *_: stalled.mend()) as reader:
        for batch in reader.stream([[opener]], 16, on_error, cache_bytes=PLENTY):
            disk.check(read_chunks(batch), 0, range(40))
            stalled.let_go()
            assert disk.opened[0].was_closed.wait(PATIENCE)
            (rows,) = batch.fetch([range(40)])
            assert rows is not None
            for index, row in enumerate(rows):
                np.testing.assert_array_equal(row, disk.pixels(index))


def test_an_image_that_comes_back_keeps_what_was_held_of_it(disk: Disk) -> None:
    opener = disk.write("a", 90)
    back = disk.path / "a away"

    def on_retry(name: str, reason: str) -> None:
        if back.exists():
            disk.put_back("a")

    with Reader(1, ahead=1, stall=PATIENCE, retry_wait=0.01, on_retry=on_retry) as reader:
        for batch in reader.stream([[opener]], 8, cache_bytes=PLENTY):
            for number, _ in enumerate(batch.chunks()):
                if number == 0:
                    disk.take_away("a")
            assert len(disk.opened) > 1
            shutil.rmtree(disk.path / "a")
            (rows,) = batch.fetch([range(90)])
            assert rows is not None
            for index, row in enumerate(rows):
                np.testing.assert_array_equal(row, disk.pixels(index))
        assert reader.reread_patches == 0
