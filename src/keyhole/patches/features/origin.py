"""The encoder, its weights and the patches that stored features come from, as far as a file states them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keyhole.patches.features.grid import number

SETTINGS = "keyhole_settings"
"""Attribute of the dataset `features` in which `keyhole embed` writes its settings, as JSON."""
NAMES = ("encoder", "extractor", "weights_sha256", SETTINGS, "patch_size", "target_magnification")
"""Attributes that state the origin, under the names of keyhole, TRIDENT and STAMP."""
STAMP = ("stamp_version", "tile_size_um", "tile_size_px", "tile_size", "unit")
"""Attributes that STAMP writes on the file."""


@dataclass(frozen=True)
class Origin:
    """What a file states, or what a model learned from: the encoder, SHA-256 of its weights, the patches in words."""

    encoder: str | None = None
    weights: str | None = None
    patches: str | None = None

    @property
    def known(self) -> bool:
        return self.encoder is not None or self.weights is not None

    def describe(self) -> str:
        name = self.encoder or "an encoder"
        return name if self.weights is None else f"{name} with weights {self.weights[:8]}"

    def excludes(self, other: Origin) -> bool:
        """Whether features of the two cannot be compared: they are of other weights, or of another encoder."""
        if self.weights is not None and other.weights is not None:
            return self.weights != other.weights
        return self.encoder is not None and other.encoder is not None and self.encoder != other.encoder

    def doubt(self, learned: Origin) -> str:
        """Why answers on such features are doubtful for a model that learned from `learned`, or ""."""
        if not self.known:
            known = f"; the others, or the model, are of {learned.describe()}" if learned.known else ""
            return f"features do not say which encoder made them{known}. Make sure that it is one for all of them"
        if not learned.known:
            return f"features are of {self.describe()}; those that the model learned from did not say their encoder"
        if self.patches is not None and learned.patches is not None and self.patches != learned.patches:
            return f"features are of patches of {self.patches}; the others, or the model, are of {learned.patches}"
        return ""


UNKNOWN = Origin()


def origin_of(attributes: Mapping[str, Any]) -> Origin:
    """The origin that the attributes NAMES and STAMP of a file state; values of other types are ignored."""
    encoder = _text(attributes.get("encoder")) or _text(attributes.get("extractor"))
    return Origin(encoder, _text(attributes.get("weights_sha256")), _patches(attributes))


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str) and value else None


def _patches(attributes: Mapping[str, Any]) -> str | None:
    text = _text(attributes.get(SETTINGS))
    if text is not None:
        try:
            return _of_keyhole(json.loads(text))
        except (ValueError, AttributeError):
            return None
    pixels, microns = number(attributes, "tile_size_px"), number(attributes, "tile_size_um")
    if microns is not None:
        return f"{microns:g} microns" if pixels is None else f"{pixels:g} px, {microns:g} microns"
    size, power = number(attributes, "patch_size"), number(attributes, "target_magnification")
    return None if size is None or power is None else f"{size:g} px at {power:g}x"


def _of_keyhole(settings: Mapping[str, Any]) -> str | None:
    """The settings with which `keyhole embed` cut the patches, in words."""
    size, stride = settings.get("patch.size"), settings.get("patch.stride")
    if size is None:
        return None
    words = [f"{size} px"]
    if stride is not None and stride != size:
        words.append(f"stride {stride}")
    if settings.get("patch.mpp") is not None:
        words.append(f"{settings['patch.mpp']:g} microns per pixel")
    else:
        words.append(f"level {settings.get('patch.level') or 0}")
    if settings.get("patch.foreground") not in (None, "all"):
        words.append(f"foreground {settings['patch.foreground']}")
    if settings.get("patch.edge") not in (None, "background"):  # before it could be chosen, it was the background
        words.append(f"edge {settings['patch.edge']}")
    return ", ".join(words)
