"""Laws of how often pixels are copied on their way, told by the memory that numpy takes meanwhile."""

from __future__ import annotations

import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_reading import PATIENCE, Opener, Probe, drain, no_thread_is_left

from keyhole.errors import ImageError
from keyhole.loading import Reader
from keyhole.loading.buffers import CacheMemory
from keyhole.patches.sources import TensorPatches
from keyhole.util.rows import take_rows

__all__ = ["no_thread_is_left"]  # a fixture that every test here uses

N, SHAPE = 64, (32, 32, 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), dtype=np.uint8)
INDEX = np.random.default_rng(1).permutation(N)
ROW = PIXELS[0].nbytes


@contextmanager
def taking(most: int) -> Iterator[None]:
    """Fails where more bytes than that are taken at a time inside."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - before <= most, f"{peak - before:,} bytes"


@given(
    st.lists(st.integers(-6, 5), max_size=9),
    st.sampled_from([np.ascontiguousarray, np.asfortranarray, lambda a: a[::-1], lambda a: a.astype(">i4")]),
    st.booleans(),
)
def test_rows_are_those_that_numpy_gives(index: list[int], lay: Callable[..., np.ndarray], turned: bool) -> None:
    array = lay(np.arange(6 * 4, dtype=np.int32).reshape(6, 2, 2))
    rows = np.array(index, np.int64)
    out = np.full((len(rows), 2, 2), -1, array.dtype)
    take_rows(array, rows, out.swapaxes(1, 2) if turned else out)
    np.testing.assert_array_equal(out, array[rows].swapaxes(1, 2) if turned else array[rows])


@pytest.mark.parametrize("index", [[0, 6], [-7], [0, 1, 2, 99]])
def test_a_row_that_is_not_there_raises(index: list[int]) -> None:
    array = np.arange(24).reshape(6, 4)
    with pytest.raises(IndexError):
        take_rows(array, np.array(index), np.empty((len(index), 4), array.dtype))
    with pytest.raises(IndexError):
        TensorPatches(array).read(index, out=np.empty((len(index), 4), array.dtype))
    with pytest.raises(IndexError):
        take_rows(array[:0], np.array([0]), np.empty((1, 4), array.dtype))


def test_patches_in_memory_are_copied_once() -> None:
    source = TensorPatches(PIXELS)
    out = np.empty_like(PIXELS)
    with taking(ROW):
        source.read(INDEX, out=out)
    with taking(PIXELS.nbytes + 2 * ROW):
        fresh = source.read(INDEX)
    np.testing.assert_array_equal(fresh, out)
    np.testing.assert_array_equal(out, PIXELS[INDEX])


def test_what_is_held_is_copied_once() -> None:
    opener = Opener("held", lambda: TensorPatches(PIXELS))
    with Reader(1, stall=PATIENCE) as reader:
        for batch in reader.stream([[opener]], 16, cache_bytes=PIXELS.nbytes):
            drain(batch)
            with taking(PIXELS.nbytes + 4 * ROW):
                (rows,) = batch.fetch([INDEX])
            np.testing.assert_array_equal(rows, PIXELS[INDEX])
            assert reader.reread_patches == 0


def test_batches_hold_their_pixels_in_the_memory_of_those_before() -> None:
    lengths = [20, 20, 13, 20, 1, 20, 20, 7]
    probes = [Probe(f"{k}", n=n) for k, n in enumerate(lengths)]
    places, most = set(), 20 * 16
    with Reader(2, stall=PATIENCE) as reader:
        for probe, batch in zip(
            probes, reader.stream([[p.opener()] for p in probes], 4, cache_bytes=most), strict=True
        ):
            drain(batch)
            assert batch.cache is not None
            places.add(batch.cache.memory.ctypes.data)
            wanted = np.arange(len(probe))[::-1]
            np.testing.assert_array_equal(batch.fetch([wanted])[0], probe.array[wanted])
        assert reader.reread_patches == 0
    assert len(places) <= 3, "two batches of 20, and one more where a small one was read while both were in use"


@pytest.mark.parametrize("lengths", [range(10, 250, 4), [10, 200, 60, 120, 30, 220] * 8, range(250, 10, -4)], ids=str)
def test_batches_whose_sizes_vary_take_no_more_memory_than_two_of_the_largest(lengths: Sequence[int]) -> None:
    memory, taken, most = CacheMemory(limit=2 * 10_000), deque[np.ndarray](), 0
    for length in lengths:
        held = memory.take(length)  # as of a prediction, which does not know its largest batch before
        assert held is not None
        assert len(held) >= length
        taken.append(held)
        most = max(most, memory.taken + sum(each.nbytes for each in memory.free))
        if len(taken) == 2:
            memory.give(taken.popleft(), reusable=True)
    assert most <= 2 * max(lengths)


def test_memory_that_a_stuck_thread_may_write_to_is_not_used_again() -> None:
    """An image that fails while others of its batch are held: its readings may go on."""
    good = [Probe(f"good {k}", n=10) for k in range(4)]
    bad = [Probe(f"bad {k}", n=10, fail_at=4) for k in range(4)]
    lists = [[one.opener(), other.opener()] for one, other in zip(good, bad, strict=True)]
    kept = []
    with Reader(1, stall=PATIENCE) as reader:
        for probe, batch in zip(good, reader.stream(lists, 4, "skip", cache_bytes=20 * 16), strict=True):
            drain(batch)
            assert isinstance(batch.failed[1], ImageError)
            assert batch.cache is not None
            assert not any(np.shares_memory(batch.cache.memory, before) for before in kept)
            kept.append(batch.cache.memory)
            np.testing.assert_array_equal(batch.fetch([[9, 0], None])[0], probe.array[[9, 0]])
