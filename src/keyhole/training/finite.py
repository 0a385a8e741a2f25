"""An optimizer step that is skipped if the loss or the gradient is not finite; the host waits for the device once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def step_if_finite(optimizer: torch.optim.Optimizer, figures: Tensor) -> list[float]:
    """Take the step of a fused optimizer if all figures (loss, norm of the gradient) are finite; return the figures.

    The optimizer checks them on the device and skips the step there, as in mixed precision, so that the host waits
    once, after the step.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            _lay_out_gradient(weight)
    optimizer.found_inf = (~figures.isfinite()).any().float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
    found: list[float] = figures.tolist()
    return found


def optimizer_step(
    optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], loss: Tensor, rate: float, clip: float
) -> tuple[float, float]:
    """Clip the gradient and take the optimizer's step if loss and gradient are finite; return loss and norm.

    Args:
        optimizer: each of its groups' `factor` multiplies the rate.
        weights: of the model, with their gradients.
        loss: on the device.
        rate: learning rate of the step.
        clip: largest norm of the gradient; 0 does not clip.
    """
    learned = [weight for weight in weights if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in learned if weight.grad is not None])
    if clip:
        torch.nn.utils.clip_grads_with_norm_(learned, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    value, length = step_if_finite(optimizer, torch.stack([loss, norm]))
    return value, length


def _lay_out_gradient(weight: Tensor) -> None:
    """Give a gradient the strides of its weight, also along axes of length 1: some fused kernels require it."""
    gradient = weight.grad
    if gradient is None or gradient.stride() == weight.stride():
        return
    pairs = zip(weight.shape, gradient.stride(), weight.stride(), strict=True)
    if all(size == 1 or here == there for size, here, there in pairs):
        weight.grad = gradient.as_strided(weight.shape, weight.stride())
    else:
        weight.grad = torch.empty_like(weight).copy_(gradient)
