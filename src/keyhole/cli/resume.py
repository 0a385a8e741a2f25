"""`keyhole resume`: go on with a run that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from keyhole.cli.options import Options, print_config, read
from keyhole.config.base import Settings
from keyhole.config.settings import Positive


class ResumeTrain(Settings):
    """What may change about the learning."""

    epochs: Positive | None = None
    """Epochs that the run has in all from now on; default as before. More make a finished run learn on: the rate then
    follows the schedule of that number of epochs."""


class ResumeOptions(Options):
    """Go on with a run that was stopped, with the settings it has, or with a finished one for more epochs.

    On CPU it ends with the same weights as if it had not been stopped.
    """

    EXAMPLES: ClassVar = ("keyhole resume runs/one",)
    POSITIONAL: ClassVar = {"run": "RUN"}

    run: Path
    """Run folder of `keyhole train`."""
    train: ResumeTrain = Field(default_factory=ResumeTrain)
    root: Path | None = None
    """Folder that the images were moved to since; they are found in it by relative path, size and SHA-256."""


def run(argv: list[str]) -> int:
    options = read(ResumeOptions, argv, "keyhole resume")
    if options.print_config:
        from keyhole.config.file import load_config

        return print_config(load_config(options.run / "config.yaml"))

    from keyhole.training.loop import resume

    print("\n".join(resume(options.run, options.root, options.train.epochs).summary()))
    return 0
