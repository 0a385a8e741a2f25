"""Configuration from YAML and back, and the recipes.

Precedence: default < recipe < `--config` file < flags. `resolve` does the first three; the command line adds the flags.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from keyhole.config.base import Contradiction, Settings, got
from keyhole.config.settings import Config
from keyhole.errors import ConfigError
from keyhole.util.wording import nearest

MAX_BYTES = 1_000_000
"""Maximum size of a configuration file, which has a few kilobytes."""


class _Loader(yaml.SafeLoader):
    """Reads safe YAML; duplicate keys and aliases, with which a small file can grow without limit, are errors."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*) are not supported", problem_mark=mark)
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


# YAML 1.1 reads 1e-3 as text, 12:30 and 010 as other numbers and 2025-01-01 as a date; users expect otherwise.
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
        raise ConfigError(f"{source}{where}: not valid YAML: {_flat(error.problem or error)}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: not valid YAML: {_flat(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: not a configuration: sections are nested too deeply") from error
    if not isinstance(raw, dict | None):
        raise ConfigError(f"{source}: expected sections such as `patch:`, got {got(raw)}")
    return raw or {}


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the values that a YAML file gives, nested as in `Config`, each checked."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such configuration file" if not path.exists() else f"{path}: not a file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes; a configuration has a few thousand")
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text (byte {error.start} is not UTF-8); expected a YAML file") from error
    return _checked(text, str(path))


def _checked(text: str, source: str) -> dict[str, Any]:
    """Return the values of a YAML text and check each alone, since another source may resolve a contradiction."""
    values = _parse(text, source)
    try:
        for name, value in values.items():
            with contextlib.suppress(Contradiction):
                Config().replace(**{str(name): value})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return values


def load_config(path: str | Path) -> Config:
    """Return the configuration of a YAML file, with defaults filled in."""
    return _config(read_config(path), str(path))


def parse_config(text: str, source: str) -> Config:
    """Return the configuration of a YAML text, with defaults filled in."""
    return _config(_checked(text, source), source)


def _config(values: Mapping[str, Any], source: str) -> Config:
    try:
        return Config().replace(**values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def recipes() -> dict[str, str]:
    """Return name and first line of each recipe that comes with keyhole."""
    folder = resources.files("keyhole.config.recipes")
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text("utf-8").splitlines()[0].lstrip("# ") for entry in found}


def read_recipe(name: str) -> dict[str, Any]:
    """Return the values that a recipe gives; the error for an unknown name suggests the nearest."""
    names = recipes()
    if name not in names:
        raise ConfigError(
            f"--recipe: there is no recipe {name!r}{nearest(name, names, quote='`')}; there are {', '.join(names)}"
        )
    return _checked((resources.files("keyhole.config.recipes") / f"{name}.yaml").read_text("utf-8"), f"recipe {name}")


def merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values in which each source overrides those before it."""
    found: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            old = found.get(name)
            found[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def given_values(recipe: str | None = None, config_path: str | Path | None = None) -> dict[str, Any]:
    """Return the values of a recipe and of a file over it; they may still contradict each other."""
    under = {} if recipe is None else read_recipe(recipe)
    return under if config_path is None else merged(under, read_config(config_path))


def resolve(recipe: str | None = None, config_path: str | Path | None = None) -> Config:
    """Return the configuration of a recipe and of a file over it."""
    return Config().replace(**given_values(recipe, config_path))


def configuration(data: str | Path | Mapping[str, Any] | Config, settings: Mapping[str, Any]) -> Config:
    """Return the configuration from the arguments of `keyhole.train`.

    `settings` are sections that override those of `data`, and, unless `data` is a whole Config, `recipe` and `config`,
    which all others override.
    """
    given = dict(settings)
    recipe, file = given.pop("recipe", None), given.pop("config", None)
    if not isinstance(data, Config):
        section = data if isinstance(data, Mapping) else {"path": str(data)}
        return Config().replace(**merged(given_values(recipe, file), given, {"data": section}))
    if recipe is not None or file is not None:
        name = "config" if recipe is None else "recipe"
        raise ConfigError(f"{name}: not beside a whole Config, which has all settings; leave it out, or give the data")
    return data.replace(**given)


def leaves(config: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting."""
    for name, value in config:
        if isinstance(value, Settings):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def dump_config(config: Config, comments: bool = False, notes: Mapping[str, str] | None = None) -> str:
    """Return YAML that `load_config` reads back to an equal configuration.

    With `comments`, a comment above each option gives its help, and its reason from `notes` (by dotted name).
    """
    lines: list[str] = []

    def write(model: Settings, section: str) -> None:
        indent = "  " if section else ""
        for key, value in model.model_dump(exclude=set(dict(_sections(model)))).items():
            if comments:
                about, note = type(model).model_fields[key].description, (notes or {}).get(f"{section}.{key}")
                lines.extend(f"{indent}# {line}" for line in textwrap.wrap(_flat(about), 110))
                lines.extend(f"{indent}# -> {line}" for line in textwrap.wrap(_flat(note), 110))
            lines.append(f"{indent}{key}: {_scalar(value)}")

    write(config, "")
    for name, section in _sections(config):
        lines.extend(["", f"{name}:  # {_flat(type(section).__doc__)}"] if comments else [f"{name}:"])
        write(section, name)
    return "\n".join(lines) + "\n"


def _sections(config: Settings) -> Iterator[tuple[str, Settings]]:
    return ((name, value) for name, value in config if isinstance(value, Settings))


def _scalar(value: Any) -> str:
    plain: Any = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    texts = [text for text in (plain if isinstance(plain, list) else [plain]) if isinstance(text, str)]
    style = None if all(text.isprintable() for text in texts) else '"'  # only this style escapes line separators
    text: str = yaml.dump(
        plain, Dumper=_Dumper, default_flow_style=True, default_style=style, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")


def _flat(text: object) -> str:
    return " ".join(str(text or "").split())
