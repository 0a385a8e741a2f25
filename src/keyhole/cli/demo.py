"""`keyhole demo`: the whole path once, on images it writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge

from keyhole.cli.arguments import parse, print_config


@dataclass(frozen=True)
class DemoOptions:
    """Write images with small digits among clutter, train on them, evaluate, and draw what the model kept.

    Takes a few minutes on two cores, without a network.
    """

    seed: Annotated[int, Ge(0)] = 0
    """Another seed gives other images and another model."""
    out: Path | None = None
    """Folder for images, run and contact sheet; default is `demo`, or `demo-2` and so on where that is taken."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the configuration that the demo trains with, as YAML, and end."""


def run(argv: list[str]) -> int:
    options = parse(DemoOptions, argv, "keyhole demo")
    from keyhole.tools.demo import demo, demo_config, free_folder

    out = free_folder() if options.out is None else options.out
    if options.print_config:
        return print_config(demo_config(out, options.seed))
    demo(out, seed=options.seed)
    return 0
