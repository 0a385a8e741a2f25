"""`keyhole train`: learn from a folder of classes or a CSV, into a new run folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from keyhole.cli.arguments import ConfigOptions, config_with_data, parse_config, print_config


@dataclass(frozen=True)
class TrainOptions(ConfigOptions):
    """Learn from images, and write the model, its metrics and its predictions into a run folder.

    Settings: default < --recipe < --config < flags. The result is in the run folder as config.yaml.
    """

    EXAMPLES: ClassVar = (
        "keyhole train photos --patch.size 100 --select.m 10 --out runs/photos",
        "keyhole train slides.csv --patch.mpp 0.5 --patch.foreground tissue --memory 5GB --out runs/slides",
    )
    ESSENTIAL: ClassVar = (
        *("out", "recipe", "config", "memory", "data.tasks", "patch.size", "patch.mpp", "patch.foreground"),
        *("model.encoder", "model.pretrained", "select.m", "train.epochs", "train.lr", "print-config"),
    )


def run(argv: list[str]) -> int:
    options, config = parse_config(TrainOptions, argv, "keyhole train")
    config_with_data(options, config, "train")
    if options.print_config:
        return print_config(config)

    from keyhole.training.loop import train_config

    done = train_config(config)
    print("\n".join(done.summary()))
    return 0
