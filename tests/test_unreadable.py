"""The ledger of unreadable patches counts each once, lists all, and says clearly when it is too much."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyhole.config.base import parse_share
from keyhole.config.settings import Config
from keyhole.errors import ConfigError, KeyholeError
from keyhole.loading.unreadable import COLUMNS, Ledger, TooMuchUnreadable


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("1%", 0.01),
        ("0.5 %", 0.005),
        (" 0.01 ", 0.01),
        ("0", 0.0),
        ("0%", 0.0),
        ("100%", 1.0),
        (".5%", 0.005),
        (0.02, 0.02),
    ],
)
def test_shares_that_are_understood(text: str | float, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text", ["", "%", "one", "-1%", "101%", "1.5", "nan", "nan%", "inf", "1%%", "1 % x", "-0.1", "1", "5"]
)
def test_what_is_no_share_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^unreadable: expected a share such as 1% or 0\.01, from 0 to 100%"):
        Config(unreadable=text)


def test_a_plain_number_that_could_be_percent_is_asked_back() -> None:
    with pytest.raises(ConfigError, match="if you mean percent: 5%"):
        Config(unreadable="5")


BOXES = [[0, 0, 8, 8], [8, 0, 8, 8], [16, 0, 8, 8]]


def test_each_patch_is_counted_once_and_a_lost_image_with_all_of_its_patches() -> None:
    ledger = Ledger(1000, 0.01)
    ledger.add("a", BOXES, [0, 1, 2], ["x"] * 3)
    ledger.add("a", np.array(BOXES[1:]), np.array([1, 2]), ["y"] * 2)
    ledger.add("b", BOXES[:1], [0], ["x"])
    assert ledger.count == 4
    ledger.lose("a", 10, "gone")
    ledger.lose("a", 10, "gone again")
    ledger.add("a", BOXES, [0, 1, 2], ["x"] * 3)
    assert ledger.count == 11
    assert [row["image"] for row in ledger.rows()] == ["a", "b"]


@given(st.integers(1, 10**6), st.integers(0, 10**4))
def test_just_as_many_as_allowed_is_not_too_much_and_one_more_is(total: int, parts: int) -> None:
    allowed = total * parts // 10**4
    ledger = Ledger(total, parse_share(f"{parts / 100}%"))
    ledger.lose("a", allowed, "gone")
    ledger.check()
    ledger.add("b", BOXES[:1], [3], ["x"])
    if allowed < total:
        with pytest.raises(TooMuchUnreadable):
            ledger.check()


def test_with_zero_percent_the_first_is_too_much() -> None:
    ledger = Ledger(10**6, 0.0)
    ledger.check()
    ledger.add("a", BOXES[:1], [0], ["x"])
    with pytest.raises(TooMuchUnreadable):
        ledger.check()


def test_the_message_says_how_many_where_and_what_to_do() -> None:
    ledger = Ledger(1000, 0.01)
    ledger.add("slides/a.svs", BOXES, [4, 5, 6], ["x"] * 3)
    ledger.lose("slides/b.svs", 20, "gone")
    with pytest.raises(TooMuchUnreadable) as caught:
        ledger.check("run/unreadable.csv")
    assert isinstance(caught.value, KeyholeError)
    assert str(caught.value) == (
        "23 of 1,000 patches cannot be read (2.3 %), but --unreadable allows 1 %: slides/b.svs (whole), "
        "slides/a.svs at 0,0, slides/a.svs at 8,0, .... The first: gone. All are listed in run/unreadable.csv. "
        "Copy these files again, or raise --unreadable"
    )


def test_the_list_has_a_row_for_each_lost_image_and_each_patch() -> None:
    ledger = Ledger(1000, 0.5)
    ledger.add("a", BOXES[1:2], [4], ["torn"])
    ledger.lose("b", 20, "gone")
    assert [list(row) for row in ledger.rows()] == [list(COLUMNS)] * 2
    assert [list(row.values()) for row in ledger.rows()] == [
        ["b", "", "20", "", "", "", "", "gone"],
        ["a", "4", "1", "8", "0", "8", "8", "torn"],
    ]
