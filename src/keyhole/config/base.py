"""The base of all settings: frozen, and checked when they are made, with errors of one line; amounts such as 5GB."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    InstanceOf,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from keyhole.errors import ConfigError
from keyhole.util.wording import nearest


class Contradiction(ConfigError):  # noqa: N818 - says what is wrong
    """Values of two settings that exclude each other, although each is valid."""


class Settings(BaseModel):
    """Base of all settings and of the options of the command line: frozen, and checked when they are made.

    Raises:
        ConfigError: an unknown name (the nearest is given), a wrong type or value, or values that exclude each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, given: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(given, Mapping):  # a `Run` stands for its folder
            given = {name: _plain_path(value) for name, value in given.items()}
        try:
            return check(given)
        except ValidationError as error:
            raise ConfigError(explain(cls, error)) from error

    def replace(self, **changes: Any) -> Self:
        """Return a copy with changed settings; a mapping changes only the settings of a section that it names.

        >>> from keyhole import Config
        >>> config = Config().replace(patch={"size": 50}, memory="5GB")
        >>> config.patch.size, config.patch.edge, config.memory
        (50, 'auto', 5000000000)
        """
        merged = dict(self)
        for name, value in changes.items():
            old = merged.get(name)
            if isinstance(old, Settings) and isinstance(value, Mapping):
                value = old.replace(**{str(key): each for key, each in value.items()})
            if value is not None or not isinstance(old, Settings):  # in YAML a section without keys is null
                merged[name] = value
        return type(self)(**merged)


def _plain_path(value: Any) -> Any:
    return Path(value) if isinstance(value, os.PathLike) and isinstance(os.fspath(value), str) else value


EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "model_type": "a section of settings",
}
"""What is expected, by the type of pydantic's error, where its own words are for programmers."""


def explain(kind: type, error: ValidationError, name: str = "") -> str:
    """Return the first error that pydantic found in the model `kind`, as one line; `name` replaces the setting's."""
    errors = error.errors(include_url=False)
    first, key = errors[0], "".join(map(str, errors[0]["loc"][:1]))
    section = kind.__name__.removesuffix("Config").lower() if kind.__name__.endswith("Config") else ""
    path = f"{section}.{key}".strip(".")
    if first["type"] in ("extra_forbidden", "invalid_key"):
        prefix = section and f"{section}."
        return f"unknown key `{path}`{nearest(key, getattr(kind, 'model_fields', ()), prefix, quote='`')}"
    # a union has an error for each of its types
    same = [each for each in errors if name or each["loc"][:1] == first["loc"][:1]]
    expected = ", or ".join(dict.fromkeys(map(_expected, same)))
    hint = ""
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        hint = nearest(first["input"], re.findall(r"'([^']+)'", first["ctx"]["expected"]))
    return f"{name or path}: expected {expected}, got {got(first['input'])}{hint}"


def _expected(error: Any) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    words = str(EXPECTED.get(error["type"]) or error["msg"].removeprefix("Input should be "))
    return f"a number {words}" if words.startswith(("greater", "less")) else words


def got(value: object) -> str:
    """Return a value as a message shows it."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...") + " (text)"
    if isinstance(value, list | tuple):
        return f"the list {list(value)!r}"[:80]
    return str(value)[:60]


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
