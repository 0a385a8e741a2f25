"""`keyhole data slides`: write labelled slides of generated tissue."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Interval

from keyhole.cli.options import Options, print_options, read
from keyhole.config.settings import Fraction, NotNegative, Number, Positive


class SlidesOptions(Options):
    """Write labelled pyramidal TIFF slides of generated tissue; positive ones hold small nests of hollow nuclei.

    Writes manifest.csv, which `keyhole train` takes, and nests.csv, which says where the nests are.
    """

    POSITIONAL: ClassVar = {"out": "OUT"}

    out: Path
    """Folder to write to; created if it is not there, and must be empty."""
    count: Positive = 100
    """Slides to write, those of `val` and `test` included."""
    side: Annotated[Positive, Interval(ge=2048, le=200_000)] = 6144
    """Width and height in pixels, 2,048 to 200,000; memory does not grow with it."""
    positive: Fraction = 0.5
    """Share of the slides that have nests."""
    seed: NotNegative = 0
    """Same seed, same slides; slide number k does not depend on how many are written."""
    val: NotNegative = 0
    """How many are for choosing the model. With neither `val` nor `test` the manifest names no splits."""
    test: NotNegative = 0
    """How many are for testing; the last ones."""
    mpp: Annotated[Number, Interval(ge=0.05, le=20)] = 0.5
    """Microns per pixel that the files state."""


def run(argv: list[str]) -> int:
    options = read(SlidesOptions, argv, "keyhole data slides")
    if options.print_config:
        return print_options(options)

    from keyhole.datasets.slides import SlideSet, make_slides
    from keyhole.util.progress import Progress

    start, whole, pixels = time.monotonic(), options.side**2, 0
    with Progress(options.count, "writing slides") as progress:

        def show(more: int) -> None:
            nonlocal pixels
            pixels += more
            speed = pixels / 1e6 / (time.monotonic() - start)
            progress.update(images=pixels // whole - progress.images, text=f"{speed:.0f} Mpx/s")

        slides = SlideSet(**options.model_dump(exclude={"out", "print_config"}))
        manifest = make_slides(options.out, slides, show)
    print(f"{options.count} slides of {options.side} x {options.side} pixels; nests: {manifest.with_name('nests.csv')}")
    print(f"train on them with: keyhole train {manifest} --recipe slides")
    return 0
