"""Modules: encoder, attention pool, selection, classifier. Knows nothing of files."""

from keyhole.nn.attention import CrossAttentionPool
from keyhole.nn.build import build_classifier
from keyhole.nn.classifier import IPSClassifier
from keyhole.nn.encoder import FeatureProjector, PixelEncoder, SmallEncoder, TimmEncoder
from keyhole.nn.fast import FastEncoder
from keyhole.nn.loss import task_loss, total_loss
from keyhole.nn.position import CenterPosition, IndexPosition
from keyhole.nn.reference import from_reference, reference_tasks
from keyhole.nn.selection import GlobalRule, Kept, Selection, Selector, evaluating, explore
from keyhole.nn.split import parts, split_backward
from keyhole.nn.streaming import StreamingRule

__all__ = [
    "CenterPosition",
    "CrossAttentionPool",
    "FastEncoder",
    "FeatureProjector",
    "GlobalRule",
    "IPSClassifier",
    "IndexPosition",
    "Kept",
    "PixelEncoder",
    "Selection",
    "Selector",
    "SmallEncoder",
    "StreamingRule",
    "TimmEncoder",
    "build_classifier",
    "evaluating",
    "explore",
    "from_reference",
    "parts",
    "reference_tasks",
    "split_backward",
    "task_loss",
    "total_loss",
]
