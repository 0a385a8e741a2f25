"""Laws 1, 3 and 5 of the method, and what the modules promise."""

from __future__ import annotations

import weakref
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from keyhole.config.settings import FIXED_CHUNK_RULES, ModelConfig, SelectConfig
from keyhole.nn import (
    CenterPosition,
    CrossAttentionPool,
    IndexPosition,
    IPSClassifier,
    Kept,
    SmallEncoder,
    TimmEncoder,
    explore,
    task_loss,
    total_loss,
)
from keyhole.nn.position import POSITIONS
from keyhole.nn.selection import RULES, Rule, Selector
from keyhole.tasks.kinds import Task

LAW = settings(max_examples=25, deadline=None)
FEATURES, DIM = 12, 16


def features_model(queries: int = 2, heads: int = 4, position: str = "none", seed: int = 0) -> IPSClassifier:
    torch.manual_seed(seed)
    pool = CrossAttentionPool(DIM, heads, queries)
    with torch.no_grad():  # sharper attention than fresh weights give, so that the order is not decided by rounding
        pool.key_proj.weight *= 4
    code = {"none": None, "1d": IndexPosition(DIM), "2d": CenterPosition(DIM, unit=10.0)}[position]
    encoder = nn.Sequential(nn.Linear(FEATURES, DIM), nn.BatchNorm1d(DIM), nn.Dropout(0.5))
    heads_of = {f"task{t}": nn.Linear(DIM, 3) for t in range(queries)}
    return IPSClassifier(encoder, pool, heads_of, code)


def bag(n: int, seed: int, images: int = 1) -> Tensor:
    return torch.randn(images, n, FEATURES, generator=torch.Generator().manual_seed(seed))


def kept(model: IPSClassifier, patches: Tensor, m: int, chunk: int, **options: Any) -> list[set[int]]:
    index = model.select(patches, m, chunk, **options).index
    return [set(row[row >= 0].tolist()) for row in index]


