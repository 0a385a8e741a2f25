"""Replace settings given as `auto` by numbers that depend on the encoder, when a run is created."""

from __future__ import annotations

from keyhole.config.settings import Auto, Config
from keyhole.errors import ConfigError

SCRATCH_LR, PRETRAINED_LR = 1e-3, 3e-4
"""Peak learning rates of encoders that start from random weights, and of all others."""
SCRATCH_AVERAGE = 0.99
"""Decay of the mean of weights that were random at the start, and still change much."""


def _automatic(config: Config, features: bool) -> tuple[dict[str, float], str]:
    """Return the numbers for what is `auto`, and the reason. Random weights give random scores."""
    model, train = config.model, config.train
    if features or model.learned_before:
        start = f"the encoder starts from {'pretrained' if model.imagenet else 'given'} weights"
        found, why = (
            {"lr": PRETRAINED_LR, "explore": 0.0, "average": 0.0},
            "the data are stored features" if features else start,
        )
    else:
        found = {"lr": SCRATCH_LR, "explore": round(train.epochs / 2, 1), "average": SCRATCH_AVERAGE}
        why = "the encoder starts from random weights"
    return {name: value for name, value in found.items() if getattr(train, name) == "auto"}, why


def settle_learning(config: Config, features: bool) -> tuple[Config, list[str]]:
    """Return the configuration with numbers for what is `auto` in `train`, and lines for the log."""
    changes, why = _automatic(config, features)
    lines = [f"{', '.join(f'{name} {value:g}' for name, value in changes.items())}: {why}"] if changes else []
    config = config.replace(train=changes)
    train, model = config.train, config.model
    if model.width is not None and model.encoder != "small" and not features:
        lines.append(
            f"warning: model.width (={model.width}) has no effect: it is for --model.encoder small, not {model.encoder}"
        )
    if number(train.explore, "train.explore") >= train.epochs:
        lines.append(
            f"warning: train.explore (={train.explore:g}) is not over within train.epochs (={train.epochs}): some "
            "patches are kept at random until the end. Lower it, or leave it at auto."
        )
    return config, lines


def auto_reasons(config: Config) -> dict[str, str]:
    """Return the value and the reason of each `auto` in a configuration for images, by the setting's name."""
    changes, why = _automatic(config, features=False)
    of = {"explore": f" of {config.train.epochs} epochs"}
    return {f"train.{name}": f"{value:g}{of.get(name, '')}, since {why}" for name, value in changes.items()}


def number(value: float | Auto, name: str) -> float:
    """Return a setting as a number; ConfigError if it is still `auto`."""
    if isinstance(value, str):
        raise ConfigError(f"{name} is still auto here: give a number, or settle it with keyhole.config.auto")
    return value
