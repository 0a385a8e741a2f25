"""Writes what other parts read: a slide, photographs, canvases of Megapixel MNIST."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from canvases import MNIST, write_canvases
from photographs import write_scenes

from on_gpu.bench import Bench
from on_gpu.slides import write_slide

SIDE = 1500


def draw(bench: Bench) -> None:
    written(bench, {"slide": write_slide, "photographs": write_photographs})


def draw_canvases(bench: Bench) -> None:
    written(bench, {"canvases": write_digits})


def written(bench: Bench, all_work: Mapping[str, Callable[[Bench], object]]) -> None:
    for name, work in all_work.items():
        start = time.monotonic()
        if bench.attempt(name, lambda work=work: work(bench)):  # type: ignore[misc]
            bench.say(f"{name} written in {time.monotonic() - start:.1f} s")


def write_photographs(bench: Bench) -> tuple[Path, str, int]:
    """Their folder, what they show and how many they are; those that are there are not drawn again."""
    folder, count = bench.scratch / "photographs", 2 if bench.dry else 128
    return folder, write_scenes(folder, count), count


def write_digits(bench: Bench) -> Path:
    """The manifest of the published construction, 5,000 canvases to learn from and 1,000 to measure on."""
    sizes = {"size": 300, "train": 60, "test": 4} if bench.dry else {"size": SIDE, "train": 5000, "test": 1000}
    return write_canvases(bench.scratch / "canvases", bench.mnist or MNIST, **sizes)
