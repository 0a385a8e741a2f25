"""From the words of a command line to a checked dataclass: tyro makes the options, mistakes become one line.

tyro's own messages are boxes of many lines without the range that was broken, so the words are checked against the
same dataclass first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from keyhole.cli.help import HELP, HELP_ALL, show_help
from keyhole.config.check import check_text, describe, is_none, validate
from keyhole.config.settings import Config, RunConfig
from keyhole.errors import ConfigError
from keyhole.util.wording import nearest

Options = TypeVar("Options")
Configured = TypeVar("Configured", bound="ConfigOptions")


@dataclass(frozen=True)
class ConfigOptions(Config):
    """What every verb that works on data takes: the data, where settings come from, and each setting as a flag."""

    source: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """Folder of classes, or CSV with `image` and one column per task; the same as --data.path."""
    recipe: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Settings that come with keyhole, under --config and flags: small, demo, slides, traffic, megapixel-mnist,
    camelyon16, camelyon16-features."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with settings, such as `keyhole init` writes; flags go over it."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the configuration that results, as YAML, and end."""


def parse(kind: type[Options], argv: Sequence[str], prog: str, default: Options | None = None) -> Options:
    """`argv` as a `kind`, over `default` where given. Raises ConfigError with one line; `--help` ends the process."""
    options = argv[: argv.index("--") if "--" in argv else None]
    if {*HELP, HELP_ALL}.intersection(options):
        print(show_help(kind, prog, everything=HELP_ALL in options))
        raise SystemExit(0)
    argv = _checked(kind, argv, prog)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, prog=prog, args=argv)
            return tyro.cli(kind, prog=prog, args=argv, default=default)
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(_one_line(said.getvalue())) from stop
        raise


def parse_config(kind: type[Configured], argv: Sequence[str], prog: str) -> tuple[Configured, Config]:
    """The verb's own options, and the configuration: default < recipe < --config < flags, not yet validated."""
    options = parse(kind, argv, prog)
    if options.recipe is not None or options.config is not None:
        from keyhole.config.file import resolve

        options = parse_over(kind, argv, prog, resolve(options.recipe, options.config))
    return options, _config_of(options)


def parse_over(kind: type[Configured], argv: Sequence[str], prog: str, base: Config) -> Configured:
    """The options of `argv`, with the settings of `base` where `argv` gives none."""
    sections = {name: getattr(base, name) for name in _settings(kind)}
    return parse(kind, argv, prog, default=dataclasses.replace(kind(), **sections))


def _settings(kind: type[ConfigOptions]) -> list[str]:
    return [field.name for field in dataclasses.fields(Config) if field.name in kind.__dataclass_fields__]


def _config_of(options: ConfigOptions) -> Config:
    config = Config(**{name: getattr(options, name) for name in _settings(type(options))})
    if options.source is None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=options.source))


def config_with_data(options: ConfigOptions, config: Config, verb: str) -> Config:
    """`config`, validated, which must name the data unless it is only to be printed."""
    validate(config, flags=True)
    if config.data.path is None and not options.print_config:
        raise ConfigError(f"no data given: keyhole {verb} DATA, where DATA is a folder of classes or a CSV")
    return config


def print_config(config: Config) -> int:
    """What `--print-config` prints."""
    from keyhole.config.file import dump_config

    print(dump_config(config), end="")
    return 0


