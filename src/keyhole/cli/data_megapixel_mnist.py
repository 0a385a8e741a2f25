"""`keyhole data megapixel-mnist`: draw canvases with handwritten digits among noise, as published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from annotated_types import Interval

from keyhole.cli.options import Options, print_options, read
from keyhole.config.settings import NotNegative, Positive
from keyhole.errors import ConfigError


class MegapixelMnistOptions(Options):
    """Draw Megapixel MNIST as published: five digits of MNIST among strokes of noise, with four tasks.

    Writes manifest.csv, which `keyhole train` takes, and digits.csv, which says where the digits are.
    """

    EXAMPLES: ClassVar = (
        "keyhole data megapixel-mnist canvases --mnist mnist",
        "keyhole data megapixel-mnist canvases --download --size 750 --train 2000 --test 500 --noise 12",
    )

    POSITIONAL: ClassVar = {"out": "OUT"}

    out: Path
    """Folder to write to; created if it is not there, and must be empty."""
    mnist: Path | None = None
    """Folder of MNIST's four files, such as train-images-idx3-ubyte.gz."""
    download: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Download MNIST's files (11 MB) into the folder of --mnist, default `mnist` beside OUT; they are checked."""
    size: Annotated[Positive, Interval(ge=280, le=200_000)] = 1500
    """Width and height of a canvas in pixels; the paper has 1500, and up to 10,000."""
    train: NotNegative = 5000
    """Canvases to learn from."""
    val: NotNegative = 0
    """Canvases to choose the model by, as the paper does not; the last 5,000 training digits are then theirs alone."""
    test: NotNegative = 1000
    """Canvases to test on, which show MNIST's test digits."""
    noise: NotNegative = 50
    """Strokes of noise on a canvas."""
    noise_pen: Literal["thin", "thick"] = "thin"
    """`thin` is the published noise. `thick` strokes are as wide as the digits' pen and drawn anew each time: much
    harder, the published code stays at chance."""
    seed: NotNegative = 0
    """Same seed, same bytes; a canvas does not depend on how many there are."""


def run(argv: list[str]) -> int:
    options = read(MegapixelMnistOptions, argv, "keyhole data megapixel-mnist")
    if options.print_config:
        return print_options(options)
    if options.mnist is None and not options.download:
        raise ConfigError("--mnist: give the folder of MNIST's four files, or --download to fetch them (11 MB)")

    from keyhole.datasets.megapixel_mnist import MegapixelMnist, make_megapixel_mnist
    from keyhole.datasets.mnist import download_mnist, mnist_splits
    from keyhole.util.progress import Progress

    folder = options.mnist or options.out.parent / "mnist"
    data = MegapixelMnist(**options.model_dump(exclude={"out", "mnist", "download", "print_config"}))
    if options.download:
        download_mnist(folder)
    with Progress(data.train + data.val + data.test, "drawing canvases") as progress:
        digits = mnist_splits(folder, val=data.val > 0)
        manifest = make_megapixel_mnist(options.out, data, digits, lambda: progress.update(images=1))
    print(f"canvases of {data.size} x {data.size} pixels; digits: {manifest.with_name('digits.csv')}")
    print(f"train on them with: keyhole train {manifest} --recipe megapixel-mnist")
    return 0
