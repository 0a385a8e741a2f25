"""Laws of first layers over few channels: on a GPU they are computed in another order, with the same result."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import StdConv2d
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from keyhole.engine.fast import FastEncoder
from keyhole.engine.stem import SquaresConv, fits
from keyhole.nn import SmallEncoder, TimmEncoder


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 9))
def test_a_convolution_over_squares_is_that_over_pixels(c: int, height: int, width: int, bias: bool, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        conv, patches = nn.Conv2d(c, 5, 7, 2, 3, bias=bias), torch.randn(3, c, height, width)
    assert fits(conv)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "weight", "bias"):
        assert getattr(SquaresConv(conv), name) is getattr(conv, name)
    torch.testing.assert_close(SquaresConv(conv)(patches), conv(patches), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Conv2d(3, 8, 7, 1, 3),
        nn.Conv2d(3, 8, 7, 2, 2),
        nn.Conv2d(3, 8, 7, 2, 3, dilation=2),
        nn.Conv2d(3, 9, 7, 2, 3, groups=3),
        nn.Conv2d(64, 8, 7, 2, 3),
        nn.Conv2d(3, 8, 7, 2, 3, padding_mode="reflect"),
        nn.Conv2d(3, 8, 7, 2, padding="valid"),
        StdConv2d(3, 8, 7, 2, 3),
        weight_norm(nn.Conv2d(3, 8, 7, 2, 3)),
    ],
)
def test_other_convolutions_stay_as_they_are(conv: nn.Conv2d) -> None:
    assert not fits(conv)


def test_a_convolution_with_a_hook_stays_as_it_is() -> None:
    conv = nn.Conv2d(3, 8, 7, 2, 3)
    conv.register_forward_hook(lambda *_: None)
    assert not fits(conv)


def test_an_encoder_whose_first_layer_changes_its_weights_is_looked_through_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("keyhole.engine.fast.SQUARES_ON", ("cpu",))
    encoder = TimmEncoder("resnetv2_50x1_bit", 3, stages=1).eval()
    patches = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder(patches.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(FastEncoder(encoder)(patches), expected, rtol=1e-3, atol=1e-4)


def test_looking_over_squares_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keyhole.engine.fast.SQUARES_ON", ("cpu",))
    encoder = TimmEncoder("resnet18", 1, stages=2).eval()
    patches = torch.randint(0, 256, (4, 50, 50, 1), dtype=torch.uint8)
    fast = FastEncoder(encoder)
    for _ in range(2):
        with torch.no_grad():
            expected = encoder(patches.permute(0, 3, 1, 2).float() / 255)
            torch.testing.assert_close(fast(patches), expected, rtol=1e-4, atol=1e-5)
            assert fast._copy is not None
            assert sum(isinstance(part, SquaresConv) for part in fast._copy.module.modules()) == 1
            next(encoder.parameters()).mul_(1.5)
        fast.refresh()


def test_encoders_without_such_a_layer_have_none() -> None:
    assert not any(map(fits, SmallEncoder(3, width=8).modules()))
