"""`keyhole evaluate`: metrics of a run with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from keyhole.cli.options import Options, print_options, read
from keyhole.config.amounts import ONE_PERCENT, Memory, Share
from keyhole.config.settings import Decode, Device
from keyhole.errors import DataError


class EvaluateOptions(Options):
    """Metrics of a run's best model with 95 % intervals, and one CSV row per image.

    Where the data have a column `annotation` (GeoJSON of QuPath, XML of ASAP), also how much of the attention lies in
    what it outlines.
    """

    EXAMPLES: ClassVar = ("keyhole evaluate runs/one", "keyhole evaluate runs/one --data other.csv --out elsewhere")

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of `keyhole train`."""
    data: Path | None = None
    """Other labelled data to evaluate on: a folder of classes or a CSV; default is the run's own."""
    root: Path | None = None
    """Folder that the run's own images were moved to. With --data, folder that relative paths of the CSV start from."""
    split: str = "test"
    """Split to evaluate: train, val or test; images of other data without splits count as test."""
    out: Path | None = None
    """Folder for metrics, table and contact sheet; default is in the run folder, under evaluation. With it, nothing is
    written into the run folder."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    decode: Decode = "auto"
    """Where JPEG tiles of slides are decoded: `auto` lets a GPU take part, which changes results a little from run to
    run; `cpu` does not."""
    features: Path | None = None
    """Folder of feature files of the images given with --data."""
    masks: Path | None = None
    """Folder of masks of the images given with --data."""
    memory: Memory = None
    """Budget such as `5GB`, of the device or, on CPU, of the process; `auto` is what is free."""
    unreadable: Share = ONE_PERCENT
    """Share of an image's patches that may be unreadable."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What an unreadable image or annotation does: end the evaluation, or be left out, counted and listed."""


def run(argv: list[str]) -> int:
    options = read(EvaluateOptions, argv, "keyhole evaluate")
    if options.print_config:
        return print_options(options)

    from keyhole.inference.evaluate import evaluate

    try:
        evaluation = evaluate(**{name: value for name, value in options if name != "print_config"})
    except DataError as error:  # which names the options of `keyhole train`
        message = str(error).replace("--data.path PATH", "--data PATH").replace("--data.", "--")
        raise DataError(message) from error
    print("\n".join(evaluation.lines()))
    return 0
