"""Settings given as `auto` that follow from the encoder: settled once, when a run is created.

The numbers are written into the run's config.yaml, so that a resumed run, or another run with the same file, does not
depend on these rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keyhole.config.settings import Auto, Config, ModelConfig
from keyhole.errors import ConfigError

SCRATCH_LR, PRETRAINED_LR = 1e-3, 3e-4
"""Peak rates: of encoders that start from random weights, and of all others."""


@dataclass(frozen=True)
class Rates:
    """How a model learns where the settings say `auto`.

    Attributes:
        lr: peak rate.
        explore: epochs of exploring.
        why: what they follow from, as a clause.
    """

    lr: float
    explore: float
    why: str


def rates_of(model: ModelConfig, epochs: int, features: bool) -> Rates:
    """The rate and the exploring that suit an encoder.

    Scores from random weights mean nothing, so half of the epochs explore. Pretrained weights and stored features tell
    patches apart from the first step.

    Args:
        model: what learns.
        epochs: of the run.
        features: the data are stored features.
    """
    if features:
        return Rates(PRETRAINED_LR, 0.0, "the data are stored features")
    if model.pretrained or model.weights is not None:
        given = "pretrained" if model.pretrained else "given"
        return Rates(PRETRAINED_LR, 0.0, f"the encoder starts from {given} weights")
    return Rates(SCRATCH_LR, round(epochs / 2, 1), "the encoder starts from random weights")


def settle_learning(config: Config, features: bool) -> tuple[Config, list[str]]:
    """The configuration with numbers for `train.lr` and `train.explore`, and a line for the log that says which.

    Args:
        config: of the run to be.
        features: the data are stored features.
    """
    train = config.train
    found = rates_of(config.model, train.epochs, features)
    changes: dict[str, Any] = {}
    if train.lr == "auto":
        changes["lr"] = found.lr
    if train.explore == "auto":
        changes["explore"] = found.explore
    lines = []
    if changes:
        said = ", ".join(f"{name} {value:g}" for name, value in changes.items())
        lines.append(f"{said}: {found.why}")
    config = config.replace(train=changes)
    train = config.train
    if number(train.explore, "train.explore") >= train.epochs:
        lines.append(
            f"warning: train.explore (={train.explore:g}) is not over within train.epochs (={train.epochs}): some "
            "patches are kept at random until the end. Lower it, or leave it at auto."
        )
    return config, lines


def auto_reasons(config: Config) -> dict[str, str]:
    """What `auto` comes to in a configuration for images, by the setting's name; for `keyhole init`."""
    train = config.train
    found = rates_of(config.model, train.epochs, features=False)
    reasons = {}
    if train.lr == "auto":
        reasons["train.lr"] = f"{found.lr:g}, since {found.why}"
    if train.explore == "auto":
        reasons["train.explore"] = f"{found.explore:g} of {train.epochs} epochs, since {found.why}"
    return reasons


def number(value: float | Auto, name: str) -> float:
    """A setting that is settled.

    Raises:
        ConfigError: it is still `auto`.
    """
    if isinstance(value, str):
        raise ConfigError(f"{name} is still auto here: give a number, or settle it with keyhole.config.auto")
    return value
