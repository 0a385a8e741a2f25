"""`keyhole init`: measure a data set and write a commented configuration for it."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from keyhole.cli.arguments import ConfigOptions, parse_config, parse_over
from keyhole.config.check import validate
from keyhole.config.settings import Config
from keyhole.errors import ConfigError, OutputError


@dataclass(frozen=True)
class InitOptions(ConfigOptions):
    """Measure a data set and write a configuration for it, with the reason beside every value.

    Values come from the data, but --recipe, --config and flags go over them. Never overwrites a file.
    """

    EXAMPLES: ClassVar = ("keyhole init photos", "keyhole init slides.csv --patch.mpp 0.25 --out slides.yaml")
    ESSENTIAL: ClassVar = (
        *("out", "recipe", "config", "memory", "data.tasks", "data.root", "patch.size", "patch.mpp"),
        *("patch.foreground", "model.encoder", "select.m", "train.epochs", "print-config"),
    )

    out: Path | None = None
    """File to write; default is keyhole.yaml."""


def run(argv: list[str]) -> int:
    options, config = parse_config(InitOptions, argv, "keyhole init")
    config = dataclasses.replace(config, out=None)
    validate(config, flags=True)
    if config.data.path is None:
        raise ConfigError("no data given: keyhole init DATA, where DATA is a folder of classes or a CSV")
    target = options.out or Path("keyhole.yaml")
    if not options.print_config and (target.exists() or target.is_symlink()):
        raise OutputError(f"{target}: is there already, and is not overwritten. Remove it or give another --out.")

    from keyhole.config.auto import auto_reasons
    from keyhole.config.file import dump_config, resolve
    from keyhole.tools.init import measure, propose, with_counted_patches

    measured = measure(config)
    proposal = with_counted_patches(propose(Config(data=config.data), measured), measured, config)
    # What was said by recipe, file or flag goes over what was measured.
    said = parse_over(InitOptions, argv, "keyhole init", resolve(options.recipe, options.config, proposal.config))
    final = dataclasses.replace(
        Config(**{field.name: getattr(said, field.name) for field in dataclasses.fields(Config)}),
        out=None,
        data=config.data,
    )
    validate(final, flags=True)
    reasons = {name: why for name, why in proposal.reasons.items() if _at(final, name) == _at(proposal.config, name)}
    reasons |= auto_reasons(final)
    text = _header(target, proposal.summary) + dump_config(final, comments=True, notes=reasons)
    if options.print_config:
        print(text, end="")
        return 0

    from keyhole.util.files import write_atomic

    write_atomic(target, text)
    print("\n".join(proposal.summary))
    print(f"\nwritten: {target}\nnext:    keyhole train --config {shlex.quote(str(target))}")
    return 0


def _at(config: Config, name: str) -> object:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def _header(target: Path, summary: tuple[str, ...]) -> str:
    lines = [
        "Written by keyhole init from what was measured on the data; `->` marks what a value rests on.",
        f"Learn with: keyhole train --config {shlex.quote(str(target))}",
        "Paths are relative to the folder that keyhole is called in.",
        "",
        *summary,
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n\n"
