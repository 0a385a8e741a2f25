"""Amounts that users write as text, such as 5GB and 1%."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, InstanceOf, PlainSerializer

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Bytes(int):
    """A number of bytes that a user gave with its unit.

    >>> print(Bytes(5 * 10**9), Bytes(2**32), Bytes(1_500_000_000))
    5GB 4GiB 1500MB
    """

    def __str__(self) -> str:
        for unit in sorted(UNITS, key=lambda unit: -UNITS[unit]):
            if self % UNITS[unit] == 0:
                return f"{self // UNITS[unit]}{unit.upper().replace('I', 'i')}B"
        raise AssertionError("every number is a multiple of 1")


class Portion(float):
    """A share from 0 to 1 that a user gave, with or without a percent sign.

    >>> print(Portion(0.01), Portion(0.3), Portion(1))
    1% 30% 100%
    """

    def __str__(self) -> str:
        percent = f"{self * 100:g}%"
        return percent if parse_share(percent) == self else repr(float(self))


ONE_PERCENT = Portion(0.01)


def parse_memory(given: Any) -> Bytes | None:
    """Return the bytes of `5GB`, `4GiB` or `1.5g`; None for `auto`. The text of a ValueError says what is expected."""
    if given is None or isinstance(given, Bytes):
        return given
    text = str(given).strip().lower()
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?)?(b?)", text)
    # one user takes a bare number for GB, another for bytes
    if match is None or not (match[2] or match[3]) or float(match[1]) == 0:
        raise ValueError("`auto` or a size with its unit, such as 5GB, 4GiB or 800MB")
    return Bytes(math.floor(float(match[1]) * UNITS[match[2] or ""]))


def parse_share(given: Any) -> Portion:
    """Return the share, from 0 to 1, of `1%` or `0.01`; a number from 1 without % is a ValueError: is it percent?"""
    if isinstance(given, Portion):
        return given
    text = str(given).strip()
    expected = "a share such as 1% or 0.01, from 0 to 100%"
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(expected) from None
    share = number / 100 if text.endswith("%") else number
    if not text.endswith("%") and 1 <= number <= 100:
        raise ValueError(f"{expected} (if you mean percent: {text}%)")
    if not 0 <= share <= 1:
        raise ValueError(expected)
    return Portion(share)


Memory = Annotated[
    InstanceOf[Bytes] | None,
    BeforeValidator(parse_memory),
    PlainSerializer(lambda size: "auto" if size is None else str(size)),
]
"""A budget of memory; None is what is free."""
Share = Annotated[InstanceOf[Portion], BeforeValidator(parse_share), PlainSerializer(str)]
