"""`keyhole train`: learn from a folder of classes or a CSV, into a new run folder."""

from __future__ import annotations

from dataclasses import dataclass

from keyhole.cli.arguments import ConfigOptions, config_with_data, parse_config, print_config


@dataclass(frozen=True)
class TrainOptions(ConfigOptions):
    """Learn from images, and write the model, its metrics and its predictions into a run folder.

    Settings: default < --recipe < --config < flags. The result is in the run folder as config.yaml.
    """


def run(argv: list[str]) -> int:
    options, config = parse_config(TrainOptions, argv, "keyhole train")
    config_with_data(options, config, "train")
    if options.print_config:
        return print_config(config)

    from keyhole.training.loop import train_config

    done = train_config(config)
    print("\n".join(done.summary()))
    return 0
