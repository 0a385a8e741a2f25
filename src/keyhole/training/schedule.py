"""The learning rate of a step."""

from __future__ import annotations

import math

from keyhole.config.auto import number
from keyhole.config.settings import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, then a cosine down to `final_lr` times the peak."""
    peak = number(config.train.lr, "train.lr")
    total, warmup = config.train.epochs * steps_per_epoch, config.train.warmup * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1.0, total - warmup))
    low = config.train.final_lr
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
