"""Model, memory plan and data in one object: both passes of Iterative Patch Selection."""

from keyhole.engine.engine import Engine, Inference
from keyhole.engine.split import parts, split_backward

__all__ = ["Engine", "Inference", "parts", "split_backward"]
