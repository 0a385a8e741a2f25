"""Which arithmetic `train.precision` means, for which encoder on which processor."""

from __future__ import annotations

import pytest
import torch
from on_device import DRY, GPU
from torch import nn

from keyhole.engine import device
from keyhole.engine.device import Arithmetic, choose_device, choose_precision
from keyhole.errors import ConfigError
from keyhole.nn import SmallEncoder, TimmEncoder

EXACT = Arithmetic(torch.float32, torch.float32)
MIXED = Arithmetic(torch.bfloat16, torch.float32)
PATCH = (64, 64, 3)


@pytest.mark.parametrize(
    ("encoder", "has_bf16", "auto"),
    [
        (TimmEncoder("resnet18", stages=2), True, MIXED),
        (TimmEncoder("resnet18", stages=2), False, EXACT),
        (SmallEncoder(3), True, EXACT),  # has little to multiply: converting would cost more
        (TimmEncoder("tf_efficientnet_lite0"), True, EXACT),  # depthwise convolutions
    ],
    ids=["resnet18", "without instructions", "small", "lite0"],
)
def test_auto_looks_in_bf16_on_a_cpu_where_that_is_faster_and_a_precision_that_is_named_is_taken(
    monkeypatch: pytest.MonkeyPatch, encoder: nn.Module, has_bf16: bool, auto: Arithmetic
) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _: has_bf16)
    assert choose_precision("auto", encoder, PATCH) == auto
    assert choose_precision("float32", encoder, PATCH) == EXACT
    assert choose_precision("bf16", encoder, PATCH) == Arithmetic(torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "advice"), [("auto", "Use cpu."), ("cuda", "Use auto or cpu."), ("cuda:1", "Use auto")]
)
def test_a_gpu_that_cannot_be_used_is_said(name: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as where another process has it to itself
    with pytest.raises(ConfigError, match=f"--run.device {name}: not usable here .*{advice}"):
        choose_device(name)
    with pytest.raises(ConfigError, match=f"^--device {name}: not usable here"):
        choose_device(name, option="--device")


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["auto", str(GPU), "cpu" if DRY else "cuda:0"])
def test_a_gpu_has_the_name_that_its_tensors_give(name: str) -> None:
    assert choose_device(name) == torch.zeros(1, device=name.replace("auto", str(GPU))).device
