"""What float32 means on a GPU, seen through a stand-in that rounds to TF32 wherever torch's settings allow it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress

import pytest
import torch
from on_device import GPU
from torch import Tensor, nn
from torch.nn import functional as F

from keyhole.engine import Engine
from keyhole.engine.bags import Bags
from keyhole.engine.device import Arithmetic, choose_precision
from keyhole.engine.fast import FastEncoder
from keyhole.engine.memory.plan import Plan
from keyhole.nn import CrossAttentionPool, IPSClassifier, SmallEncoder, TimmEncoder
from keyhole.util.tf32 import tf32


def rounded(tensor: Tensor) -> Tensor:
    """With 10 bits of mantissa, as a GPU takes numbers in TF32."""
    bits = tensor.detach().view(torch.int32)
    return tensor + (((bits + 0x1000) & ~0x1FFF).view(torch.float32) - tensor).detach()


class Gpu:
    """A CPU that treats float32 as a GPU does.

    Attributes:
        exact, rounded: convolutions and linear layers of float32 that were computed so.
    """

    def __init__(self) -> None:
        self.exact = self.rounded = 0

    def layer(self, real: Callable[..., Tensor], allowed: Callable[[], bool]) -> Callable[..., Tensor]:
        def run(given: Tensor, weight: Tensor, *args: object) -> Tensor:
            if given.dtype != torch.float32 or not allowed():
                self.exact += 1
                return real(given, weight, *args)
            self.rounded += 1
            return real(rounded(given), rounded(weight), *args)

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(F, "conv2d", found.layer(F.conv2d, lambda: torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(F, "linear", found.layer(F.linear, lambda: torch.backends.cuda.matmul.allow_tf32))
    return found


def settings() -> tuple[object, ...]:
    newer = getattr(torch.backends.cudnn, "conv", None)
    return (
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        None if newer is None else (newer.fp32_precision, torch.backends.cuda.matmul.fp32_precision),
    )


@pytest.mark.parametrize(("name", "norms"), [("tf_efficientnet_lite0", 49), ("mobilenetv3_large_100", 46)])
def test_batch_norm_is_folded_on_a_gpu_as_on_a_cpu(gpu: Gpu, name: str, norms: int) -> None:
    before = settings()
    for use in (False, True):
        gpu.rounded = 0
        fast = FastEncoder(TimmEncoder(name).eval(), tf32=use)
        fast(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        assert (fast.folded, fast.norms) == (norms, norms)
        assert bool(gpu.rounded) == use, "the trial is exact, the rest as asked for"
    assert settings() == before


def classifier() -> IPSClassifier:
    torch.manual_seed(0)
    encoder = SmallEncoder(3, 4, stages=1)
    return IPSClassifier(encoder, CrossAttentionPool(encoder.dim, 2), {"a": nn.Linear(encoder.dim, 2)})


@pytest.mark.parametrize("fast", [False, True])
def test_float32_is_not_rounded_where_keyhole_computes(gpu: Gpu, fast: bool) -> None:
    model, patches = classifier(), torch.rand(2, 6, 3, 16, 16)
    engine = Engine(model, plan=Plan(split=4))
    before = settings()
    with engine.encoders.inference() if fast else nullcontext():
        model.select(patches, 3, 4, encode=engine.encoders.embed if fast else None)
    engine.backward(bags_of(patches), _loss)
    assert gpu.rounded == 0
    assert gpu.exact > 0
    assert settings() == before
    model.train()(patches)
    assert gpu.rounded > 0, "in a training step of their own, users have what they set in torch"


def bags_of(patches: Tensor) -> Bags:
    return Bags(None, torch.ones(2, 6) > 0, [0, 1], lambda *span: patches.flatten(0, 1)[slice(*span)])


def _loss(logits: dict[str, Tensor]) -> Tensor:
    return logits["a"].square().mean()


def test_tf32_rounds_the_encoder_and_the_gradient_step_but_not_the_scoring(gpu: Gpu) -> None:
    model, patches = classifier(), torch.rand(2, 6, 3, 16, 16)
    engine = Engine(model, arithmetic=Arithmetic(torch.float32, torch.float32, tf32=True))
    engine.encoders.fast(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    gpu.exact = gpu.rounded = 0
    with engine.encoders.inference():
        model.select(patches, 3, 4, encode=engine.encoders.embed)
    layers = sum(isinstance(part, nn.Conv2d) for part in model.encoder.modules())
    assert gpu.rounded == 3 * layers, "one go of four patches after the other"
    scoring = gpu.exact
    engine.backward(bags_of(patches), _loss)
    assert gpu.exact == scoring


@pytest.fixture
def torchs_own() -> Iterator[None]:
    before = settings()
    yield
    torch.backends.cudnn.allow_tf32 = bool(before[0])
    torch.set_float32_matmul_precision(str(before[1]))
    assert settings()[:2] == before[:2]


@pytest.mark.usefixtures("torchs_own")
@pytest.mark.parametrize("products", ["highest", "high", "medium"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_torchs_settings_are_afterwards_as_they_were(convolutions: bool, products: str) -> None:
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)
    for use in (False, True):
        with suppress(KeyError), tf32(use):
            assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == use
            raise KeyError
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (convolutions, products)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs torch 2.9")
def test_settings_of_torchs_newer_interface_are_respected_and_restored() -> None:
    places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for given in (("ieee", "none"), ("tf32", "tf32")):
            for place, value in zip(places, given, strict=True):
                place.fp32_precision = value
            for use in (False, True):
                with tf32(use):
                    assert [place.fp32_precision == "tf32" for place in places] == [use, use]
                assert [place.fp32_precision for place in places] == list(given)
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def test_tf32_is_float32_on_a_cpu() -> None:
    encoder = SmallEncoder(3)
    assert choose_precision("tf32", encoder, (64, 64, 3)) == choose_precision("float32", encoder, (64, 64, 3))


@pytest.mark.cuda(dry=False)
def test_a_gpu_folds_batch_norm_and_computes_float32_as_a_cpu_does() -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder("tf_efficientnet_lite0").eval()
    patches = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    expected = FastEncoder(encoder)(patches)
    before = settings()
    errors = {}
    for use in (False, True):
        fast = FastEncoder(encoder.to(GPU), tf32=use)
        found = fast(patches.to(GPU)).cpu()
        assert (fast.folded, fast.norms) == (49, 49)
        errors[use] = ((found - expected).norm() / expected.norm()).item()
    assert settings() == before
    assert errors[False] < 1e-5
    assert errors[True] > 10 * errors[False], "TF32 rounds, and only where it is asked for"
