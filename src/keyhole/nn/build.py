"""Settings of a model -> IPSClassifier."""

from collections.abc import Sequence

import torch
from torch import nn

from keyhole.config.settings import PACKAGED, ModelConfig
from keyhole.errors import ConfigError
from keyhole.nn.attention import CrossAttentionPool
from keyhole.nn.classifier import IPSClassifier
from keyhole.nn.encoder import FeatureProjector, PixelEncoder, SmallEncoder, TimmEncoder
from keyhole.nn.packaged import Lite0Encoder, lite0_weights
from keyhole.nn.position import POSITIONS
from keyhole.nn.weights import check_pretrained
from keyhole.tasks.kinds import Task


def build_classifier(
    model: ModelConfig,
    tasks: Sequence[Task],
    patch_size: int,
    pretrained: bool = True,
) -> IPSClassifier:
    """Build the classifier of a configuration, with fresh weights.

    Args:
        model: encoder, pool and position code; with `feature_width` the encoder is a projector of stored features.
        tasks: each gets one query and one linear head.
        patch_size: side of a patch in pixels; the unit of the 2-D position code.
        pretrained: load the ImageNet weights that the settings ask for; off when others are loaded afterwards.

    Returns:
        The classifier, in training mode.

    Raises:
        ConfigError: timm does not know the encoder, or the widths do not fit.

    Example:
        >>> from keyhole.config.settings import ModelConfig
        >>> from keyhole.tasks.kinds import Task
        >>> tasks = [Task("tumor", "binary", ("no", "yes"))]
        >>> model = build_classifier(ModelConfig(encoder="small", width=8, heads=2), tasks, patch_size=32)
        >>> model(torch.rand(2, 5, 3, 32, 32))["tumor"].shape
        torch.Size([2, 1])
    """
    try:
        encoder: nn.Module
        if model.feature_width is not None:
            encoder, dim = FeatureProjector(model.feature_width, model.dim), model.dim
        else:
            encoder, dim = projected(build_encoder(model, pretrained), model, patch_size)
        pool = CrossAttentionPool(
            dim,
            model.heads,
            len(tasks),
            hidden_dim=model.hidden,
            dropout=model.dropout,
            attention_dropout=model.attention_dropout,
        )
        position = None if model.position == "none" else POSITIONS[model.position](dim, float(patch_size))
    except ValueError as error:
        raise ConfigError(f"--model: {error}") from error
    if isinstance(encoder, PixelEncoder):
        encoder.frozen_norm = model.freezes_norm
    if model.freeze:
        encoder.requires_grad_(False)
        if isinstance(encoder, PixelEncoder) and encoder.projector is not None:
            encoder.projector.requires_grad_(True)
    return IPSClassifier(encoder, pool, {task.name: nn.Linear(dim, task.outputs) for task in tasks}, position)


def patch_shape(model: ModelConfig, patch_size: int) -> tuple[int, ...]:
    """Return the shape of one patch as it is read: (s, s, c), or (f,) of stored features."""
    return (patch_size, patch_size, model.channels) if model.feature_width is None else (model.feature_width,)


def projected(
    encoder: SmallEncoder | TimmEncoder, model: ModelConfig, patch_size: int
) -> tuple[SmallEncoder | TimmEncoder, int]:
    """Give an encoder its projector, if the settings ask for one; also return the width of the embeddings."""
    width = embedding_width(encoder, model, patch_size)
    if not model.projects:
        return encoder, width
    encoder.projector, encoder.dim = FeatureProjector(width, model.dim), model.dim
    return encoder, model.dim


def embedding_width(encoder: nn.Module, model: ModelConfig, patch_size: int) -> int:
    """Measure the width of the embeddings with patches of zeros: a model's attributes are not always right."""
    encoder.eval()
    try:
        with torch.no_grad():
            embedding = encoder(torch.zeros(2, model.channels, patch_size, patch_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--model.encoder {model.encoder}: does not take patches of {patch_size} px ({first}). "
            "Choose the patch.size it was made for, or another encoder."
        ) from error
    finally:
        encoder.train()
    if embedding.ndim != 2 or len(embedding) != 2:
        raise ConfigError(
            f"--model.encoder {model.encoder}: gives {tuple(embedding.shape)} for 2 patches, expected a vector for each"
        )
    return int(embedding.shape[1])


def check_imagenet(model: ModelConfig) -> None:
    """Raise ConfigError unless the ImageNet weights that the settings ask for, if any, are within reach.

    A model of stored features needs none.
    """
    if model.feature_width is not None:
        return
    if model.imagenet and model.encoder in PACKAGED:
        lite0_weights()
    elif model.imagenet:
        check_pretrained(model.encoder)


def build_encoder(model: ModelConfig, pretrained: bool = True) -> SmallEncoder | TimmEncoder:
    """Build the encoder `small` or `lite0` of this package, or timm's of any other name."""
    pretrained = pretrained and model.imagenet
    if model.encoder == "small":
        return SmallEncoder(model.channels, model.width or 32, stages=model.stages or 2)
    if model.encoder == "lite0":
        return Lite0Encoder(model.channels, pretrained, model.stages)
    return TimmEncoder(model.encoder, model.channels, pretrained, model.stages)
