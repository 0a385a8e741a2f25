"""`keyhole evaluate`: metrics of a run with their intervals."""

from __future__ import annotations

import sys
from typing import ClassVar

from keyhole.cli.options import Options, print_options, read
from keyhole.config.inference import EvaluateSettings
from keyhole.errors import DataError


class EvaluateOptions(Options, EvaluateSettings):
    """Metrics of a run's best model with 95 % intervals, and one CSV row per image.

    Where the data have a column `annotation` (GeoJSON of QuPath, XML of ASAP, a PNG mask), also how much of the
    attention lies in what it marks.
    """

    EXAMPLES: ClassVar = ("keyhole evaluate runs/one", "keyhole evaluate runs/one --data other.csv --out elsewhere")
    POSITIONAL: ClassVar = {"run": "RUN"}


def run(argv: list[str]) -> int:
    options = read(EvaluateOptions, argv, "keyhole evaluate")
    if options.print_config:
        return print_options(options)

    from keyhole.inference.evaluate import evaluate
    from keyhole.runs.run import unfinished

    if said := unfinished(options.run):
        print(said, file=sys.stderr)
    try:
        evaluation = evaluate(**{name: value for name, value in options if name != "print_config"})
    except DataError as error:  # which names the options of `keyhole train`
        message = str(error).replace("--data.path PATH", "--data PATH").replace("--data.", "--")
        raise DataError(message) from error
    print(evaluation)
    return 0
