"""Every option of a configuration: what it takes in words, whether a value fits, and whether values fit each other."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from keyhole.config.settings import Config, Quantity
from keyhole.errors import ConfigError
from keyhole.util.wording import nearest

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def check_value(kind: Any, value: Any, name: str) -> Any:
    """`value` as the type `kind` (a list as a tuple, text as a path), or a ConfigError that says what was expected."""
    inner, _ = _unwrap(kind)
    if isinstance(value, list) and get_origin(inner) is tuple:
        converted: Any = tuple(value)
    elif isinstance(value, str) and inner is Path:
        converted = Path(value)
    elif kind is Quantity and isinstance(value, int | float) and not isinstance(value, bool):
        converted = f"{value:g}"
    else:
        converted = value
    try:
        if any("\0" in str(text) for text in (value if isinstance(value, list | tuple) else [value])):
            raise ConfigError(f"{name}: expected {describe(kind)}, got text with a zero byte")
        if isinstance(value, bool) and inner is not bool:  # to Python, true is 1
            raise ConfigError(f"{name}: expected {describe(kind)}, got {got(value)}")
        return _adapter(kind).validate_python(converted, strict=True)
    except ValueError as error:
        raise ConfigError(f"{name}: expected {describe(kind)}, got {got(value)}") from error


def is_none(kind: Any, words: Sequence[str]) -> bool:
    """Whether the words of an option on the command line say that it has no value."""
    return _unwrap(kind)[1] and list(words) in (["none"], ["None"])


def check_text(kind: Any, text: str, name: str) -> None:
    """Raises ConfigError if `text`, as written on the command line, is not a `kind`."""
    inner, optional = _unwrap(kind)
    if get_origin(inner) is tuple:
        inner = get_args(inner)[0]
    if optional and text in ("None", "none"):
        return
    if get_origin(inner) is Literal:
        wrong = text not in map(str, get_args(inner))
        hint = nearest(text, map(str, get_args(inner)), quote="") if wrong else ""
    else:
        hint = ""
        try:
            _adapter(inner).validate_strings(text)
            wrong = "\0" in text
        except ValueError:
            wrong = True
    if wrong:
        raise ConfigError(f"{name}: expected {describe(inner)}, got {text!r}{hint}")


def validate(config: Config, flags: bool = False, source: str = "") -> Config:
    """`config` itself if every value and every pair of values makes sense.

    Args:
        config: a whole configuration, wherever its values came from.
        flags: name options as on the command line, `--patch.size` and not `patch.size`.
        source: put before the message, such as the file's name.

    Raises:
        ConfigError: the first thing that is wrong, naming the option, what was expected and what came.
    """

    def name(path: str) -> str:
        return "--" + path.replace("_", "-") if flags else path

    for path, kind, value in leaves(config):
        check_value(kind, value, source + name(path))
    for problem in _contradictions(config, name):
        raise ConfigError(source + problem)
    return config


def _contradictions(config: Config, name: Callable[[str], str]) -> Iterator[str]:
    """What is wrong between options, or with one that a type cannot describe."""
    data, patch, model, train = config.data, config.patch, config.model, config.train
    if patch.level is not None and patch.mpp is not None:
        both = f"{name('patch.level')} (={patch.level}) and {name('patch.mpp')} (={patch.mpp})"
        yield f"{both} exclude each other: drop one"
    if data.val + data.test >= 1:
        yield (
            f"{name('data.val')} (={data.val}) and {name('data.test')} (={data.test}) must leave images to learn from: "
            "their sum must be below 1"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.run.device):
        yield f"{name('run.device')}: expected auto, cpu, cuda or cuda:1 (a number), got {config.run.device!r}"
    if not model.encoder.strip():
        yield f"{name('model.encoder')}: expected `small` or the name of a timm model, got nothing"
    if model.encoder == "small" and model.pretrained:
        yield (
            f"{name('model.pretrained')}: the encoder `small` has no pretrained weights; "
            f"name a timm model with {name('model.encoder')}, or leave this off"
        )
    if model.pretrained and model.weights is not None:
        yield f"{name('model.pretrained')} and {name('model.weights')} exclude each other: drop one"
    if config.select.rule == "streaming" and config.select.chunk is None:
        yield (
            f"{name('select.rule')} streaming keeps other patches with other chunks: give {name('select.chunk')}, "
            "the I of the published method"
        )
    if train.warmup > train.epochs:
        yield (
            f"{name('train.warmup')} (={train.warmup:g}) must not exceed {name('train.epochs')} (={train.epochs}): "
            "the full rate would never be reached"
        )


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, value) of every option."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name], value


def describe(kind: Any) -> str:
    """What a type takes, in words: `a whole number above 0`."""
    inner, optional = _unwrap(kind)
    if kind is Quantity:
        return "a number, with a unit where it has one"
    if optional:
        return f"{describe(inner)} or none"
    if get_origin(inner) in (Union, types.UnionType):  # a number or `auto`
        return ", or ".join(
            str(get_args(arg)[0]) if get_origin(arg) is Literal else describe(arg) for arg in get_args(inner)
        )
    limits = ""
    if get_origin(inner) is Annotated:
        inner, *rules = get_args(inner)
        limits = "".join(words for rule in rules for words in _limits(rule))
    if get_origin(inner) is Literal:
        return "one of " + ", ".join(map(str, get_args(inner)))
    if get_origin(inner) is tuple:
        return f"a list, each {describe(get_args(inner)[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words[inner] + limits


def _limits(rule: object) -> Iterator[str]:
    parts = list(rule) if isinstance(rule, Interval) else [rule]
    for part in parts:
        match part:
            case Gt(gt=limit):
                yield f" above {limit:g}"
            case Ge(ge=limit):
                yield f" of at least {limit:g}"
            case Lt(lt=limit):
                yield " that is finite" if limit == float("inf") else f" below {limit:g}"
            case Le(le=limit):
                yield f" of at most {limit:g}"


def _unwrap(kind: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether None was allowed."""
    if get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind):
        inner = [arg for arg in get_args(kind) if arg is not type(None)]
        assert len(inner) == 1
        return inner[0], True
    return kind, False


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # here, since `--help` needs none of it

    return TypeAdapter(kind)


def got(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...") + " (text)"
    if isinstance(value, list | tuple):
        return f"the list {list(value)!r}"[:80]
    return str(value)[:60]