# What users pass


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_an_autocast_of_the_users_changes_nothing(kind: torch.dtype) -> None:
    model, patches = features_model(position="1d").eval(), bag(60, 0)
    place = torch.arange(60)[None]
    here, out = model.select(patches, 8, 16), model(patches, place)
    pooled = model.pool(torch.randn(1, 5, DIM, generator=torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", kind):
        there, again = model.select(patches, 8, 16), model(patches, place)
        twice = model.pool(torch.randn(1, 5, DIM, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(there.logits, here.logits, rtol=0, atol=0)
    torch.testing.assert_close(again, out, rtol=0, atol=0)
    torch.testing.assert_close(twice, pooled, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_features_may_be_floats_of_any_width(kind: torch.dtype) -> None:
    model, patches = features_model().eval(), bag(20, 0).to(kind)
    torch.testing.assert_close(model(patches), model(patches.float()), rtol=0, atol=0)
    torch.testing.assert_close(model.select(patches, 4, 7).index, model.select(patches.float(), 4, 7).index)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_an_encoder_may_have_weights_of_any_width(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = {"task": nn.Linear(DIM, 3)}
    model = IPSClassifier(nn.Linear(FEATURES, DIM, dtype=kind), CrossAttentionPool(DIM, 4), heads).eval()
    for patches in (bag(20, 0).to(kind), bag(20, 0)):
        assert model(patches)["task"].dtype == torch.float32
        assert model.select(patches, 4, 7).logits.dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_bytes_are_values_up_to_1_in_both_passes_whatever_the_shape(rule: Any) -> None:
    features = torch.randint(0, 256, (1, 20, FEATURES), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = features_model().eval()
    torch.testing.assert_close(model(features), model(features / 255))
    assert kept(model, features, 4, 7, rule=rule) == kept(model, features / 255, 4, 7, rule=rule)
    volumes = features.view(1, 20, 1, 3, 2, 2)
    flat = IPSClassifier(nn.Sequential(nn.Flatten(), model.encoder), model.pool, dict(model.heads.items())).eval()
    assert kept(flat, volumes, 4, 7, rule=rule) == kept(model, features, 4, 7, rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_a_patch_that_cannot_be_scored_is_an_error(rule: Any, value: float) -> None:
    patches, model = bag(20, 0), features_model()
    patches[0, 7, 0] = value
    with torch.no_grad():
        model.pool.query *= 1e4  # so that 1e38 overflows
    with pytest.raises(ValueError, match="are NaN or infinite"):
        model.select(patches, 4, 8, rule=rule)


def test_an_image_without_patches_harms_no_other() -> None:
    model = features_model().eval()
    patches, mask = bag(6, 0, 2), torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    alone = model(patches[:1])["task0"].sum()
    wanted = torch.autograd.grad(alone, [model.pool.query, model.pool.value_proj.weight])
    both = model(patches, mask=mask)
    found = torch.autograd.grad(both["task0"][0].sum(), [model.pool.query, model.pool.value_proj.weight])
    torch.testing.assert_close(found, wanted)
    assert all(out.isfinite().all() for out in both.values())


def test_a_position_code_of_the_users_is_given_positions() -> None:
    model = features_model()
    model.position = nn.Linear(2, DIM)
    with pytest.raises(ValueError, match="give `position`"):
        model.select(bag(20, 0), 4, 8)
    assert model.select(bag(20, 0), 4, 8, position=torch.rand(1, 20, 2)).index.shape == (1, 4)


def test_rules_and_position_codes_are_those_that_the_settings_name() -> None:
    assert set(get_args(Rule)) == set(RULES) == set(get_args(SelectConfig.model_fields["rule"].annotation))
    assert set(FIXED_CHUNK_RULES) == {name for name, rule in RULES.items() if rule.own_chunk}
    assert {"none", *POSITIONS} == set(get_args(ModelConfig.model_fields["position"].annotation))


# Law 1: under "global" the kept set depends on the patches alone


@LAW
@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_global_does_not_depend_on_the_chunk(n: int, m: int, chunk: int, other: int, seed: int) -> None:
    model, patches = features_model(), bag(n, seed)
    assert kept(model, patches, m, chunk) == kept(model, patches, m, other)


@LAW
@given(st.integers(2, 60), st.integers(1, 20), st.randoms(use_true_random=False), st.integers(0, 99))
def test_global_does_not_depend_on_the_order(n: int, m: int, random: Any, seed: int) -> None:
    model, patches = features_model(position="2d"), bag(n, seed)
    centers = torch.rand(1, n, 2, generator=torch.Generator().manual_seed(seed)) * 1000
    order = random.sample(range(n), n)
    (straight,) = kept(model, patches, m, 16, position=centers)
    (shuffled,) = kept(model, patches[:, order], m, 16, position=centers[:, order])
    assert {order[place] for place in shuffled} == straight


@LAW
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 30), st.integers(0, 99))
def test_global_does_not_depend_on_other_images_or_padding(a: int, b: int, m: int, chunk: int, seed: int) -> None:
    model, first, second = features_model(position="1d"), bag(a, seed), bag(b, seed + 1000)
    both = torch.full((2, max(a, b), FEATURES), torch.nan)  # whatever touches the padding spreads a NaN
    both[0, :a], both[1, :b] = first[0], second[0]
    mask = torch.zeros(2, max(a, b), dtype=torch.bool)
    mask[0, :a] = mask[1, :b] = True
    for rule in RULES:
        alone = kept(model, first, m, chunk, rule=rule) + kept(model, second, m, chunk, rule=rule)
        assert kept(model, both, m, chunk, rule=rule, mask=mask) == alone


@LAW
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 30), st.integers(0, 99))
def test_both_rules_agree_for_one_head_and_query(n: int, m: int, chunk: int, seed: int) -> None:
    model, patches = features_model(queries=1, heads=1), bag(n, seed)
    assert kept(model, patches, m, chunk, rule="streaming") == kept(model, patches, m, chunk, rule="global")


def test_all_patches_are_kept_where_there_are_no_more_than_m() -> None:
    selection = features_model().select(bag(5, 0), m=9, chunk=2)
    assert sorted(selection.index[0].tolist()) == [0, 1, 2, 3, 4]
    assert selection.index.shape == (1, 5)


def test_equal_patches_are_kept_in_their_order() -> None:
    patches = bag(1, 0).expand(1, 10, FEATURES)
    assert features_model().select(patches, m=4, chunk=10).index[0].tolist() == [0, 1, 2, 3]


# Patches that never arrive, in any order


Holes = st.integers(1, 50).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n)))


def arrive(selector: Selector, order: list[int], logits: Tensor, size: int, image: int = 0) -> None:
    for start in range(0, len(order), size):
        index = torch.tensor(order[start : start + size])
        selector.add(torch.full_like(index, image), index, logits[index])


@LAW
@given(Holes, st.integers(1, 12), st.integers(1, 17), st.randoms(use_true_random=False), st.booleans())
def test_global_keeps_the_best_of_those_that_arrive_in_any_order(
    holes: tuple[int, set[int]], m: int, size: int, random: Any, told: bool
) -> None:
    n, missing = holes
    logits = torch.randn(n, 4, 2, generator=torch.Generator().manual_seed(n)) * 3
    there = [index for index in range(n) if index not in missing]
    selector = Selector([n], m, 5, keep_logits=True)
    if told:
        selector.skip(torch.zeros(len(missing), dtype=torch.long))
    arrive(selector, random.sample(there, len(there)), logits, size)
    found = selector.finish(0)
    score = torch.zeros(n)
    score[there] = logits[there].softmax(dim=0).mean(dim=(1, 2))
    assert len(found.index) == min(m, len(there))
    assert set(found.index.tolist()) <= set(there)
    if there:
        best = score[there].sort(descending=True).values[:m]
        torch.testing.assert_close(found.score, best)
        torch.testing.assert_close(found.score, score[found.index])
        assert found.logits is not None
        assert torch.equal(found.logits[there], logits[there])
        assert found.logits[sorted(missing)].isneginf().all()
    if missing:
        assert found.arrived is not None
        assert found.arrived.nonzero()[:, 0].tolist() == there
    else:
        assert found.arrived is None


@LAW
@given(Holes, st.integers(1, 12), st.integers(1, 17), st.integers(1, 9))
def test_streaming_keeps_what_it_would_without_the_patches_that_do_not_arrive(
    holes: tuple[int, set[int]], m: int, size: int, chunk: int
) -> None:
    n, missing = holes
    logits = torch.randn(n, 4, 2, generator=torch.Generator().manual_seed(n)) * 3
    there = [index for index in range(n) if index not in missing]
    selector, dense = (
        Selector([n], m, chunk, "streaming", keep_logits=True),
        Selector([len(there)], m, chunk, "streaming"),
    )
    arrive(selector, there, logits, size)
    arrive(dense, list(range(len(there))), logits[there], size)
    found, expected = selector.finish(0), dense.finish(0)
    assert found.index.tolist() == [there[place] for place in expected.index.tolist()]
    torch.testing.assert_close(found.score, expected.score)
    assert expected.logits is None
    if there:
        assert found.logits is not None
        assert torch.equal(found.logits[there], logits[there])


def test_a_score_of_zero_is_kept_before_a_patch_that_never_arrived() -> None:
    logits = torch.tensor([0.0, 0.0, 500.0, -500.0]).reshape(4, 1, 1)  # softmax of the last underflows
    selector = Selector([4], 3, 2)
    arrive(selector, [2, 3], logits, 2)
    found = selector.finish(0)
    assert found.index.tolist() == [2, 3]
    assert found.score.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("rule", RULES)
def test_an_image_of_which_nothing_arrives_keeps_nothing(rule: Any) -> None:
    selector = Selector([5, 0, 3], 2, 2, rule, keep_logits=True)
    selector.skip(torch.tensor([0, 0, 2, 0]))
    arrive(selector, [0, 2], torch.randn(3, 4, 2), 1, image=2)
    for image, kept_patches in enumerate([0, 0, 2]):
        found = selector.finish(image)
        assert found.index.dtype == torch.long
        assert len(found.index) == len(found.score) == kept_patches
    drawn = explore(selector.finish(0), 5, 1.0, torch.Generator().manual_seed(0))
    assert len(drawn.index) == 0


class Made(TorchDispatchMode):
    """Notes tensors of one shape that are made inside."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.tensors = shape, [weakref.ref(torch.empty(0))]

    def alive(self) -> int:
        return sum(each() is not None for each in self.tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == self.shape:
            self.tensors.append(weakref.ref(result))
        return result


def test_the_logits_of_one_image_are_held_at_a_time() -> None:
    selector, made = Selector([30] * 4, 2, 5), Made((30, 4, 2))
    for image in range(4):
        logits = torch.randn(30, 4, 2)
        with made:
            arrive(selector, list(range(21)), logits, 7, image)
            assert made.alive() == 1
            arrive(selector, list(range(21, 30)), logits, 7, image)
        assert made.alive() == 0
        assert selector.finish(image).logits is None


# Law 3: bags of different size share a batch


@LAW
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 99))
def test_padding_never_changes_an_output(a: int, b: int, extra: int, seed: int) -> None:
    model, first, second = features_model(position="1d").eval(), bag(a, seed), bag(b, seed + 1000)
    width = max(a, b) + extra
    both, mask = torch.full((2, width, FEATURES), torch.nan), torch.zeros(2, width, dtype=torch.bool)
    both[0, :a], both[1, :b], mask[0, :a], mask[1, :b] = first[0], second[0], True, True
    position = torch.arange(width).expand(2, width)
    together = model(both, position, mask)
    for row, alone in enumerate((first, second)):
        single = model(alone, torch.arange(alone.shape[1])[None])
        for task, logits in single.items():
            torch.testing.assert_close(together[task][row], logits[0])


def test_padding_does_not_reach_batch_statistics_or_gradients() -> None:
    model, patches = features_model().train(), bag(6, 0, images=2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 2:] = False
    padded = patches.clone()
    padded[1, 2:] = torch.nan
    model.encoder[2].p = 0.0
    total = sum(logits.sum() for logits in model(padded, mask=mask).values())
    assert isinstance(total, Tensor)
    total.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    expected = model.encoder[0](patches[mask]).mean(dim=0) * 0.1
    torch.testing.assert_close(model.encoder[1].running_mean, expected.detach())


# Law 5: selection leaves everything as it found it


def state(model: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[Tensor | None]]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [part.training for part in model.modules()], [parameter.grad for parameter in model.parameters()]


@LAW
@given(st.lists(st.booleans(), min_size=30, max_size=30), st.sampled_from(sorted(RULES)))
def test_selection_leaves_everything_as_it_found_it(modes: list[bool], rule: Any) -> None:
    model = features_model()
    for part, mode in zip(model.modules(), modes, strict=False):
        part.training = mode
    before, random = state(model), torch.get_rng_state()
    selection = model.select(bag(20, 0), 4, 6, rule)
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert torch.equal(random, torch.get_rng_state())
    assert not selection.score.requires_grad


def test_modes_come_back_after_an_error() -> None:
    model = features_model().train()
    with pytest.raises(RuntimeError):
        model.select(torch.randn(1, 5, FEATURES + 1), 2, 2)
    assert all(part.training for part in model.modules())


def test_what_a_user_froze_stays_frozen() -> None:
    model = features_model()
    model.encoder.requires_grad_(False)
    model.train()
    assert not any(part.training for part in model.encoder.modules())
    assert model.pool.training
    assert model.heads.training
    before = model.encoder[1].running_mean.clone()
    model(bag(8, 0))
    assert torch.equal(before, model.encoder[1].running_mean)


def test_selection_is_made_in_evaluation_mode() -> None:
    model, patches = features_model(), bag(30, 0)
    assert kept(model.train(), patches, 5, 7) == kept(model.eval(), patches, 5, 7)


# Modules


def test_folding_the_query_changes_nothing() -> None:
    pool, embedding = CrossAttentionPool(DIM, 4, 3, head_dim=(5, 6)), torch.randn(2, 7, DIM)
    query = pool.query_proj(pool.query).unflatten(1, (4, 5))
    key = pool.key_proj(embedding).unflatten(2, (4, 5))
    expected = torch.einsum("bnhk,thk->bnht", key, query) / 5**0.5
    torch.testing.assert_close(pool.logits(embedding), expected)


def test_pooling_attends_with_the_logits_it_scores_with() -> None:
    pool = CrossAttentionPool(DIM, 2, 2, dropout=0.0, attention_dropout=0.0).eval()
    embedding = torch.randn(1, 6, DIM)
    attention = pool.logits(embedding).softmax(dim=1)
    value = pool.value_proj(embedding).unflatten(2, (2, DIM // 2))
    pooled = torch.einsum("bnht,bnhv->bthv", attention, value).flatten(2)
    x = pool.attention_norm(pool.query + pool.out_proj(pooled))
    torch.testing.assert_close(pool(embedding), pool.mlp_norm(x + pool.mlp(x)))


def test_widths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"`dim` \(=30\) must be divisible by `heads` \(=8\)"):
        CrossAttentionPool(30)
    with pytest.raises(ValueError, match="needs query 1"):
        IPSClassifier(nn.Identity(), CrossAttentionPool(16), {"a": nn.Identity(), "b": nn.Identity()})


def test_a_position_code_asks_for_positions() -> None:
    with pytest.raises(ValueError, match="give `position`"):
        features_model(position="1d")(bag(4, 0))


@pytest.mark.parametrize("position", ["1d", "2d"])
def test_positions_tell_equal_patches_apart(position: str) -> None:
    model = features_model(position=position).eval()
    patches = bag(1, 0).expand(1, 2, FEATURES)
    where = torch.tensor([[0, 7]]) if position == "1d" else torch.tensor([[[0.0, 0.0], [70.0, 0.0]]])
    logits = model.logits(model.encode(patches[0]), where[0])
    assert not torch.allclose(logits[0], logits[1])


def test_centers_differ_along_both_axes() -> None:
    code = CenterPosition(16, unit=32.0)(torch.tensor([[[0.0, 64.0], [64.0, 0.0], [64.0, 64.0]]]))[0]
    assert torch.cdist(code, code).add(torch.eye(3)).min() > 0.1


@pytest.mark.parametrize("size", [16, 50, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_encoder_takes_any_patch(size: int, channels: int) -> None:
    encoder = SmallEncoder(channels, width=8).eval()
    assert encoder(torch.rand(2, channels, size, size)).shape == (2, encoder.dim)


@pytest.mark.parametrize(("name", "stages", "dim"), [("resnet18", 2, 128), ("resnet18", None, 512)])
def test_timm_encoders_can_be_cut(name: str, stages: int | None, dim: int) -> None:
    encoder = TimmEncoder(name, channels=1, stages=stages).eval()
    assert encoder.dim == dim
    assert encoder(torch.rand(1, 1, 64, 64)).shape == (1, dim)


def test_any_module_is_an_encoder() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, DIM))
    model = IPSClassifier(encoder, CrossAttentionPool(DIM, 4), {"label": nn.Linear(DIM, 2)})
    patches = torch.randint(0, 256, (2, 9, 3, 8, 8), dtype=torch.uint8)
    index = model.select(patches, 3, 4).index
    kept_patches = torch.stack([image[rows] for image, rows in zip(patches, index, strict=True)])
    assert model(kept_patches)["label"].shape == (2, 2)


# Losses


CASES = [
    (Task("m", "multiclass", ("a", "b", "c")), [[0.0], [2.0], [1.0]], 3),
    (Task("b", "binary", ("n", "y")), [[0.0], [1.0], [1.0]], 1),
    (Task("l", "multilabel", ("a", "b")), [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], 2),
    (Task("r", "regression", (), mean=5.0, std=2.0), [[5.0], [9.0], [3.0]], 1),
]


@pytest.mark.parametrize(("task", "target", "outputs"), CASES, ids=lambda value: getattr(value, "kind", None))
def test_missing_labels_count_for_nothing(task: Task, target: list[list[float]], outputs: int) -> None:
    logits, labels = torch.randn(3, outputs), torch.tensor(target)
    missing = torch.full((1, labels.shape[1]), torch.nan)
    some = torch.cat([labels, missing]), torch.cat([logits, torch.full((1, outputs), 50.0)])
    torch.testing.assert_close(task_loss(task, some[1], some[0]), task_loss(task, logits, labels))
    none = task_loss(task, logits.requires_grad_(), missing.expand(3, -1))
    none.backward()
    assert none.item() == 0


def test_a_confident_error_keeps_its_gradient() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    task_loss(CASES[0][0], logits, torch.tensor([[1.0]])).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0.9


def test_the_loss_is_the_mean_over_tasks_with_labels() -> None:
    tasks = [CASES[0][0], CASES[1][0]]
    logits = {"m": torch.randn(2, 3), "b": torch.randn(2, 1)}
    targets = {"m": torch.tensor([[0.0], [1.0]]), "b": torch.full((2, 1), torch.nan)}
    torch.testing.assert_close(total_loss(tasks, logits, targets), task_loss(tasks[0], logits["m"], targets["m"]))


def test_balancing_gives_every_class_the_same_weight() -> None:
    targets = torch.tensor([[0.0]] * 6 + [[1.0]] * 3 + [[2.0]] + [[torch.nan]])
    weight = CASES[0][0].class_weights(targets)
    assert weight is not None
    torch.testing.assert_close(weight * torch.tensor([6.0, 3.0, 1.0]), torch.full((3,), 10 / 3))


# Exploring


@LAW
@given(st.integers(1, 40), st.integers(1, 20), st.floats(0, 1), st.integers(0, 99))
def test_exploring_keeps_the_best_and_draws_the_rest_from_all_others(n: int, m: int, share: float, seed: int) -> None:
    score = torch.rand(n, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
    index = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    kept = Kept(index[:m], score[:m])
    found = explore(kept, n, share, torch.Generator().manual_seed(seed))
    again = explore(kept, n, share, torch.Generator().manual_seed(seed))
    drawn = min(round(share * len(kept.index)), n - len(kept.index))
    assert torch.equal(found.index, again.index)
    assert len(set(found.index.tolist())) == len(kept.index)
    assert found.index[: len(kept.index) - drawn].tolist() == kept.index[: len(kept.index) - drawn].tolist()
    assert set(found.index.tolist()) <= set(range(n))


@LAW
@given(Holes, st.integers(1, 12), st.floats(0, 1), st.integers(0, 99))
def test_exploring_draws_only_patches_that_arrived(
    holes: tuple[int, set[int]], m: int, share: float, seed: int
) -> None:
    n, missing = holes
    there = [index for index in range(n) if index not in missing]
    selector = Selector([n], m, 5)
    arrive(selector, there, torch.randn(n, 4, 2, generator=torch.Generator().manual_seed(seed)), 7)
    kept_patches = selector.finish(0)
    found = explore(kept_patches, n, share, torch.Generator().manual_seed(seed))
    assert set(found.index.tolist()) <= set(there)
    assert len(set(found.index.tolist())) == min(m, len(there))


def test_exploring_reaches_every_patch() -> None:
    kept, generator = Kept(torch.arange(3), torch.ones(3)), torch.Generator().manual_seed(0)
    seen = {patch for _ in range(200) for patch in explore(kept, 10, 1.0, generator).index.tolist()}
    assert seen == set(range(10))
