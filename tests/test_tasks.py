"""Tasks: what a column means, and the way from text to target and from logits to label."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keyhole.errors import ConfigError, DataError, RunError
from keyhole.tasks.kinds import Task, infer_task, positive_note
from keyhole.tasks.label_text import SEPARATOR

FRUIT = Task("fruit", "multiclass", ("apple", "pear", "plum"))
TUMOUR = Task("tumour", "binary", ("no", "yes"))
TAGS = Task("tags", "multilabel", ("bird", "fish", "horse"))
AGE = Task("age", "regression", mean=50.0, std=10.0)
ALL = (FRUIT, TUMOUR, TAGS, AGE)

names = st.text(st.characters(blacklist_characters="|", blacklist_categories=("Z", "C")), min_size=1, max_size=6)
logits = hnp.arrays(np.float32, (4, 3), elements=st.floats(-2e4, 2e4, width=32))


@pytest.mark.parametrize(
    ("texts", "kind", "classes"),
    [
        (["b", "a", "", "c"], "multiclass", ("a", "b", "c")),
        (["yes", "no", "yes"], "binary", ("no", "yes")),
        (["1", "0", "0"], "binary", ("0", "1")),
        (["10", "9", "8"], "multiclass", ("8", "9", "10")),
        (["1.0", "0.0", "2.0"], "multiclass", ("0.0", "1.0", "2.0")),
        (["0.5", "1.5", ""], "regression", ()),
        ([str(n) for n in range(20)], "multiclass", tuple(str(n) for n in range(20))),
        ([str(n) for n in range(21)], "regression", ()),
        (["-1e3", "2.5e-1"], "regression", ()),
        (["a|b", "c", "|"], "multilabel", ("a", "b", "c")),
        (["10_2", "10_3", "10_4"], "multiclass", ("10_2", "10_3", "10_4")),
    ],
)
def test_kind_and_classes_follow_from_the_labels(texts: list[str], kind: str, classes: tuple[str, ...]) -> None:
    task = infer_task("x", texts)
    assert (task.kind, task.classes) == (kind, classes)


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        ("metastasis normal", "metastasis"),
        ("Negative Positive", "Positive"),
        ("defect ok", "defect"),
        ("FALSE TRUE", "TRUE"),
        ("non-tumor tumor", "tumor"),
        ("nontumour tumour", "tumour"),
        ("no_crack crack", "crack"),
        ("normal zebra", "zebra"),
        ("OK not_ok", "not_ok"),
        ("control case", "case"),
        ("MSI-H MSS", "MSI-H"),
        ("0 1", "1"),
        ("1 2", "2"),
        ("-1 1", "1"),
        ("cat dog", "dog"),
        ("positive true", "true"),
    ],
)
def test_the_positive_class_follows_from_the_names_or_is_the_second(labels: str, positive: str) -> None:
    task = infer_task("x", labels.split())
    assert task.positive == positive
    assert infer_task("x", labels.split()[::-1]) == task
    for name in task.classes:
        named = infer_task("x", labels.split(), f"binary:{name}")
        assert named.positive == named.classes[1] == name
        assert named.encode(name).tolist() == [1]
        assert positive_note(named, f"binary:{name}") is None


def test_a_positive_class_that_neither_user_nor_names_choose_is_told_with_the_way_to_change_it() -> None:
    note = positive_note(infer_task("pet", ["cat", "dog"]))
    assert note == (
        "pet: the positive class is 'dog', the second in order; --data.tasks pet=binary:cat takes the other"
    )
    assert positive_note(infer_task("x", ["defect", "ok"])) is None
    assert positive_note(infer_task("x", ["a", "b", "c"])) is None


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("binary:dgo", "x: no label is 'dgo' (did you mean 'dog'?); they are cat, dog"),
        ("multiclass:dog", "x=multiclass:dog: expected x=binary:CLASS; only a binary task has a positive class"),
        ("binary:", "x=binary:: expected x=binary:CLASS"),
        ("binray:dog", "no such kind (did you mean 'binary'?)"),
    ],
)
def test_a_wrong_positive_class_is_one_line(kind: str, says: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        infer_task("x", ["cat", "dog"], kind)
    assert says in str(caught.value)


@given(st.lists(names, min_size=2, max_size=8, unique=True), st.randoms())
@settings(deadline=None, max_examples=50)
def test_classes_do_not_depend_on_row_order(labels: list[str], random: object) -> None:
    shuffled = labels * 2
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert infer_task("x", labels, "multiclass") == infer_task("x", shuffled, "multiclass")


@given(st.lists(names, min_size=2, max_size=8, unique=True))
@settings(deadline=None, max_examples=50)
def test_every_class_survives_text_to_target_to_label(labels: list[str]) -> None:
    task = infer_task("x", labels, "multiclass")
    for label in labels:
        assert task.label(np.eye(len(task.classes))[int(task.encode(label)[0])]) == label


@given(st.sets(st.sampled_from(TAGS.classes), min_size=1))
def test_multilabel_text_survives_in_any_order(labels: set[str]) -> None:
    assert set(TAGS.label(TAGS.encode(SEPARATOR.join(labels))).split(SEPARATOR)) == labels


def test_kind_given_overrides_the_inferred_one() -> None:
    assert infer_task("x", ["1", "2", "3"], "regression").kind == "regression"
    assert infer_task("x", ["a", "b"], "multiclass").kind == "multiclass"
    assert infer_task("x", ["a", "b"], "multilabel").classes == ("a", "b")


def test_empty_is_unknown_and_a_lone_separator_is_none_of_them() -> None:
    for task in ALL:
        assert np.isnan(task.encode("  ")).all()
        assert task.encode("").shape == (task.target_width,)
    assert TAGS.encode("|").tolist() == [0, 0, 0]
    assert TAGS.encode(" horse| bird |").tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("texts", "kind", "says"),
    [
        (["", " "], None, "no image has a label"),
        (["a", "a"], None, "all labels are 'a'"),
        (["a", "a"], "binary", "all labels are 'a'"),
        (["a", "b", "c"], "binary", "3 classes"),
        (["1", "two"], "regression", "'two' is not a finite number"),
        (["1", "inf"], "regression", "'inf' is not a finite number"),
        (["1", "1e39"], "regression", "'1e39' is not a finite number"),
        (["1.5", "2.5", "NaN"], None, "'NaN' among numbers"),
        (["1", "1.0", "2"], None, "1, 1.0 are one number"),
        (["|"], None, "nothing to learn"),
    ],
)
def test_labels_that_pose_no_task_are_refused_in_one_line(texts: list[str], kind: str | None, says: str) -> None:
    with pytest.raises(DataError) as caught:
        infer_task("x", texts, kind)
    assert says in str(caught.value)
    assert str(caught.value).startswith("x: ")
    assert "\n" not in str(caught.value)


def test_unknown_kind_and_class_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'multilabel'"):
        infer_task("x", ["a", "b"], "multilable")
    with pytest.raises(
        DataError, match=r"unknown class 'Pearr' \(did you mean 'pear'\?\); the classes are apple, pear"
    ):
        FRUIT.encode("Pearr")
    with pytest.raises(DataError, match="tags: unknown class 'rock'; the classes are bird, fish, horse"):
        TAGS.encode("bird|rock")


@given(logits)
@settings(deadline=None)
def test_probabilities_are_probabilities_and_the_label_is_their_largest(x: np.ndarray) -> None:
    p = FRUIT.probability(x)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-12)
    assert p[0][FRUIT.classes.index(FRUIT.label(p[0]))] == p[0][np.argmax(x[0])]
    pair = TUMOUR.probability(x[:, :1])
    assert pair.shape == (4, 2)
    np.testing.assert_allclose(pair.sum(axis=1), 1, atol=1e-12)
    assert TUMOUR.label(pair[0]) == ("yes" if pair[0, 1] > pair[0, 0] else "no")
    some = TAGS.probability(x)
    assert ((some >= 0) & (some <= 1)).all()
    np.testing.assert_array_equal(FRUIT.probability(x[0]), p[0])


def test_regression_gives_the_value_in_its_own_unit() -> None:
    assert AGE.probability([1.5]).tolist() == [65.0]
    assert AGE.label([65.4321987]) == "65.4322"


def test_fitting_standardises_the_known_values() -> None:
    values = np.array([3.0, 5.0, np.nan, 7.0])
    task = Task("age", "regression").fit(values)
    known = values[~np.isnan(values)]
    assert (task.mean, task.std) == (known.mean(), known.std())
    assert AGE.fit([0.1, 0.1, 0.1]).std == 1
    assert AGE.fit([0.0]).std == 1
    with pytest.raises(DataError, match="no training image has a value"):
        AGE.fit([np.nan])


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.kind)
def test_a_task_survives_json(task: Task) -> None:
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


@pytest.mark.parametrize(
    "change", [{"kind": "ternary"}, {"classes": ["a"]}, {"std": 0.0}, {"mean": None}, {"classes": ["a", "a"]}]
)
def test_a_wrong_description_is_one_line(change: dict[str, object]) -> None:
    with pytest.raises(RunError, match="a task is described wrongly"):
        Task.from_json({**TUMOUR.to_json(), **change})
    with pytest.raises(RunError, match="no 'kind'"):
        Task.from_json({"name": "x"})


def test_logits_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        FRUIT.probability(np.zeros((2, 4)))
