"""`keyhole demo`: the whole path once, on images it writes itself."""

from __future__ import annotations

from pathlib import Path

from keyhole.cli.options import Options, print_config, read
from keyhole.config.settings import NotNegative


class DemoOptions(Options):
    """Write images with small digits among clutter, train on them, evaluate, and draw what the model kept.

    Takes a few minutes on two cores, without a network.
    """

    seed: NotNegative = 0
    """Another seed gives other images and another model."""
    out: Path | None = None
    """Folder for images, run and contact sheet; default is `demo`, or `demo-2` and so on where that is taken."""


def run(argv: list[str]) -> int:
    options = read(DemoOptions, argv, "keyhole demo")
    from keyhole.tools.demo import demo, demo_config, free_folder

    out = free_folder() if options.out is None else options.out
    if options.print_config:
        return print_config(demo_config(out, options.seed))
    demo(out, seed=options.seed)
    return 0
