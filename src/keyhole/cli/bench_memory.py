"""`keyhole bench memory`: whether memory stays flat while the number of patches grows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from keyhole.cli.bench_source import source_of
from keyhole.cli.options import ConfigOptions, parse, print_config, read
from keyhole.config.settings import Config
from keyhole.errors import ConfigError

if TYPE_CHECKING:
    from keyhole.tools.bench.memory import Growth

PROG = "keyhole bench memory"
NOT_FLAT = 1
"""Exit code."""
UNITS = {"": 1, "k": 10**3, "m": 10**6}


class MemoryOptions(ConfigOptions):
    """Measure the peak memory of a training step over the number of patches of an image, each in a process of its own.

    Patches are made from their index and come through the reader as from files. Exit code 0 where memory is flat, 1
    where it grows with the patches by more than their logits and what two runs differ by.
    """

    EXAMPLES: ClassVar = (
        "keyhole bench memory --patches 1k,10k,100k,1M --memory 1GB",
        "keyhole bench memory camelyon16 --patches 10k,50k --json",
    )
    ESSENTIAL: ClassVar = (
        *("recipe", "config", "memory", "patches", "json", "patch.size", "model.encoder", "select.m", "select.chunk"),
        *("train.batch", "train.precision", "run.device", "run.compile", "print-config"),
    )
    IDLE: ClassVar = (
        *("out", "unreadable", "data.", "augment.", "patch.stride", "patch.level", "patch.mpp", "patch.foreground"),
        *("patch.min-foreground", "patch.edge", "model.weights", "model.pretrained", "train.epochs", "train.lr"),
        *("train.encoder-lr", "train.weight-decay", "train.warmup", "train.final-lr", "train.explore", "train.clip"),
        *("train.balance", "train.metric", "train.patience", "run.log", "run.save-minutes"),
    )

    source: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = None
    """Recipe, or YAML file with settings; default is a small one that takes seconds for 100,000 patches."""
    patches: str = "1k,10k,100k"
    """Numbers of patches of the largest image of a batch, such as 1k,2.5k,1M; two at least."""
    json_: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object."""


def run(argv: list[str]) -> int:
    options, config = _settings(argv)
    numbers = parse_patches(options.patches)
    if options.print_config:
        return print_config(config)

    from keyhole.tools.bench.memory import growths, measure_apart

    kept, others, peaks = config.select.m, config.train.batch - 1, []
    for n in numbers:
        print(f"measuring {n:,} patches", file=sys.stderr, flush=True)
        # one image of n patches; the others have what is learned from, so that the gradient step is of its full size
        peaks.append(measure_apart(config, [n, *[min(n, kept)] * others]))
    return report(growths(peaks, kept), options.json_)


def report(found: Sequence[Growth], as_json: bool) -> int:
    """Prints what was found; returns the exit code."""
    from keyhole.tools.bench.memory import lines, to_json

    print(json.dumps(to_json(found), indent=2) if as_json else "\n".join(lines(found)))
    return 0 if all(each.flat for each in found) else NOT_FLAT


def parse_patches(text: str) -> list[int]:
    """Different numbers, the smallest first, from `1k,2.5k,1M`.

    Raises:
        ConfigError: not such numbers, or fewer than two.
    """
    numbers = set()
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)([km]?)\s*", word, re.IGNORECASE)
        number = float(match[1]) * UNITS[match[2].lower()] if match else 0.0
        if number < 1 or number != int(number):
            raise ConfigError(
                f"--patches: {word.strip() or text!r} is no number of patches; expected such as 1k,10k,1M"
            )
        numbers.add(int(number))
    if len(numbers) < 2:
        raise ConfigError(f"--patches {text}: expected two different numbers or more, such as 1k,10k,100k")
    return sorted(numbers)


def _settings(argv: Sequence[str]) -> tuple[MemoryOptions, Config]:
    from keyhole.config.file import given_values

    given = parse(MemoryOptions, argv, PROG)
    recipe, file = source_of(
        given.get("source"), given.get("recipe"), given.get("config"), "a recipe or a settings file"
    )
    device = given.get("settings", {}).get("run", {}).get("device", "auto")
    plain = recipe is None and file is None
    base = _plain(device).model_dump() if plain else given_values(recipe, file)
    options = read(MemoryOptions, argv, PROG, base)
    if options.settings.out is not None:
        raise ConfigError("--out: a measurement leaves no run folder; leave it out")
    return options, _of_features(recipe, options.settings)


def _plain(device: str) -> Config:
    from keyhole.engine.device import choose_device
    from keyhole.tools.bench.memory import plain_config

    return plain_config(choose_device(device).type == "cuda")


def _of_features(recipe: str | None, config: Config) -> Config:
    """With the width of the features that a recipe for stored features is meant for, where none is given."""
    from keyhole.tools.bench.images import kind_of

    kind = kind_of(recipe, config)
    width = config.model.feature_width or (kind.size.width if kind.what == "features" else None)
    return config.replace(model={"feature_width": width})
