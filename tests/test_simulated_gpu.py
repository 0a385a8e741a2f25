"""The simulated GPU: through the real reader its decoder gets tiles with as many threads and as small chunks as runs have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def simulated(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("simulated_gpu")


def test_the_device_decodes_a_share_of_the_tiles(simulated: Any) -> None:
    shares = {name: simulated.slides(16, 256, deliver, 0.4)[1] for name, deliver in simulated.POLICIES.items()}
    assert shares["as built"] > 0
    assert shares["host only"] == 0
    assert shares["always the device"] == 1


@pytest.mark.parametrize("fetched", [False, True])
def test_each_photograph_is_decoded_once(simulated: Any, fetched: bool) -> None:
    _, most, mean = simulated.photographs(16, 1024, fetched, 0.1)
    assert 0 < mean <= most <= 16