def print_options(options: Any) -> int:
    """What `--print-config` prints for a verb whose configuration is a run's."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "print_config":
            print(f"{field.name}: {json.dumps(value, default=_as_json, ensure_ascii=False)}")
    return 0


def _as_json(part: Any) -> Any:
    return dataclasses.asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else str(part)


def check_device(device: str) -> None:
    """Raises ConfigError if `device` is not one that a run may name."""
    try:
        validate(Config(run=RunConfig(device=device)))
    except ConfigError as error:
        raise ConfigError(str(error).replace("run.device", "--device")) from error


# --- checking words --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Option:
    kind: Any
    many: bool = False
    switch: bool = False
    required: bool = False


def _checked(kind: type, argv: Sequence[str], prog: str) -> list[str]:
    """The words of `argv` with the positional ones together, since argparse takes them from one place only.

    Raises:
        ConfigError: the first word that `kind` has no place for.
    """
    named = dict(_options(kind, ""))
    positional = {name: option for name, option in named.items() if not name.startswith("--")}
    words = list(argv)
    loose: list[str] = []
    flags: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--":
            loose += words
            break
        if not _is_flag(word):
            loose.append(word)
            continue
        written, given, value = word.partition("=")
        option = named.get(written.replace("_", "-"))
        if option is None:
            known = [name for name in named if name.startswith("--")]
            listing = HELP_ALL if getattr(kind, "ESSENTIAL", ()) else "--help"
            hint = _nearest_flag(written, known) or f"; `{prog} {listing}` lists all"
            raise ConfigError(f"unknown option `{written}`{hint}")
        if option.switch:
            if given:
                raise ConfigError(f"{written}: takes no value, got {value!r}")
            flags.append(word)
            continue
        values = [value] if given else []
        while not given and words and not _is_flag(words[0]) and words[0] != "--" and (option.many or not values):
            values.append(words.pop(0))
        if not values and not option.many:
            raise ConfigError(f"{written}: a value is missing, expected {describe(option.kind)}")
        for text in values:
            check_text(option.kind, text, written)
        if is_none(option.kind, values):  # tyro knows the word as Python writes it
            given, word, values = "", written, ["None"]
        flags += [word] if given else [word, *values]
    required = [name for name, option in positional.items() if option.required]
    if len(loose) < len(required):
        raise ConfigError(f"{required[len(loose)]} is missing: {prog} {' '.join(positional)}; see {prog} --help")
    if len(loose) > len(positional) and not any(option.many for option in positional.values()):
        raise ConfigError(f"unexpected argument `{loose[len(positional)]}`; see {prog} --help")
    return [*flags, "--", *loose] if any(word.startswith("-") for word in loose) else [*loose, *flags]


def _nearest_flag(written: str, flags: list[str]) -> str:
    """The nearest flag; `--size` is near `--patch.size`, since the last part is what people remember."""
    last = [flag for flag in flags if flag.rpartition(".")[2] == written.lstrip("-").replace("_", "-")]
    return f" (did you mean `{last[0]}`?)" if last else nearest(written, flags, quote="`")


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _options(kind: type, prefix: str) -> Iterator[tuple[str, _Option]]:
    """Every option of a dataclass by its flag, positional ones by their metavar."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        extras = list(get_args(hint)[1:]) if get_origin(hint) is Annotated else []
        if any(type(extra).__module__.startswith("tyro") for extra in extras):
            hint = get_args(hint)[0]
        flag = f"{prefix}{field.name}".replace("_", "-")
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        option = _Option(hint, many=get_origin(hint) is tuple, switch=hint is bool, required=required)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _options(hint, f"{prefix}{field.name}.")
        elif tyro.conf.Positional in extras:
            metavar = next((extra.metavar for extra in extras if hasattr(extra, "metavar")), field.name.upper())
            yield str(metavar), option
        else:
            yield f"--{flag}", option
            if option.switch and tyro.conf.FlagCreatePairsOff not in extras:
                head, _, tail = flag.rpartition(".")
                yield f"--{head}.no-{tail}" if head else f"--no-{tail}", option


def _one_line(boxed: str) -> str:
    """The first paragraph of tyro's box, should it refuse what `_check` let through."""
    rows = [re.sub(r"^[│|]\s?|\s*[│|]$", "", row).strip() for row in boxed.splitlines()]
    text: list[str] = []
    for row in rows:
        if re.match(r"[╭╰+─-]{2}", row):
            if text:
                break
            continue
        text.append(row)
    return " ".join(text)
