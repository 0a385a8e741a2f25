"""Stored features instead of pixels: files as CLAM, TRIDENT and `keyhole embed` write them."""

from keyhole.patches.features.files import Origin as Origin
from keyhole.patches.features.files import patches_in_words as patches_in_words
from keyhole.patches.features.source import FeatureOpener as FeatureOpener
from keyhole.patches.features.source import FeaturePatches as FeaturePatches
from keyhole.patches.features.source import check_features_config as check_features_config
from keyhole.patches.features.source import common_origin as common_origin
from keyhole.patches.features.source import feature_width as feature_width
from keyhole.patches.features.source import idle_patch_settings as idle_patch_settings
from keyhole.patches.features.source import learned_origin as learned_origin
