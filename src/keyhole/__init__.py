"""keyhole: train, evaluate and serve image classifiers on images of any size, inside a memory budget.

Names are imported when first used, so that `keyhole --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keyhole.config import Config as Config
    from keyhole.data.check import check as check
    from keyhole.embedding import embed as embed
    from keyhole.evaluation import evaluate as evaluate
    from keyhole.grid import PatchGrid as PatchGrid
    from keyhole.images import open_image as open_image
    from keyhole.predict import Predictor as Predictor
    from keyhole.predict import load as load
    from keyhole.prediction import Prediction as Prediction
    from keyhole.training.loop import resume as resume
    from keyhole.training.loop import train as train
    from keyhole.training.run import Run as Run

__version__ = "0.1.0"

# No module directly in keyhole may have the name of a function here: importing it would hide the function.
_HOME = {
    "Config": "keyhole.config",
    "PatchGrid": "keyhole.grid",
    "Prediction": "keyhole.prediction",
    "Predictor": "keyhole.predict",
    "Run": "keyhole.training.run",
    "check": "keyhole.data.check",
    "embed": "keyhole.embedding",
    "evaluate": "keyhole.evaluation",
    "load": "keyhole.predict",
    "open_image": "keyhole.images",
    "resume": "keyhole.training.loop",
    "train": "keyhole.training.loop",
}

__all__ = [
    "Config",
    "PatchGrid",
    "Prediction",
    "Predictor",
    "Run",
    "__version__",
    "check",
    "embed",
    "evaluate",
    "load",
    "open_image",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'keyhole' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
