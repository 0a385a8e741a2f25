"""From the words of a command line to checked options, which tyro makes from the fields of a model.

The docstring of the model is the description, and the texts under its fields are the help. Class variables say what is
shown:

    EXAMPLES    command lines
    POSITIONAL  arguments that are given without their name, each with the word that stands for it
    METAVARS    the word for the value of an option, where it is not that of its type
    ESSENTIAL   options that `--help` shows; without it, `--help` shows all
    IDLE        options, or sections with a dot at the end, that the verb accepts but does not use: never shown
    TEXTS       help of settings that mean something else here
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin

import tyro
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from keyhole.config.base import Bytes, Contradiction, Portion, Settings, explain
from keyhole.config.settings import Config, Location
from keyhole.errors import ConfigError
from keyhole.util.wording import nearest

HELP, HELP_ALL, PRINT = ("-h", "--help"), "--help-all", "print-config"
SHARED = ("device", "decode", "memory", "unreadable", "on-bad-image")
"""Options of `InferenceSettings`, which several verbs have: the help shows them last."""


class Options(Settings):
    """The options of a verb."""

    EXAMPLES: ClassVar[Sequence[str]] = ()
    POSITIONAL: ClassVar[Mapping[str, str]] = {}
    METAVARS: ClassVar[Mapping[str, str]] = {}
    ESSENTIAL: ClassVar[Sequence[str]] = ()
    IDLE: ClassVar[Sequence[str]] = ()
    TEXTS: ClassVar[Mapping[str, str]] = {}

    print_config: bool = False
    """Print the settings that result, as YAML, and end."""


class ConfigOptions(Options):
    """The options of a verb that takes all settings: where they come from, and each of them."""

    METAVARS: ClassVar = {"recipe": "NAME", "config": "FILE"}

    recipe: str | None = None
    """Settings that come with keyhole, under --config and flags: small, demo, slides, traffic, megapixel-mnist,
    camelyon16, camelyon16-features."""
    config: Location | None = None
    """YAML file with settings, such as `keyhole init` writes; flags override it."""
    settings: Config = Field(default_factory=Config)


class DataOptions(ConfigOptions):
    """The options of a verb that works on data."""

    POSITIONAL: ClassVar = {"source": "DATA"}

    source: Location | None = None
    """Folder of classes, or CSV with `image` and one column per task; the same as --data.path."""

    def check_data(self, verb: str) -> None:
        """Raise ConfigError where no data are given."""
        if self.settings.data.path is None:
            raise ConfigError(f"no data given: keyhole {verb} DATA, where DATA is a folder of classes or a CSV")


AnyOptions = TypeVar("AnyOptions", bound=Options)


def read(kind: type[AnyOptions], argv: Sequence[str], prog: str, base: Mapping[str, Any] | None = None) -> AnyOptions:
    """Return the options that a command line gives, over those of `--recipe` and `--config`, over `base`.

    Raises SystemExit when `--help` is printed.
    """
    given, under = parse(kind, argv, prog), dict(base or {})
    from keyhole.config.file import given_values, merged  # not for --help, which ends in `parse`

    if issubclass(kind, ConfigOptions):
        under = {"settings": merged(under, given_values(given.get("recipe"), given.get("config")))}
    if issubclass(kind, DataOptions) and "source" in given:
        given = merged(given, {"settings": {"data": {"path": given["source"]}}})
    try:
        return kind(**merged(under, given))
    except Contradiction as error:
        sections = "|".join(name for name, info in Config.model_fields.items() if _section(info))
        flags = re.sub(rf"\b({sections})\.[a-z_]+", lambda name: f"--{name[0].replace('_', '-')}", str(error))
        raise ConfigError(flags) from error


def print_config(config: Config) -> int:
    from keyhole.config.file import dump_config

    print(dump_config(config), end="")
    return 0


def print_options(options: Options) -> int:
    """Print the options of a verb whose settings are those of a run."""
    for name, value in options.model_dump(exclude={"print_config"}).items():
        print(f"{name}: {json.dumps(value, default=str, ensure_ascii=False)}")
    return 0


class Flag(NamedTuple):
    """An option."""

    name: str  # without dashes
    path: tuple[str, ...]  # names of the fields that lead to its value
    info: FieldInfo
    positional: str  # the word for a positional argument; empty for other options

    @property
    def many(self) -> bool:
        return get_origin(self.info.annotation) is tuple

    @property
    def pair(self) -> str:
        """The name that turns a switch off: only settings in a section have one."""
        section, _, name = self.name.rpartition(".")
        return f"{section}.no-{name}" if section and self.info.annotation is bool else ""


def flags_of(kind: type[Settings], path: tuple[str, ...] = (), prefix: str = "") -> Iterator[Flag]:
    """Yield every option of a model: positional ones, its own, those of other verbs too, then section by section."""
    words = kind.POSITIONAL if issubclass(kind, Options) else {}
    own = [
        Flag(f"{prefix}{name.rstrip('_')}".replace("_", "-"), (*path, name), info, words.get(name, ""))
        for name, info in kind.model_fields.items()
    ]
    yield from sorted(
        (flag for flag in own if _section(flag.info) is None),
        key=lambda flag: (not flag.positional, flag.name == PRINT, flag.name in SHARED),
    )
    for flag in own:
        if (section := _section(flag.info)) is not None:
            yield from flags_of(section, flag.path, "" if section is Config else f"{flag.name}.")


def _section(info: FieldInfo) -> type[Settings] | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


class _NotGiven(int):
    """Marks an option that the command line does not have. A number, since tyro takes any number as a default."""


NOT_GIVEN = _NotGiven()


def parse(kind: type[Options], argv: Sequence[str], prog: str) -> dict[str, Any]:
    """Return the values that a command line gives, nested as in `kind`."""
    options = argv[: argv.index("--")] if "--" in argv else argv
    if HELP_ALL in options or {*HELP}.intersection(options):
        _run_tyro(kind, ["--help"], prog, everything=HELP_ALL in options)
    flags = {flag.name: flag for flag in flags_of(kind)}
    switches = [flag for flag in flags.values() if flag.info.annotation is bool]
    for word in filter(_is_flag, options):
        written, equals, value = word.partition("=")
        if equals and any(written.removeprefix("--").replace("_", "-") in (flag.name, flag.pair) for flag in switches):
            raise ConfigError(f"{written}: takes no value, got {value!r}")  # to tyro, it would be positional
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given, unknown = _run_tyro(kind, argv, prog)
    except SystemExit as stop:  # the only check left to tyro
        option = re.search(r"--[a-z][\w.-]*", said.getvalue())
        raise ConfigError(f"{option[0] if option else prog}: a value is missing; see {prog} --help") from stop
    if named := [word for word in unknown if _is_flag(word) and word in options]:
        raise ConfigError(_unknown(kind, named[0].partition("=")[0], prog, flags.values()))
    places = {name: flag.positional for name, flag in flags.items() if flag.positional}
    if unknown:  # after options, where tyro takes no more positional ones
        last = [*places][-1] if places else ""
        if not last or not flags[last].many:
            raise ConfigError(f"unexpected argument `{unknown[0]}`; see {prog} --help")
        given[last] = (*given.get(last, ()), *_convert(flags[last], unknown))
    if missing := [place for name, place in places.items() if name not in given and flags[name].info.is_required()]:
        raise ConfigError(f"{missing[0]} is missing: {prog} {' '.join(places.values())}; see {prog} --help")
    nested: dict[str, Any] = {}
    for name, value in given.items():
        *sections, key = flags[name].path
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return nested


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _unknown(kind: type[Options], written: str, prog: str, flags: Any) -> str:
    """Return the message, with the nearest option: `--size` is near `--patch.size`."""
    known = [f"--{name}" for flag in flags if not flag.positional for name in (flag.name, flag.pair) if name]
    last = [name for name in known if name.rpartition(".")[2] == written.lstrip("-").replace("_", "-")]
    hint = f" (did you mean `{last[0]}`?)" if last else nearest(written, known, quote="`")
    return f"unknown option `{written}`{hint or f'; `{prog} {HELP_ALL if kind.ESSENTIAL else HELP[1]}` lists all'}"


def _convert(flag: Flag, words: Sequence[Any]) -> Any:
    if list(words) == [[]]:  # tyro looked for a positional argument and found an option
        return NOT_GIVEN
    kind, name = flag.info.rebuild_annotation(), flag.positional or f"--{flag.name}"
    if flag.many:
        inner = get_args(flag.info.annotation)[0]
        return tuple(_value(inner, word, name) for word in words)
    if flag.info.default is None and words[0] in ("none", "None"):
        return None
    return _value(kind, words[0], name)


def _value(kind: Any, word: str, name: str) -> Any:
    from pydantic import TypeAdapter  # not for --help

    adapter = TypeAdapter[Any](kind)
    try:
        try:
            return adapter.validate_strings(word)
        except ValidationError:
            if not word.isdecimal():
                raise
            return adapter.validate_python(int(word))  # one of some numbers, which pydantic does not read as words
    except ValidationError as error:
        raise ConfigError(explain(Options, error, name).replace(" (text)", "")) from error


def _run_tyro(
    kind: type[Options], argv: Sequence[str], prog: str, everything: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Return the given options by name, and the words that are not options."""
    flags = [flag for flag in flags_of(kind) if argv != ["--help"] or not _among(flag.name, kind.IDLE)]
    essential = () if everything else kind.ESSENTIAL
    fields = [_field(flag, kind) for flag in flags if flag.positional or not essential or flag.name in essential]
    if kind.ESSENTIAL:
        switch: Any = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]
        fields.append(StructFieldSpec(HELP_ALL[2:], switch, NOT_GIVEN, f"Show all {len(flags)} options."))
    registry = ConstructorRegistry()

    @registry.struct_rule
    def options(info: StructTypeInfo) -> StructConstructorSpec | None:
        return StructConstructorSpec(_given, tuple(fields)) if info.type is kind else None

    description = (inspect.getdoc(kind) or "") + "\n\nExamples:" * bool(kind.EXAMPLES)
    description += "".join(f"\n    {each}" for each in kind.EXAMPLES)
    cli: Any = tyro.cli
    given, unknown = cli(
        kind, args=argv, prog=prog, registry=registry, description=description, return_unknown_args=True
    )
    return given, unknown


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not NOT_GIVEN}


