"""`keyhole data traffic-signs`: the Swedish Traffic Signs data set on disk -> a manifest of the published task."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import Annotated, ClassVar, Literal

import tyro

from keyhole.cli.options import Options, print_options, read


class TrafficSignsOptions(Options):
    """Make a manifest of a copy of Swedish Traffic Signs: 50, 70, 80 km/h or empty, filtered as published.

    Writes manifest.csv, which `keyhole train` takes, left_out.csv, and annotations, the boxes of the signs, by which
    `keyhole evaluate` says how many kept patches touch one. Images stay where they are. Nothing is downloaded.
    """

    EXAMPLES: ClassVar = (
        "keyhole data traffic-signs swedish signs",
        "keyhole data traffic-signs swedish enlarged --enlarge",
        "keyhole data traffic-signs composites signs --train-set Set2",
    )
    POSITIONAL: ClassVar = {"root": "FOLDER", "out": "OUT"}

    root: Path
    """Folder that holds Set1 and Set2, each with annotations.txt and its unpacked images."""
    out: Path
    """Folder to write to; created if it is not there, and must be empty."""
    train_set: Literal["auto", "Set1", "Set2"] = "auto"
    """Which to learn from; the other is for testing. `auto` demands the published counts, 747 and 684 images; name one
    to accept others."""
    enlarge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write the images enlarged to 1600 x 1200 pixels, as the published code does on loading (lossless, 3 GB)."""


def run(argv: list[str]) -> int:
    options = read(TrafficSignsOptions, argv, "keyhole data traffic-signs")
    if options.print_config:
        return print_options(options)

    from keyhole.datasets.traffic_signs import SIZE, read_traffic_signs, write_traffic_signs
    from keyhole.util.progress import Progress

    data = read_traffic_signs(options.root, options.train_set)
    with ExitStack() as shown:
        count = sum(len(signs.images) for signs in data.values())
        progress = shown.enter_context(Progress(count, "enlarging images")) if options.enlarge else None
        written = (lambda: None) if progress is None else (lambda: progress.update(images=1))
        manifest = write_traffic_signs(options.out, data, SIZE if options.enlarge else None, written)
    print("\n".join(line for split, signs in data.items() for line in signs.lines(split)))
    original = all(signs.original for signs in data.values())
    print(f"annotations: {'the original files' if original else 'not the original files of Swedish Traffic Signs'}")
    size = "" if options.enlarge else " --patch.size 80"
    print(f"train on them with: keyhole train {quote(str(manifest))} --recipe traffic{size}")
    return 0
