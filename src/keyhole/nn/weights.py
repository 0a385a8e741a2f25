"""Whether weights fit a model, and which of them are an encoder's."""

from collections.abc import Mapping

from torch import Tensor, nn

PREFIXES = ("", "encoder.", "model.encoder.", "module.", "model.", "backbone.")
"""What the names of an encoder's weights start with in files: alone, in a keyhole model, in a saved state, and in
files of other programs."""


def misfits(model: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What of `weights` does not fit the state of a model: missing, left over, of another shape; one phrase each."""
    problems = [f"{name} is missing" for name in model if name not in weights]
    problems += [f"{name} is left over" for name in weights if name not in model]
    return problems + [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(model[name].shape)}"
        for name in model
        if name in weights and weights[name].shape != model[name].shape
    ]


def encoder_part(encoder: nn.Module, weights: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Those of `weights` that are the encoder's, under its names.

    Args:
        encoder: may have a network `body` inside, under whose names weights are taken as well.
        weights: of a file, with whatever else is in it.

    Returns:
        The module that the names are of, which is the encoder or its body, and its weights. Where it takes grey patches
        and the weights are of colour, the first convolution gets their sum over the colours, as timm does it.
    """
    body = getattr(encoder, "body", None)
    best: tuple[nn.Module, dict[str, Tensor]] = (encoder, {})
    for part in (encoder, body):
        if not isinstance(part, nn.Module):
            continue
        state = part.state_dict()
        for prefix in PREFIXES:
            found = {name: weights[prefix + name] for name in state if prefix + name in weights}
            if len(found) > len(best[1]):
                best = part, found
    part, found = best
    own = part.state_dict()
    return part, {name: _in_grey(weight, own[name]) for name, weight in found.items()}


def _in_grey(weight: Tensor, own: Tensor) -> Tensor:
    """Weights of a convolution over three colours for one that sees grey; all others as they are."""
    grey = weight.ndim == 4 and weight.shape[1] == 3 and own.shape == (weight.shape[0], 1, *weight.shape[2:])
    return weight.sum(dim=1, keepdim=True) if grey else weight
