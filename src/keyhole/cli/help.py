"""`--help`: the options that matter and examples; `--help-all`: every option. Paragraphs are wrapped once, here.

A verb's options are a dataclass. Its docstring is the description, and the texts under its fields are the help. Three
class variables, which it may leave out, say what is shown:

    EXAMPLES   command lines
    ESSENTIAL  options that `--help` shows, by their flag without dashes; without it, `--help` shows all
    IDLE       options, or sections with a dot at the end, that the verb takes and does nothing with: shown nowhere
"""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from keyhole.config.docstrings import field_texts
from keyhole.config.settings import Quantity

WIDEST = 110
"""Columns, where the terminal has as many."""
LEFT = 28
"""Columns of an option and what it takes; a longer one has a line of its own."""
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One option.

    Attributes:
        name: flag without dashes, or metavar of a positional argument.
        flag: how it is written.
        text: what it is.
        section: dataclass that it belongs to, with its name; None at the top.
    """

    name: str
    flag: str
    text: str
    section: tuple[str, type] | None = None
    positional: bool = False


def show_help(kind: type, prog: str, everything: bool) -> str:
    """What `--help` or, with `everything`, `--help-all` prints.

    Args:
        kind: dataclass of the verb's options.
        prog: `keyhole train`.
        everything: show all options.
    """
    width = max(60, min(WIDEST, shutil.get_terminal_size().columns)) - 1
    idle: tuple[str, ...] = getattr(kind, "IDLE", ())
    known = [entry for entry in entries(kind) if not _among(entry.name, idle)]
    essential: tuple[str, ...] = getattr(kind, "ESSENTIAL", ())
    short = bool(essential) and not everything
    shown = [entry for entry in known if entry.positional or entry.name in essential] if short else known
    usage = " ".join([prog, *(entry.flag for entry in known if entry.positional), "[OPTIONS]"])
    lines = [f"usage: {usage}", ""]
    for paragraph in (inspect.getdoc(kind) or "").split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
    if examples := getattr(kind, "EXAMPLES", ()):
        lines += [*(f"    {example}" for example in examples), ""]
    section: object = None
    for entry in shown:
        if entry.section != section and not short:
            section = entry.section
            lines += ["", *_heading(entry, width)]
        lines += _row(entry.flag, entry.text, width)
    lines += [] if short else [""]
    lines += _row("-h, --help", "Show this help and end." if not essential else "Show the options that matter.", width)
    if essential:
        lines += _row(HELP_ALL, f"Show all {len(known)} options.", width)
    return "\n".join(lines)


def entries(kind: type, prefix: str = "", section: tuple[str, type] | None = None) -> Iterator[Entry]:
    """Every option of a dataclass: positional ones first, then those at the top, then section by section."""
    hints, texts = get_type_hints(kind, include_extras=True), field_texts(kind)
    later: list[Iterator[Entry]] = []
    found: list[Entry] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if any(type(extra).__module__.startswith("tyro") for extra in extras):
            hint = get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            later.append(entries(hint, f"{prefix}{field.name}.", (field.name, hint)))
            continue
        name = f"{prefix}{field.name}".replace("_", "-")
        metavar = next((str(extra.metavar) for extra in extras if getattr(extra, "metavar", None)), None)
        text = texts.get(field.name, "") + _default(field)
        if tyro.conf.Positional in extras:
            shown = metavar or field.name.upper()
            found.append(Entry(shown, shown, texts.get(field.name, ""), section, positional=True))
        elif hint is bool:
            head, _, tail = name.rpartition(".")
            pair = "" if tyro.conf.FlagCreatePairsOff in extras else f", --{f'{head}.' if head else ''}no-{tail}"
            found.append(Entry(name, f"--{name}{pair}", text, section))
        else:
            found.append(Entry(name, f"--{name} {metavar or _takes(hint)}", text, section))
    yield from sorted(found, key=lambda entry: not entry.positional)
    for part in later:
        yield from part


def _among(name: str, chosen: tuple[str, ...]) -> bool:
    return any(name == each or (each.endswith(".") and name.startswith(each)) for each in chosen)


def _takes(hint: Any) -> str:
    """What stands for the value of an option."""
    if hint is Quantity:
        return "AMOUNT"
    if get_origin(hint) in (Union, types.UnionType):
        return _takes(next(arg for arg in get_args(hint) if arg is not type(None)))
    if get_origin(hint) is Annotated:
        return _takes(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{_takes(get_args(hint)[0])} ..."
    return {int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")


def _default(field: dataclasses.Field[Any]) -> str:
    """The default, where the text under the option cannot be clearer."""
    value = field.default
    if value is dataclasses.MISSING or value is None or value == () or value == "":
        return ""
    if isinstance(value, bool):
        return " (on)" if value else ""
    return f" (default: {value:g})" if isinstance(value, float) else f" (default: {value})"


def _heading(entry: Entry, width: int) -> list[str]:
    if entry.section is None:
        return []
    name, kind = entry.section
    return textwrap.wrap(f"{name}: {' '.join((inspect.getdoc(kind) or '').split())}", width)


def _row(flag: str, text: str, width: int) -> list[str]:
    """An option and its text in two columns."""
    lines = textwrap.wrap(text, width - LEFT, break_on_hyphens=False, break_long_words=False) or [""]
    if len(flag) + 4 > LEFT:
        return [f"  {flag}", *(" " * LEFT + line for line in lines)]
    return [f"  {flag}".ljust(LEFT) + lines[0], *(" " * LEFT + line for line in lines[1:])]
