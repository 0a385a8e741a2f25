"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and golden vectors that are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with real data is not beside this checkout")
    return SHARED
