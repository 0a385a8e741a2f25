"""The split gradient step has the gradients of the unsplit one, and touches nothing else twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from keyhole.engine import parts, split_backward
from keyhole.nn import CrossAttentionPool, IndexPosition, IPSClassifier, SmallEncoder

LAW = settings(max_examples=25, deadline=None)
FEATURES, DIM = 6, 8


def model_of(encoder: nn.Module, queries: int = 2, position: bool = False, dropout: float = 0.2) -> IPSClassifier:
    pool = CrossAttentionPool(DIM, 2, queries, dropout=dropout, attention_dropout=dropout)
    heads = {f"task{t}": nn.Linear(DIM, t + 2) for t in range(queries)}
    return IPSClassifier(encoder, pool, heads, IndexPosition(DIM) if position else None).train()


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, DIM), nn.LayerNorm(DIM), nn.ReLU(), nn.Linear(DIM, DIM))


def frozen_norm() -> nn.Module:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    return nn.Sequential(nn.Linear(FEATURES, DIM), Frozen(DIM), nn.ReLU())


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, DIM), nn.BatchNorm1d(DIM), nn.Dropout(0.3), nn.Linear(DIM, DIM))


def frozen() -> nn.Module:
    return batch_norm().requires_grad_(False)


def bags(lengths: list[int], extra: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    width = max(lengths) + extra
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    patches = torch.full((len(lengths), width, FEATURES), torch.nan)  # whatever touches the padding spreads a NaN
    patches[mask] = torch.randn(int(mask.sum()), FEATURES, generator=torch.Generator().manual_seed(seed))
    return patches, torch.arange(width).expand(len(lengths), width), mask


def loss_of(logits: dict[str, Tensor]) -> Tensor:
    return sum((each.square().mean() for each in logits.values()), torch.zeros(()))


def chunked(loose: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: loose[start:stop]


def outcome(model: IPSClassifier, step: Callable[[], Tensor], seed: int = 0) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Loss, gradients and buffers after a step, and the random state it leaves."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    value = step().detach()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return value, found | {name: buffer.clone() for name, buffer in model.named_buffers()}, torch.get_rng_state()


def copy_of(model: IPSClassifier, build: Callable[[], IPSClassifier]) -> IPSClassifier:
    twin = build()
    twin.load_state_dict(model.state_dict())
    return twin


def whole(model: IPSClassifier, patches: Tensor, position: Tensor | None, mask: Tensor) -> Tensor:
    loss = loss_of(model(patches, position, mask))
    loss.backward()
    return loss


def same(first: dict[str, Any], second: dict[str, Any], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@LAW
@given(LENGTHS, st.integers(0, 3), st.integers(1, 40), st.sampled_from([layer_norm, frozen_norm]), st.booleans())
def test_gradients_are_those_of_the_unsplit_step(
    lengths: list[int], extra: int, chunk: int, encoder: Callable[[], nn.Module], positions: bool
) -> None:
    torch.manual_seed(0)
    model = model_of(encoder(), 2, positions)
    patches, position, mask = bags(lengths, extra, 1)
    where = position if positions else None
    plain = outcome(model, lambda: whole(model, patches, where, mask))
    split = outcome(model, lambda: split_backward(model, chunked(patches[mask]), where, mask, loss_of, chunk))
    torch.testing.assert_close(plain[0], split[0])
    same(plain[1], split[1])
    assert torch.equal(plain[2], split[2]), "the random state goes on as after the unsplit step"


@LAW
@given(LENGTHS, st.integers(0, 3), st.integers(0, 9), st.sampled_from([layer_norm, batch_norm, frozen]))
def test_a_chunk_that_holds_all_is_the_ordinary_step_to_the_bit(
    lengths: list[int], extra: int, more: int, encoder: Callable[[], nn.Module]
) -> None:
    lengths[0] += 1  # batch norm needs two patches
    torch.manual_seed(0)
    model = model_of(encoder())
    twin = copy_of(model, lambda: model_of(encoder()))
    patches, _, mask = bags(lengths, extra, 2)
    chunk = None if more == 9 else sum(lengths) + more
    plain = outcome(model, lambda: whole(model, patches, None, mask))
    split = outcome(twin, lambda: split_backward(twin, chunked(patches[mask]), None, mask, loss_of, chunk))
    assert torch.equal(plain[0], split[0])
    same(plain[1], split[1], rtol=0, atol=0)
    assert torch.equal(plain[2], split[2])


def by_hand(model: IPSClassifier, patches: Tensor, mask: Tensor, chunk: int) -> Tensor:
    """Each chunk encoded once with its graph kept: what the split step computes, without saving any memory."""
    loose = patches[mask]
    embedding = torch.cat([model.encode(loose[start:stop]) for start, stop in parts(len(loose), chunk)])
    padded = torch.zeros(*mask.shape, DIM).masked_scatter(mask[..., None], embedding)
    loss = loss_of(model.classify(padded, None, mask))
    loss.backward()
    return loss


@LAW
@given(LENGTHS, st.integers(0, 3), st.integers(1, 20), st.sampled_from(["float32", "bf16"]))
def test_batch_norm_and_dropout_are_drawn_and_counted_once_per_chunk(
    lengths: list[int], extra: int, chunk: int, precision: str
) -> None:
    lengths[0] += 1
    torch.manual_seed(0)
    model = model_of(batch_norm())
    twin = copy_of(model, lambda: model_of(batch_norm()))
    model.precision = twin.precision = torch.bfloat16 if precision == "bf16" else torch.float32
    patches, _, mask = bags(lengths, extra, 3)
    expected = outcome(model, lambda: by_hand(model, patches, mask, chunk))
    split = outcome(twin, lambda: split_backward(twin, chunked(patches[mask]), None, mask, loss_of, chunk))
    assert torch.equal(expected[0], split[0])
    loose = {"rtol": 2e-2, "atol": 2e-2} if precision == "bf16" else {}
    same(expected[1], split[1], **loose)
    assert split[1]["encoder.1.num_batches_tracked"] == len(parts(sum(lengths), chunk))
    assert torch.equal(expected[2], split[2])


def test_the_small_encoder_over_pixels() -> None:
    torch.manual_seed(0)

    def build() -> IPSClassifier:
        encoder = SmallEncoder(3, width=4)
        pool = CrossAttentionPool(encoder.dim, 4, dropout=0.0, attention_dropout=0.0)
        return IPSClassifier(encoder, pool, {"label": nn.Linear(encoder.dim, 2)}).train()

    model = build()
    for part in model.encoder.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.eval()
    pixels, mask = torch.randint(0, 256, (12, 3, 20, 20), dtype=torch.uint8), torch.ones(3, 4, dtype=torch.bool)
    plain = outcome(model, lambda: whole(model, pixels.unflatten(0, (3, 4)), None, mask))
    split = outcome(model, lambda: split_backward(model, chunked(pixels), None, mask, loss_of, 5))
    same(plain[1], split[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "chunk", "fetched"), [(batch_norm, 4, 2), (batch_norm, 12, 1), (batch_norm, None, 1), (frozen, 4, 1)]
)
def test_patches_are_fetched_twice_only_where_that_is_needed(
    encoder: Callable[[], nn.Module], chunk: int | None, fetched: int
) -> None:
    model, counts = model_of(encoder()), torch.zeros(12)
    patches, _, mask = bags([5, 7], 0, 0)

    def fetch(start: int, stop: int) -> Tensor:
        counts[start:stop] += 1
        assert chunk is None or stop - start <= chunk
        return patches[mask][start:stop]

    split_backward(model, fetch, None, mask, loss_of, chunk)
    assert (counts == fetched).all()


def test_a_frozen_encoder_learns_nothing_and_the_rest_all_the_same() -> None:
    torch.manual_seed(0)
    model = model_of(frozen())
    patches, _, mask = bags([5, 7], 1, 0)
    plain = outcome(model, lambda: whole(model, patches, None, mask))
    split = outcome(model, lambda: split_backward(model, chunked(patches[mask]), None, mask, loss_of, 3))
    same(plain[1], split[1])
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert model.pool.query.grad is not None


def test_gradients_are_added_to_those_there() -> None:
    torch.manual_seed(0)
    model = model_of(layer_norm(), dropout=0.0)
    patches, _, mask = bags([5, 7], 0, 0)
    once = outcome(model, lambda: split_backward(model, chunked(patches[mask]), None, mask, loss_of, 4))[1]
    once = {name: grad.clone() for name, grad in once.items()}
    split_backward(model, chunked(patches[mask]), None, mask, loss_of, 4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("chunk", [4, None])
def test_a_loss_that_is_not_finite_shows_in_the_loss_and_in_the_gradients(chunk: int | None) -> None:
    model = model_of(batch_norm())
    patches, _, mask = bags([5, 7], 0, 0)
    value = split_backward(model, chunked(patches[mask]), None, mask, lambda logits: loss_of(logits) * torch.inf, chunk)
    assert not value.isfinite()
    assert not value.requires_grad
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert not torch.nn.utils.get_total_norm(gradients).isfinite()


@LAW
@given(st.integers(1, 300), st.integers(1, 320))
def test_parts_cover_all_in_nearly_equal_spans_that_batch_norm_can_learn_from(total: int, chunk: int) -> None:
    spans = parts(total, chunk)
    assert [patch for start, stop in spans for patch in range(start, stop)] == list(range(total))
    lengths = {stop - start for start, stop in spans}
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= max(chunk, 3)
    assert min(lengths) >= min(2, total)
    assert parts(total, None) == [(0, total)]
    with pytest.raises(ValueError, match="must be at least 1"):
        parts(total, 0)
