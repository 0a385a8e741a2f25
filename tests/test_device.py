"""Which arithmetic `train.precision` means, for which encoder on which processor."""

from __future__ import annotations

import pytest
import torch
from on_device import DRY, GPU

from keyhole.engine import device
from keyhole.engine.device import Arithmetic, choose_device, choose_precision
from keyhole.errors import ConfigError
from keyhole.nn import SmallEncoder, TimmEncoder

EXACT = Arithmetic(torch.float32, torch.float32)
MIXED = Arithmetic(torch.bfloat16, torch.float32)
PATCH = (64, 64, 3)


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that multiplies in bf16."""
    monkeypatch.setattr(device, "has_bf16", lambda _: True)


@pytest.mark.usefixtures("instructions")
def test_auto_looks_in_bf16_and_learns_in_float32_on_a_cpu_where_there_is_much_to_multiply() -> None:
    assert choose_precision("auto", TimmEncoder("resnet18", stages=2), PATCH) == MIXED
    assert choose_precision("auto", SmallEncoder(3), PATCH) == EXACT  # converting would cost more


@pytest.mark.usefixtures("instructions")
def test_auto_looks_at_networks_of_depthwise_convolutions_in_float32_on_a_cpu() -> None:
    encoder = TimmEncoder("tf_efficientnet_lite0")
    assert choose_precision("auto", encoder, PATCH) == EXACT
    assert choose_precision("bf16", encoder, PATCH) == Arithmetic(torch.bfloat16, torch.bfloat16)


def test_without_instructions_for_bf16_auto_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    encoder = TimmEncoder("resnet18", stages=2)
    assert choose_precision("auto", encoder, PATCH) == EXACT
    assert choose_precision("bf16", encoder, PATCH) == Arithmetic(torch.bfloat16, torch.bfloat16)


@pytest.mark.usefixtures("instructions")
def test_what_is_asked_for_is_taken() -> None:
    assert choose_precision("float32", TimmEncoder("resnet18", stages=2), PATCH) == EXACT


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
