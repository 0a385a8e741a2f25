"""Modules: encoder, attention pool, selection, classifier. Knows nothing of files."""

from keyhole.nn.attention import CrossAttentionPool
from keyhole.nn.build import build_classifier
from keyhole.nn.classifier import IPSClassifier
from keyhole.nn.encoder import FeatureProjector, PixelEncoder, SmallEncoder, TimmEncoder
from keyhole.nn.loss import guessing_loss, task_loss, total_loss
from keyhole.nn.position import CenterPosition, IndexPosition, PositionCode
from keyhole.nn.reference import from_reference, reference_tasks
from keyhole.nn.selection import GlobalRule, Kept, Selection, SelectionRule, Selector, evaluating, explore
from keyhole.nn.streaming import StreamingRule

__all__ = [
    "CenterPosition",
    "CrossAttentionPool",
    "FeatureProjector",
    "GlobalRule",
    "IPSClassifier",
    "IndexPosition",
    "Kept",
    "PixelEncoder",
    "PositionCode",
    "Selection",
    "SelectionRule",
    "Selector",
    "SmallEncoder",
    "StreamingRule",
    "TimmEncoder",
    "build_classifier",
    "evaluating",
    "explore",
    "from_reference",
    "guessing_loss",
    "reference_tasks",
    "task_loss",
    "total_loss",
]
