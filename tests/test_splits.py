"""Laws of making splits: whole groups, every image once, shares and class proportions, the seed alone decides."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from keyhole.data.splits import Sample, leaking_groups, make_splits
from keyhole.errors import DataError

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
Shares = dict[str, float]


@st.composite
def shares(draw: st.DrawFn) -> Shares:
    val = draw(st.floats(0.05, 0.4))
    test = draw(st.one_of(st.just(0.0), st.floats(0.05, 0.4)))
    return {"train": 1 - val - test, "val": val, "test": test}


def classed(labels: list[str], groups: list[str | None] | None = None) -> list[Sample]:
    own = groups or [None] * len(labels)
    return [
        Sample(f"{i}.png", group, label, [("task", label)])
        for i, (label, group) in enumerate(zip(labels, own, strict=True))
    ]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.sampled_from("aabc"), st.integers(0, 12)), min_size=12, max_size=120),
    shares(),
    st.integers(0, 5),
)
def test_every_image_is_in_one_asked_split_and_no_group_on_two_sides(
    rows: list[tuple[str, int]], shares: Shares, seed: int
) -> None:
    subjects = classed([label for label, _ in rows], [f"g{group}" for _, group in rows])
    try:
        splits = make_splits(subjects, shares, seed)
    except DataError:
        assume(False)
    asked = {split for split, share in shares.items() if share > 0}
    assert len(splits) == len(rows)
    assert set(splits) == asked
    assert leaking_groups([subject.group for subject in subjects], splits) == []
    train = {label for (label, _), split in zip(rows, splits, strict=True) if split == "train"}
    assert train == {label for label, _ in rows}


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), shares(), st.integers(0, 5))
def test_without_groups_each_class_is_within_one_image_of_its_share(
    counts: list[int], shares: Shares, seed: int
) -> None:
    assume(all(sum(counts) * share >= 3 for share in shares.values() if share > 0))
    labels = [f"class {k}" for k, count in enumerate(counts) for _ in range(count)]
    splits = make_splits(classed(labels), shares, seed)
    got = Counter(zip(labels, splits, strict=True))
    for split, share in shares.items():
        for k, count in enumerate(counts):
            assert abs(got[f"class {k}", split] - count * share) < 1
        assert abs(splits.count(split) - len(labels) * share) < 2


def test_many_small_classes_still_fill_every_split() -> None:
    for size in (2, 3):
        splits = Counter(make_splits(classed([str(i // size) for i in range(100 * size)]), SHARES, 0))
        assert splits == {"train": 70 * size, "val": 15 * size, "test": 15 * size}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_with_small_groups_the_shares_come_out_within_a_few_images(seed: int) -> None:
    draw = random.Random(seed)
    groups: list[str | None] = [f"patient {number}" for number in range(100) for _ in range(draw.randint(1, 4))]
    labels = [draw.choice("ab") for _ in groups]
    splits = Counter(make_splits(classed(labels, groups), SHARES, seed))
    for split, share in SHARES.items():
        assert abs(splits[split] - len(groups) * share) <= 8


@settings(deadline=None, max_examples=30)
@given(st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_the_rows_does_not_matter(draw: random.Random, grouped: bool) -> None:
    groups = [f"g{i // 3}" if grouped else None for i in range(60)]
    subjects = classed([draw.choice("abc") for _ in range(60)], groups)
    by_name = {s.name: split for s, split in zip(subjects, make_splits(subjects, SHARES, 1), strict=True)}
    shuffled = draw.sample(subjects, len(subjects))
    assert {s.name: split for s, split in zip(shuffled, make_splits(shuffled, SHARES, 1), strict=True)} == by_name


def test_the_seed_decides() -> None:
    subjects = classed(["a", "b"] * 30)
    draws = [tuple(make_splits(subjects, SHARES, seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_a_rare_class_goes_to_training_first() -> None:
    for seed in range(10):
        splits = make_splits(classed(["common"] * 30 + ["rare"]), SHARES, seed)
        assert splits[-1] == "train"


def test_a_rare_class_of_another_task_is_in_training_too() -> None:
    for seed in range(20):
        subjects = [Sample(f"{i}", None, "ab"[i % 2], [("second", "rare" if i == 7 else "common")]) for i in range(40)]
        assert make_splits(subjects, SHARES, seed)[7] == "train"


def test_a_group_larger_than_a_held_out_split_is_learned_from() -> None:
    groups: list[str | None] = ["large"] * 30 + [f"small {i}" for i in range(30)]
    for seed in range(10):
        splits = make_splits(classed(["a", "b"] * 30, groups), SHARES, seed)
        assert set(splits[:30]) == {"train"}
        assert Counter(splits) == {"train": 42, "val": 9, "test": 9}


def test_the_smallest_data_that_can_be_split_fill_every_split() -> None:
    assert sorted(make_splits(classed(["a", "a", "a"]), SHARES, 0)) == ["test", "train", "val"]
    assert Counter(make_splits(classed(["a", "b", "a", "b"]), {"train": 0.85, "val": 0.15}, 0)) == {
        "train": 3,
        "val": 1,
    }


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        (classed(["a"]), "1 image cannot be shared out to train and val and test"),
        (classed(["a", "b"] * 5, ["one"] * 5 + ["two"] * 5), "2 groups cannot be shared out"),
        (classed(["a", "b", "c"]), "no image is left for val"),
    ],
)
def test_data_too_few_to_split_are_refused_with_a_way_out(subjects: list[Sample], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        make_splits(subjects, SHARES, 0)
    assert "data.val" in str(error.value)
