"""The learning rate of a step."""

from __future__ import annotations

import math

from keyhole.config.auto import number
from keyhole.config.settings import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, then a cosine down to `final_lr` times the peak.

    As published: with s = step + 1, W steps of warm-up and S in all, peak * s / W while s < W, then the cosine of
    (s - W) / (S - W), so that the last step has the lowest rate.
    """
    peak, low = number(config.train.lr, "train.lr"), config.train.final_lr
    total, warmup = config.train.epochs * steps_per_epoch, config.train.warmup * steps_per_epoch
    if step + 1 < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step + 1 - warmup) / max(1.0, total - warmup))
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
