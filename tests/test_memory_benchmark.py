"""`benchmarks/memory.py` tells memory that is flat over the number of patches from memory that is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keyhole.errors import ConfigError, KeyholeError


@pytest.fixture(scope="module")
def steps(benchmark: Callable[[str], Any]) -> Any:
    """The module of the benchmark."""
    return benchmark("memory_steps")


def config_of(steps: Any, **patch: int) -> Any:
    small = {
        "model": {"encoder": "small", "width": 4, "heads": 2},
        "select": {"m": 8, "chunk": 32},
        "run": {"ahead": 1},
    }
    return steps.plain_config(cuda=False).replace(**small, patch=patch)


def test_memory_of_a_real_step_is_flat(steps: Any) -> None:
    few, many = steps.growths([steps.measure_apart(config_of(steps, size=16), [n, 8]) for n in (200, 3000)], kept=8)
    assert (few.peak.n, many.peak.n) == (200, 3000)
    assert (few.peak.chunk, few.peak.read_ahead) == (32, 96)
    assert many.peak.logits == 4 * 2 * 3000
    assert few.grown == 0
    assert many.grown == many.peak.process - few.peak.process
    assert many.allowed >= many.logits
    assert steps.verdict([few, many]).startswith("flat: ")


def test_a_process_that_keeps_what_it_reads_is_not_flat(steps: Any) -> None:
    script, peaks = Path(__file__).parent / "processes" / "keeps_what_it_reads.py", []
    for n in (300, 6000):
        asked = {"config": config_of(steps, size=64).model_dump(mode="json"), "counts": [n], "steps": 1}
        command = [sys.executable, script]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True, timeout=120)
        peaks.append(steps.Peak(**json.loads(done.stdout)))
    said = steps.verdict(steps.growths(peaks, kept=8))
    assert said.startswith("not flat: from 300 to 6,000 patches memory grew by ")


def peak(steps: Any, n: int, process: int, device: int = 0) -> Any:
    return steps.Peak(n, 64, None, 384, 32 * n, 0, process, 0, process, device, 1.0)


def test_flat_is_the_logits_twice_their_order_and_what_two_runs_differ_by(steps: Any) -> None:
    base = peak(steps, 1000, 600 * 10**6)
    allowed = 2 * 32 * 99_000 + 32 * 99_000 + 20 * 10**6
    for more, flat in ((allowed, True), (allowed + 1, False)):
        growth = steps.Growth(peak(steps, 100_000, base.process + more), base)
        assert growth.allowed == allowed
        assert growth.flat is flat
    on_device = [peak(steps, n, 600 * 10**6, device=size) for n, size in ((2000, 10**9), (1000, 5 * 10**8))]
    assert not steps.Growth(*on_device).flat


def test_numbers_below_what_is_read_ahead_are_not_compared_with(steps: Any) -> None:
    found = steps.growths([peak(steps, n, size) for n, size in ((100, 1), (500, 10**9), (1000, 10**9))], kept=64)
    assert [each.base for each in found] == [None, None, peak(steps, 500, 10**9)]
    for kept, least in ((64, 384), (600, 600)):
        with pytest.raises(ConfigError, match=f"two numbers of {least} or more"):
            steps.growths([peak(steps, 100, 1), peak(steps, 500, 2)], kept=kept)


def test_a_mistake_in_the_process_that_measures_is_the_users_line(steps: Any) -> None:
    config = steps.plain_config(cuda=False).replace(memory="10MB")
    with pytest.raises(KeyholeError, match="--memory: 10 MB"):
        steps.measure_apart(config, [300])


def test_made_patches_are_made_from_their_index(steps: Any) -> None:
    source = sys.modules["made_patches"].MadePatches(64, (32, 32, 3))
    index = np.random.default_rng(1).permutation(64)
    out = np.empty((64, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(source.read(index), source.read(index, out=out))
    assert len(np.unique(out.reshape(64, -1), axis=0)) == 64
