"""Stored features in the place of pixels: files as CLAM, TRIDENT and `keyhole embed` write them."""

from keyhole.features.origin import Origin as Origin
from keyhole.features.source import FeatureOpener as FeatureOpener
from keyhole.features.source import FeaturePatches as FeaturePatches
from keyhole.features.source import check_features_config as check_features_config
from keyhole.features.source import common_origin as common_origin
from keyhole.features.source import feature_width as feature_width
from keyhole.features.source import learned_origin as learned_origin
