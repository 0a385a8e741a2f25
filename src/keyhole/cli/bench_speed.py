"""`keyhole bench speed`: how fast a model learns from data on this machine, and where the time goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from keyhole.cli.options import ConfigOptions, parse, print_config, read
from keyhole.config.file import given_values, recipes
from keyhole.config.settings import Positive, PositiveFloat
from keyhole.errors import ConfigError
from keyhole.util.progress import say
from keyhole.util.wording import nearest

if TYPE_CHECKING:
    from keyhole.runs.run import Run

PROG = "keyhole bench speed"


class SpeedOptions(ConfigOptions):
    """Measure training steps beside the encoder alone, and say where the time goes.

    Takes the settings of `keyhole train`. Steps are made in a folder that is removed again; nothing of yours changes.
    """

    EXAMPLES: ClassVar = (
        "keyhole bench speed runs/one",
        "keyhole bench speed traffic --data signs.csv --run.threads 4",
    )
    POSITIONAL: ClassVar = {"source": "RUN-OR-RECIPE"}
    ESSENTIAL: ClassVar = (
        *("recipe", "config", "memory", "steps", "seconds", "json", "data.path", "patch.size", "model.encoder"),
        *("select.m", "train.batch", "train.precision", "run.device", "run.compile", "run.threads", "print-config"),
    )
    IDLE: ClassVar = (
        *("out", "data.val", "data.test", "data.hash-gb", "train.explore", "train.metric", "train.patience"),
        *("model.weights", "model.start", "model.pretrained", "run.log", "run.save-minutes"),
    )

    source: Path | None = None
    """Run folder of `keyhole train`, name of a recipe, or YAML file with settings. Of a run the weights and the images
    are used; else images are written for the measurement, unless --data PATH (the same as --data.path) names some."""
    steps: Positive = 10
    """Steps to measure, after the first one."""
    seconds: PositiveFloat = 60.0
    """Seconds after which no further step starts; at least one is measured."""
    json_: bool = False
    """Print one JSON object."""


def run(argv: list[str]) -> int:
    options, run, recipe = _settings(list(_short_data(argv)))
    if options.print_config:
        return print_config(options.settings)

    from keyhole.tools.bench.speed import speed

    found = speed(options.settings, run, recipe, options.steps, options.seconds, say)
    print(json.dumps(found.to_json(), indent=2) if options.json_ else "\n".join(found.lines()))
    return 0


def _short_data(argv: Sequence[str]) -> Iterator[str]:
    """`--data PATH` as `--data.path PATH`: here it is the only setting of the data that most need."""
    words = iter(argv)
    for word in words:
        if word == "--":
            yield word
            yield from words
        yield word.replace("--data", "--data.path", 1) if word == "--data" or word.startswith("--data=") else word


def _settings(argv: Sequence[str]) -> tuple[SpeedOptions, Run | None, str | None]:
    """Return the options, the run where one is named, and the recipe where one is."""
    given, run = parse(SpeedOptions, argv, PROG), None
    named, recipe, file = given.get("source"), given.get("recipe"), given.get("config")
    known = recipes()
    if named is not None and (named / "config.yaml").is_file():
        if recipe is not None or file is not None:
            raise ConfigError(f"{named} is a run, whose settings are used: leave out --recipe and --config")
        from keyhole.runs.run import find_run

        run = find_run(named)
        # its manifest says where its data are
        nowhere = {"path": None, "root": None, "features": None, "masks": None}
        base = run.config.replace(out=None, data=nowhere).model_dump()
    else:
        if named is not None and str(named) in known:
            if recipe is not None:
                raise ConfigError(f"two recipes are given, {named} and --recipe {recipe}: leave one out")
            recipe = str(named)
        elif named is not None and not named.is_file():
            raise ConfigError(
                f"{named}: expected a run folder, a settings file or a recipe, found nothing of that name"
                f"{nearest(str(named), known)}; recipes: {', '.join(known)}"
            )
        elif named is not None:
            if file is not None:
                raise ConfigError(f"two settings files are given, {named} and --config {file}: leave one out")
            file = named
        if recipe is None and file is None:
            raise ConfigError(f"nothing to measure given: {PROG} RUN, or a recipe: {', '.join(known)}")
        base = given_values(recipe, file)
    options = read(SpeedOptions, argv, PROG, base)
    if options.settings.out is not None:
        raise ConfigError("--out: a measurement leaves no run folder; leave it out")
    return options, run, recipe
