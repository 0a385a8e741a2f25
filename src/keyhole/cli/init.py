"""`keyhole init`: measure a data set and write a commented configuration for it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import ClassVar

from keyhole.cli.options import DataOptions, read
from keyhole.config.settings import Config, TrainConfig
from keyhole.errors import OutputError


class InitOptions(DataOptions):
    """Measure a data set and write a configuration for it, with the reason beside every value.

    Values come from the data, but --recipe, --config and flags override them. Never overwrites a file.
    """

    EXAMPLES: ClassVar = ("keyhole init photos", "keyhole init slides.csv --patch.mpp 0.25 --out slides.yaml")
    ESSENTIAL: ClassVar = (
        *("out", "recipe", "config", "memory", "data.tasks", "data.root", "patch.size", "patch.mpp"),
        *("patch.foreground", "model.encoder", "select.m", "train.epochs", "print-config"),
    )

    TEXTS: ClassVar = {"out": "File to write; default is keyhole.yaml."}


def run(argv: list[str]) -> int:
    options = read(InitOptions, argv, "keyhole init")
    options.check_data("init")
    config, target = options.settings, options.settings.out or Path("keyhole.yaml")
    if not options.print_config and (target.exists() or target.is_symlink()):
        raise OutputError(f"{target}: is there already, and is not overwritten. Remove it or give another --out.")

    from keyhole.config.auto import auto_reasons
    from keyhole.config.file import dump_config, leaves
    from keyhole.tools.init import measure, propose, with_counted_patches
    from keyhole.util.files import check_creatable, writable_folder, write_atomic

    if not options.print_config:
        check_creatable(target)
    measured = measure(config)
    proposal = propose(Config(data=config.data, model=config.model), measured)
    proposal = with_counted_patches(proposal, measured, config.run.stall)
    base = proposal.config
    if (epochs := config.train.epochs) != TrainConfig().epochs:  # the user's; the proposed warm-up is for the proposed
        base = base.replace(train={"warmup": max(1.0, epochs / 10)})
    said = read(InitOptions, argv, "keyhole init", base.model_dump())
    final = said.settings.replace(out=None, data=config.data)  # recipe, file and flags over what was measured
    kept = set(leaves(final)) & set(leaves(proposal.config))
    reasons = {name: proposal.reasons[name] for name, _ in kept if name in proposal.reasons} | auto_reasons(final)
    text = _header(target, proposal.summary) + dump_config(final, comments=True, notes=reasons)
    if options.print_config:
        print(text, end="")
        return 0

    writable_folder(target.parent)
    write_atomic(target, text)
    print("\n".join(proposal.summary))
    print(f"\nwritten: {target}")
    if final.patch.mpp is None and (final.augment.flip or final.augment.rotate):  # a slide has no top
        print("check:   turn off augment.flip and augment.rotate where up, down, left and right differ, as in text")
    print(f"next:    keyhole train --config {shlex.quote(str(target))}")
    return 0


def _header(target: Path, summary: tuple[str, ...]) -> str:
    lines = [
        "Written by keyhole init from what was measured on the data; `->` marks what a value rests on.",
        f"Learn with: keyhole train --config {shlex.quote(str(target))}",
        "Paths are relative to the folder that keyhole is called in.",
        "",
        *summary,
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines) + "\n\n"
