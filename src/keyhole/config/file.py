"""Configuration from YAML and back: every value checked, every mistake named with its nearest right spelling.

Precedence: default < recipe < `--config` file < flags. `resolve` does the first three; the command line adds the flags.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from keyhole.config.check import check_value, got, leaves, validate
from keyhole.config.docstrings import field_texts
from keyhole.config.settings import Config
from keyhole.errors import ConfigError
from keyhole.util.wording import nearest

__all__ = [
    "build",
    "configuration",
    "dump_config",
    "load_config",
    "parse_config",
    "read_config",
    "read_recipe",
    "recipes",
    "resolve",
    "validate",
]

MAX_BYTES = 1_000_000
"""A configuration is a few kilobytes; a larger file is something else."""


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which a key given twice and aliases (a way to write a small file that grows) are errors."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*) are not taken", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


# YAML 1.1 reads 1e-3 as text, 12:30 and 010 as other numbers and 2025-01-01 as a date; none of it is what a user means.
_NUMBERS = {
    "int": r"[-+]?(0|[1-9]\d*)",
    "float": r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in (*_NUMBERS, "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _name, _pattern in _NUMBERS.items():
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"({_pattern})\Z"), list("-+.0123456789"))


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {_one_line(error.problem or error)}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: not valid YAML: {_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: not a configuration: sections within sections without end") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected sections such as `patch:`, got {got(raw)}")
    return raw


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


# --- reading ---------------------------------------------------------------------------------------------------------


def read_config(path: str | Path) -> dict[str, Any]:
    """The values that a YAML file gives, nested as in `Config`, each checked; what it leaves out is not there.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest is named), a wrong type or range.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such configuration file" if not path.exists() else f"{path}: not a file")
        data = path.read_bytes() if path.stat().st_size <= MAX_BYTES else None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data is None:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes; a configuration has a few thousand")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text (byte {error.start} is not UTF-8); expected a YAML file") from error
    return _section(Config, _parse(text, str(path)), str(path), "")


def load_config(path: str | Path) -> Config:
    """The configuration of a YAML file, defaults filled in. Raises ConfigError as `read_config` and `validate` do."""
    config = build(Config(), read_config(path))
    return validate(config, source=f"{path}: ")


def parse_config(text: str, source: str) -> Config:
    """The configuration of a YAML text, defaults filled in. Raises ConfigError as `load_config` does."""
    return validate(build(Config(), _section(Config, _parse(text, source), source, "")), source=f"{source}: ")


def recipes() -> dict[str, str]:
    """Name and first line of each recipe that comes with keyhole."""
    folder = resources.files("keyhole.config.recipes")
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text("utf-8").splitlines()[0].lstrip("# ") for entry in found}


def read_recipe(name: str) -> dict[str, Any]:
    """The values that a recipe gives. Raises ConfigError naming the nearest recipe if there is none of this name."""
    names = recipes()
    if name not in names:
        raise ConfigError(
            f"--recipe: there is no recipe {name!r}{nearest(name, names, quote='`')}; there are {', '.join(names)}"
        )
    text = (resources.files("keyhole.config.recipes") / f"{name}.yaml").read_text("utf-8")
    return _section(Config, _parse(text, f"recipe {name}"), f"recipe {name}", "")


def resolve(recipe: str | None = None, config_path: str | Path | None = None, base: Config | None = None) -> Config:
    """`base` (the defaults) under the recipe under the file; cross-field rules are for `validate`, after the flags."""
    config = base or Config()
    if recipe is not None:
        config = build(config, read_recipe(recipe))
    if config_path is not None:
        config = build(config, read_config(config_path))
    return config


