"""Laws of the trial that estimates the time of a run."""

import numpy as np
import pytest
import torch
from torch import nn

from keyhole.engine import Engine
from keyhole.engine.compiled import Compiled
from keyhole.nn import CrossAttentionPool, IPSClassifier, SmallEncoder
from keyhole.training.trial import _model_seconds


def test_a_compiled_encoder_is_tried_with_the_number_of_patches_that_the_run_learns_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is compiled for two numbers only: others would leave the run uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(Compiled, "_warn", lambda _: None)
    encoder = SmallEncoder(3, width=4)
    engine = Engine(IPSClassifier(encoder, CrossAttentionPool(encoder.dim, 2), {"label": nn.Linear(encoder.dim, 2)}))
    engine.encoders.compile()
    _model_seconds(engine, np.zeros((8, 16, 16, 3), np.uint8), None, 48, color=False)
    learning = engine.encoders._learning
    assert learning is not None
    assert list(learning._by_rows) == [48]
