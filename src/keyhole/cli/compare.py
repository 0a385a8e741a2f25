"""`keyhole compare`: runs side by side."""

from __future__ import annotations

from typing import ClassVar

from keyhole.cli.options import Options, print_options, read
from keyhole.config.inference import CompareSettings


class CompareOptions(Options, CompareSettings):
    """Metrics of several runs on the same images, their differences with 95 % intervals (paired bootstrap), the images
    with another prediction, and the settings that differ.

    Nothing is predicted: the runs must have been evaluated. Of run folders the test split is compared; folders of
    evaluations may be of any data.
    """

    EXAMPLES: ClassVar = (
        "keyhole compare runs/one runs/two",
        "keyhole compare runs/one/evaluation/clinic runs/two/evaluation/clinic --out report",
    )
    POSITIONAL: ClassVar = {"runs": "RUNS"}


def run(argv: list[str]) -> int:
    options = read(CompareOptions, argv, "keyhole compare")
    if options.print_config:
        return print_options(options)

    from keyhole.inference.compare import compare

    print(compare(options.runs, options.split, options.out))
    return 0