def configuration(data: str | Path | Mapping[str, Any] | Config, settings: Mapping[str, Any]) -> Config:
    """The configuration that a function of the API is called with, not yet validated.

    Args:
        data: the data, their section as a mapping, or a whole configuration.
        settings: sections over it; and, where `data` is not a whole configuration, `recipe` and `config` under them.
    """
    given = dict(settings)
    if not isinstance(data, Config):
        section = dict(data) if isinstance(data, Mapping) else {"path": str(data)}
        return build(resolve(given.pop("recipe", None), given.pop("config", None)), {**given, "data": section})
    for name in ("recipe", "config"):
        if given.pop(name, None) is not None:
            raise ConfigError(
                f"{name}: not beside a whole Config, which has all settings; leave it out, or give the data"
            )
    return build(data, given)


def build(config: Config, given: Mapping[str, Any], source: str = "settings") -> Config:
    """`config` with the values `given`, nested as in `Config`, put over it.

    Args:
        config: what holds where nothing is given.
        given: sections as mappings (or as their dataclasses).
        source: where the values come from, for messages.

    Raises:
        ConfigError: an unknown name (the nearest is named), a wrong type or range.
    """
    changes = {
        key: dataclasses.replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in _section(Config, given, source, "").items()
    }
    return dataclasses.replace(config, **changes)


def _section(kind: type, raw: Mapping[Any, Any], source: str, prefix: str) -> dict[str, Any]:
    """The values of `raw`, each checked against the fields of the dataclass `kind`."""
    hints = get_type_hints(kind, include_extras=True)
    checked: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"{source}: unknown key `{name}`{nearest(str(key), hints, prefix, quote='`')}")
        if not dataclasses.is_dataclass(hints[key]):
            checked[key] = check_value(hints[key], value, f"{source}: {name}")
        elif isinstance(value, _as_type(hints[key])):
            checked[key] = value
        elif isinstance(value, Mapping):
            checked[key] = _section(_as_type(hints[key]), value, source, f"{name}.")
        elif value is not None:  # a section with every line commented out reads as null
            raise ConfigError(f"{source}: {name}: expected a section of keys, got {got(value)}")
    return checked


def _as_type(hint: Any) -> type:
    assert isinstance(hint, type)
    return hint


# --- writing ---------------------------------------------------------------------------------------------------------


def dump_config(config: Config, comments: bool = False, notes: Mapping[str, str] | None = None) -> str:
    """YAML that `load_config` reads back to an equal configuration.

    Args:
        config: what to write; paths are written as they are.
        comments: write the reason for each option above it.
        notes: further reasons by dotted name, such as what was measured; written with `comments`.
    """
    lines: list[str] = []
    reasons = _reasons() if comments else {}
    section = ""
    for path, _, value in leaves(config):
        head, _, key = path.rpartition(".")
        if head != section:
            section = head
            lines += [""] * comments + [f"{head}:" + (f"  # {reasons[head]}" if comments else "")]
        indent = "  " if head else ""
        if comments:
            lines += [f"{indent}# {line}" for line in _wrap(reasons[path])]
            lines += [f"{indent}# -> {line}" for line in _wrap((notes or {}).get(path, ""))]
        lines.append(f"{indent}{key}: {_scalar(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def _scalar(value: Any) -> str:
    plain: Any = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    texts = [text for text in (plain if isinstance(plain, list) else [plain]) if isinstance(text, str)]
    style = None if all(text.isprintable() for text in texts) else '"'  # only this style escapes line separators
    text: str = yaml.dump(
        plain, Dumper=_Dumper, default_flow_style=True, default_style=style, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")


def _wrap(text: str, width: int = 110) -> list[str]:
    return textwrap.wrap(text, width)


@cache
def _reasons() -> dict[str, str]:
    """The texts under the classes and fields of config.py, by dotted name."""
    hints = get_type_hints(Config)
    found = field_texts(Config)
    for section in (name for name, kind in hints.items() if dataclasses.is_dataclass(kind)):
        kind = _as_type(hints[section])
        found[section] = " ".join((kind.__doc__ or "").split())
        found |= {f"{section}.{key}": text for key, text in field_texts(kind).items()}
    return found
