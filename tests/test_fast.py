"""Laws of the fast encoder: it computes what the encoder computes, and follows its weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from keyhole.engine.device import Arithmetic
from keyhole.engine.encoders import Encoders
from keyhole.engine.fast import FOLDED_ERROR, FastEncoder
from keyhole.nn import CrossAttentionPool, FeatureProjector, IPSClassifier, SmallEncoder, TimmEncoder
from keyhole.nn.tensors import prepare
from keyhole.training.augment import color_matrix

ENCODERS = {
    "small": lambda: SmallEncoder(3, width=8),
    "resnet18": lambda: TimmEncoder("resnet18", 3, stages=2),
    "lite0": lambda: TimmEncoder("tf_efficientnet_lite0", 3),
}


def lived(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """With running statistics and affine weights as after some training, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for part in encoder.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (part.weight.data, 0.5, 1.5),
                (part.bias.data, -0.5, 0.5),
                (part.running_mean, -0.2, 0.2),
                (part.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return encoder.eval()


def pixels(k: int = 6, size: int = 48, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (k, size, size, channels), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def plain(encoder: nn.Module, patches: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = encoder(patches.permute(0, 3, 1, 2).float() / 255)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("name", "folded"), [("small", 3), ("resnet18", 10), ("lite0", 49)])
def test_it_computes_what_the_encoder_does_with_every_batch_norm_folded(name: str, folded: int) -> None:
    encoder = lived(ENCODERS[name]())
    expected = plain(encoder, pixels())
    fast = FastEncoder(encoder)
    assert error(fast(pixels()), expected) < 1e-5
    assert error(FastEncoder(encoder, torch.bfloat16)(pixels()), expected) < 0.03
    assert fast.folded == folded == sum(isinstance(part, nn.BatchNorm2d) for part in encoder.modules())


def test_the_encoder_stays_as_it_is() -> None:
    encoder = lived(ENCODERS["resnet18"]()).train()
    before = copy.deepcopy(encoder.state_dict())
    fast = FastEncoder(encoder, torch.bfloat16)
    fast(pixels())
    fast.weights_changed()
    fast.refresh()
    assert encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())


def used(fast: FastEncoder) -> tuple[list[nn.Module], list[int]]:
    """The modules that compute the embeddings, and where their weights are."""
    modules: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, _: modules.append(module))
    fast(pixels())
    handle.remove()
    return modules, [tensor.data_ptr() for module in modules for tensor in module.parameters()]


def test_refresh_follows_weights_and_statistics_without_building_anew() -> None:
    encoder = lived(ENCODERS["lite0"]())
    fast = FastEncoder(encoder)
    fast(pixels())
    built, addresses = used(fast)
    encoder.load_state_dict(lived(ENCODERS["lite0"](), seed=3).state_dict())
    assert error(fast(pixels()), plain(encoder, pixels())) > 0.05, "the old weights, until it is told"
    fast.refresh()
    assert error(fast(pixels()), plain(encoder, pixels())) < 1e-5
    assert used(fast) == (built, addresses)