def _among(name: str, chosen: Sequence[str]) -> bool:
    return any(name == each or (each.endswith(".") and name.startswith(each)) for each in chosen)


def _field(flag: Flag, options: type[Options]) -> StructFieldSpec:
    metavar = flag.positional or options.METAVARS.get(flag.name)
    shown = tyro.conf.arg(help_behavior_hint=_default(flag.info.default), metavar=metavar)
    text = options.TEXTS.get(flag.name, flag.info.description or "")
    kind: Any = flag.info.annotation
    if kind is bool:
        kind = Annotated[bool, shown] if flag.pair else Annotated[bool, shown, tyro.conf.FlagCreatePairsOff]
    else:
        words: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
            nargs="*" if flag.many else 1,
            metavar=_metavar(kind),
            instance_from_str=partial(_convert, flag),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [str(value)],
        )
        kind = Annotated[object, words, shown]
        kind = Annotated[kind, tyro.conf.Positional] if flag.positional else kind
    return StructFieldSpec(flag.name, kind, NOT_GIVEN, " ".join(text.split()))


def _metavar(kind: Any) -> str:
    origin, inner = get_origin(kind), [each for each in get_args(kind) if each is not type(None)]
    if origin is Literal:
        return "|".join(map(str, inner))
    if inner:
        return f"{_metavar(inner[0])} ..." if origin is tuple else _metavar(inner[0])
    return {int: "N", float: "X", Path: "PATH", Bytes: "AMOUNT", Portion: "AMOUNT"}.get(kind, "TEXT")


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "(on)" if value else ""
    if not isinstance(value, str | int | float | Path) or value == "":
        return ""
    return f"(default: {value:g})" if type(value) is float else f"(default: {value})"
