"""Measure a training step as `benchmarks/memory_steps.py` does, with a source that keeps all patches that it reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory_steps
from made_patches import MadePatches

held: list[Any] = []
read = MadePatches.read


def reading_and_keeping(self: Any, index: Any, out: Any = None) -> Any:
    found = read(self, index, out)
    held.append(found.copy())
    return found


MadePatches.read = reading_and_keeping
memory_steps.main()
