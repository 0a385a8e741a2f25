"""Whether weights fit a model."""

from collections.abc import Mapping

from torch import Tensor


def misfits(model: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What of `weights` does not fit the state of a model: missing, left over, of another shape; one phrase each."""
    problems = [f"{name} is missing" for name in model if name not in weights]
    problems += [f"{name} is left over" for name in weights if name not in model]
    return problems + [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(model[name].shape)}"
        for name in model
        if name in weights and weights[name].shape != model[name].shape
    ]
