"""`keyhole train`: learn from a folder of classes or a CSV, into a new run folder."""

from __future__ import annotations

from typing import ClassVar

from keyhole.cli.options import DataOptions, print_config, read


class TrainOptions(DataOptions):
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
    options = read(TrainOptions, argv, "keyhole train")
    if options.print_config:
        return print_config(options.settings)
    options.check_data("train")

    from keyhole.training.loop import train_config

    done = train_config(options.settings)
    print("\n".join(done.summary()))
    return 0
