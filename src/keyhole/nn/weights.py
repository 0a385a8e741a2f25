"""How weights fit a model, and which of them are an encoder's."""

from collections.abc import Mapping

from torch import Tensor, nn

PREFIXES = ("", "encoder.", "model.encoder.", "module.", "model.", "backbone.")
"""Beginnings of the names of an encoder's weights: alone, in a keyhole model, in a saved state, in files of other
programs."""


def misfits(model: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Return a phrase for each weight that is missing, left over or of another shape than in the state `model`."""
    problems = [f"{name} is missing" for name in model if name not in weights]
    problems += [f"{name} is left over" for name in weights if name not in model]
    return problems + [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(model[name].shape)}"
        for name in model
        if name in weights and weights[name].shape != model[name].shape
    ]


def encoder_part(encoder: nn.Module, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Find the weights of an encoder among all weights of a file.

    Args:
        encoder: may have a network `body` inside; weights under the names of the body are found as well.
        weights: of a file, by name.

    Returns:
        The encoder or its body, and those of the weights that have its names. Where the encoder takes grey patches and
        the weights are of colour, its first convolution gets their sum over the colours, as in timm.
    """
    best: tuple[nn.Module, dict[str, Tensor]] = (encoder, {})
    for part in (encoder, getattr(encoder, "body", None)):
        if isinstance(part, nn.Module):
            for prefix in PREFIXES:
                found = {name: weights[prefix + name] for name in part.state_dict() if prefix + name in weights}
                if len(found) > len(best[1]):
                    best = part, found
    part, found = best
    own = part.state_dict()
    return part, {name: _in_grey(weight, own[name]) for name, weight in found.items()}


def _in_grey(weight: Tensor, own: Tensor) -> Tensor:
    grey = weight.ndim == 4 and weight.shape[1] == 3 and own.shape == (weight.shape[0], 1, *weight.shape[2:])
    return weight.sum(dim=1, keepdim=True) if grey else weight