class Operations(TorchDispatchMode):
    """Notes the operations inside, but for views, with their first two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("view", "split", "split_with_sizes", "detach", "t", "_unsafe_view", "alias"):
            self.seen.append((name, args[:2]))
        return func(*args, **(kwargs or {}))


def refreshing(encoder: nn.Module, patches: Tensor, precision: torch.dtype = torch.bfloat16) -> Operations:
    fast = FastEncoder(encoder, precision)
    fast(patches)
    fast.weights_changed()
    with Operations() as operations:
        fast.refresh()
    return operations


@pytest.mark.parametrize(("name", "layers"), [("resnet18", 20), ("resnet50", 53)])
def test_refresh_takes_few_operations_besides_one_for_each_layer(name: str, layers: int) -> None:
    assert len(refreshing(TimmEncoder(name).eval(), pixels(1, 32)).seen) <= layers + 13


@pytest.mark.parametrize(
    ("make", "patches"),
    [
        (lambda: TimmEncoder("vit_tiny_patch16_224", 1, stages=1), pixels(1, 224, 1)),
        (lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8), nn.BatchNorm1d(8), nn.ReLU()), torch.randn(4, 32)),
        (ENCODERS["lite0"], pixels(1, 32)),
    ],
    ids=["vit", "layer norm", "lite0"],
)
def test_no_copy_of_many_tensors_mixes_types(make: Callable[[], nn.Module], patches: Tensor) -> None:
    """Before 2.11, torch writes wrong values on a GPU where it does."""
    copies = [args for name, args in refreshing(make().eval(), patches).seen if name == "_foreach_copy_"]
    assert copies
    for there, here in copies:
        assert len({(to.dtype, of.dtype) for to, of in zip(there, here, strict=True)}) == 1


def encoders_of(seed: int = 0) -> Encoders:
    encoder = lived(ENCODERS["small"](), seed)
    return Encoders(IPSClassifier(encoder, CrossAttentionPool(encoder.dim, 2), {"a": nn.Linear(encoder.dim, 2)}).eval())


def fused_step(encoder: nn.Module) -> None:
    """Torch does not count what a fused optimizer changes."""
    encoder.train()(pixels().permute(0, 3, 1, 2) / 255).square().sum().backward()
    torch.optim.AdamW(encoder.parameters(), 0.01, fused=True).step()
    encoder.eval()


def write_data(encoder: nn.Module) -> None:
    for parameter in encoder.parameters():
        parameter.data.mul_(0.9)


def load(encoder: nn.Module) -> None:
    encoder.load_state_dict(lived(ENCODERS["small"](), seed=3).state_dict())


def replace_tensors(encoder: nn.Module) -> None:
    encoder.load_state_dict(lived(ENCODERS["small"](), seed=3).state_dict(), assign=True)


def train_statistics(encoder: nn.Module) -> None:
    with torch.no_grad():
        encoder.train()(pixels().permute(0, 3, 1, 2) / 255)
    encoder.eval()


@pytest.mark.parametrize("change", [fused_step, write_data, load, replace_tensors, train_statistics])
def test_looking_sees_the_weights_of_now_however_they_changed(change: Callable[[nn.Module], None]) -> None:
    encoders = encoders_of()
    encoder = encoders.model.encoder
    for _ in range(2):
        change(encoder)
        encoders.fast.weights_changed()
        with encoders.inference():
            assert error(encoders.embed(pixels()), plain(encoder, pixels())) < 1e-5


@pytest.mark.cuda(dry=False)
def test_the_copy_follows_a_model_to_a_gpu() -> None:
    encoders = encoders_of()
    with encoders.inference():
        expected = encoders.embed(pixels())
    encoders.model.cuda()
    with encoders.inference():
        assert error(encoders.embed(pixels().cuda()).cpu(), expected) < 1e-5


@pytest.mark.parametrize("change", [load, replace_tensors, train_statistics])
def test_many_batches_with_one_set_of_weights_take_it_over_once(change: Callable[[nn.Module], None]) -> None:
    encoders = encoders_of()
    encoder = encoders.model.encoder
    with encoders.inference():
        encoders.embed(pixels())
    with Operations() as operations, encoders.inference():
        pass
    assert operations.seen == []
    change(encoder)
    with Operations() as operations, encoders.inference():
        assert error(encoders.embed(pixels()), plain(encoder, pixels())) < 1e-5
    assert any(name == "_foreach_copy_" for name, _ in operations.seen)


def test_weights_of_the_activation_behind_a_folded_norm_are_followed() -> None:
    norm = BatchNormAct2d(8, act_layer=nn.PReLU)
    encoder = lived(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    fast = FastEncoder(encoder)
    fast(pixels())
    with torch.no_grad():
        norm.act.weight.fill_(0.9)
    fast.refresh()
    assert fast.folded == 1
    assert error(fast(pixels()), plain(encoder, pixels())) < 1e-5


class Branching(nn.Module):
    """A convolution whose output a norm takes, and something else too: folding it would change the result."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, patches: Tensor) -> Tensor:
        maps = self.convolution(patches)
        found: Tensor = (self.norm(maps) + maps).mean(dim=(2, 3))
        return found


@pytest.mark.parametrize("age", ["new", "lived"])
def test_what_cannot_be_folded_is_left_as_it_is(age: str) -> None:
    encoder = Branching().eval()
    fast = FastEncoder(encoder)
    fast(pixels())  # a new norm changes next to nothing: folding it would go unnoticed
    if age == "lived":
        lived(encoder)
        fast.weights_changed()
        fast.refresh()
    assert error(fast(pixels()), plain(encoder, pixels())) < FOLDED_ERROR / 10
    assert fast.folded == 0


def test_features_are_projected_with_the_norm_folded() -> None:
    encoder = lived(FeatureProjector(32, 8))
    features = torch.randn(5, 32)
    fast = FastEncoder(encoder)
    with torch.no_grad():
        assert error(fast(features), encoder(features)) < 1e-5
    assert fast.folded == 1


def test_colours_change_as_in_the_second_pass() -> None:
    encoder = lived(ENCODERS["small"]())
    color = torch.stack([color_matrix(row, 3) for row in (torch.rand(3, 4).double().numpy() - 0.5) * 0.4])
    color = color[[0, 0, 1, 1, 1, 2]]
    with torch.no_grad():
        expected = encoder(prepare(pixels(), color))
    assert error(FastEncoder(encoder)(pixels(), color), expected) < 1e-5
    mixed = (
        torch.einsum("kdc,kchw->kdhw", color[..., :3], pixels().permute(0, 3, 1, 2) / 255) + color[..., 3, None, None]
    )
    assert torch.allclose(prepare(pixels(), color), mixed.clamp(0, 1), atol=1e-5)


@pytest.mark.slow
def test_compiled_it_is_the_same_and_is_not_compiled_again() -> None:
    from torch._dynamo.utils import counters

    encoder = lived(ENCODERS["small"]())
    fast = FastEncoder(encoder, compile=True)
    assert error(fast(pixels()), plain(encoder, pixels())) < 1e-5
    graphs = counters["stats"]["unique_graphs"]
    for seed in range(3):
        encoder.load_state_dict(lived(ENCODERS["small"](), seed).state_dict())
        fast.refresh()
        for k in (6, 4, 1):
            assert error(fast(pixels(k)), plain(encoder, pixels(k))) < 1e-5
    assert counters["stats"]["unique_graphs"] == graphs


def test_bf16_keeps_nearly_the_same_patches() -> None:
    encoder = lived(ENCODERS["resnet18"]())
    model = IPSClassifier(encoder, CrossAttentionPool(128, 8), {"label": nn.Linear(128, 2)})
    patches = torch.rand(2, 200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = model.select(patches, 40, 64)
    encoders = Encoders(model, Arithmetic(torch.bfloat16, torch.bfloat16))
    with encoders.inference():
        fast = model.select(patches, 40, 64, encode=encoders.embed)
    overlap = [len(set(a.tolist()) & set(b.tolist())) / 40 for a, b in zip(exact.index, fast.index, strict=True)]
    assert min(overlap) >= 0.95
