"""keyhole: train, evaluate and serve image classifiers on images of any size, inside a memory budget.

Names are imported when first used, so that `keyhole --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keyhole.util.version import VERSION

if TYPE_CHECKING:
    from keyhole.config.settings import Config as Config
    from keyhole.images import open_image as open_image
    from keyhole.inference.compare import compare as compare
    from keyhole.inference.embed import embed as embed
    from keyhole.inference.evaluate import evaluate as evaluate
    from keyhole.inference.predictor import Predictor as Predictor
    from keyhole.inference.predictor import load as load
    from keyhole.patches.grid import PatchGrid as PatchGrid
    from keyhole.report.prediction import Prediction as Prediction
    from keyhole.runs.run import Run as Run
    from keyhole.tools.check.run import check as check
    from keyhole.training.loop import resume as resume
    from keyhole.training.loop import train as train

__version__ = VERSION

# No module directly in keyhole may have the name of a function here: importing it would hide the function.
_HOME = {
    "Config": "keyhole.config.settings",
    "PatchGrid": "keyhole.patches.grid",
    "Prediction": "keyhole.report.prediction",
    "Predictor": "keyhole.inference.predictor",
    "Run": "keyhole.runs.run",
    "check": "keyhole.tools.check.run",
    "compare": "keyhole.inference.compare",
    "embed": "keyhole.inference.embed",
    "evaluate": "keyhole.inference.evaluate",
    "load": "keyhole.inference.predictor",
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
    "compare",
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
