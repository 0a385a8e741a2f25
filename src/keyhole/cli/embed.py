"""`keyhole embed`: every patch of every image through an encoder once, into one file of features for each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

from keyhole.cli.options import Options, print_options, read
from keyhole.config.inference import EmbedSettings
from keyhole.errors import ConfigError


class EmbedOptions(Options, EmbedSettings):
    """Embed the patches of every image, and write one HDF5 file of features for each, as CLAM and TRIDENT do.

    `keyhole train DATA --data.features DIR` learns from them. Run the same command again to continue where it stopped.
    """

    EXAMPLES: ClassVar = (
        "keyhole embed slides.csv --encoder resnet50 --pretrained --patch.foreground tissue --out features",
        "keyhole embed slides --encoder small --width 16 --weights small.safetensors --out features",
    )
    POSITIONAL: ClassVar = {"data": "DATA"}
    ESSENTIAL: ClassVar = (
        *("out", "run", "encoder", "pretrained", "weights", "patch.size", "patch.mpp", "patch.foreground", "masks"),
        *("root", "dtype", "memory", "device", "on-bad-image", "print-config"),
    )


def run(argv: list[str]) -> int:
    options = _over_run(read(EmbedOptions, argv, "keyhole embed"), argv)
    if options.print_config:
        return print_options(options)
    if options.data is None:
        raise ConfigError("no data given: keyhole embed DATA --out DIR, where DATA is a CSV or a folder of images")
    if options.out is None:
        raise ConfigError("--out is missing: keyhole embed DATA --out DIR, a folder for the files of features")

    from keyhole.inference.embed import embed

    given: dict[str, Any] = {name: each.expanduser() if isinstance(each, Path) else each for name, each in options}
    done = embed(**{name: each for name, each in given.items() if name != "print_config"})
    for name, reason in done.left_out.items():
        print(f"left out: {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)
    print(done)
    return 0


def _over_run(options: EmbedOptions, argv: list[str]) -> EmbedOptions:
    """Return the options, over the patch settings of `--run`, beside which an encoder is an error."""
    if options.run is None:
        return options
    from keyhole.inference.embed import encoder_of

    for name in ("encoder", "pretrained", "weights", "stages", "width", "channels"):
        if getattr(options, name) != EmbedOptions.model_fields[name].default:
            raise ConfigError(f"--run gives the encoder and its weights: leave out --{name}")
    _, patch = encoder_of(options.run.expanduser())
    return read(EmbedOptions, argv, "keyhole embed", {"patch": patch.model_dump()})
