"""`keyhole check`: open every image of a data set and say what would go wrong."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

from keyhole.cli.options import DataOptions, print_config, read
from keyhole.util.wording import listed

if TYPE_CHECKING:
    from keyhole.config.settings import Config
    from keyhole.tools.check.run import CheckReport

SOON = 50_000
"""Patches in all epochs together below which no time is forecast, so that torch is not imported."""
LISTED = 20
"""Left-out files shown."""
SAME_LISTED = 3
"""Names shown of images with the same fault."""


class CheckOptions(DataOptions):
    """Open every image, read its first and last patch, and say what would go wrong, with a fix for each.

    Exit code 1 if anything is wrong. Takes the settings of `keyhole train`, so the same line can be checked first.
    """

    EXAMPLES: ClassVar = (
        "keyhole check photos --patch.size 100",
        "keyhole check slides.csv --patch.mpp 0.5 --patch.foreground tissue",
    )
    METAVARS: ClassVar = {**DataOptions.METAVARS, "json": "FILE", "previews": "DIR"}
    ESSENTIAL: ClassVar = (
        *("json", "previews", "deep", "no-labels", "recipe", "config", "data.tasks", "data.root", "data.features"),
        *("data.masks", "data.on-bad-image", "patch.size", "patch.mpp", "patch.foreground", "select.m", "print-config"),
    )
    IDLE: ClassVar = (
        *("out", "unreadable", "augment.", "run.log", "run.save-minutes", "run.retries", "train.metric"),
        *("train.lr", "train.encoder-lr", "train.weight-decay", "train.final-lr", "train.clip", "train.patience"),
    )

    json_: Path | None = None
    """Write the report as JSON to a file, or `-` for standard output."""
    previews: str = "auto"
    """Folder for a PNG per image with its foreground mask and patches; `auto` is keyhole-check where patch.foreground
    is not `all`, `none` makes none."""
    deep: bool = False
    """Also compare the contents of files of equal size, to find the same image twice under two names."""
    no_labels: bool = False
    """Look at the images alone, whatever their folders or the CSV's columns say: for images to predict or embed."""


def run(argv: list[str]) -> int:
    options = read(CheckOptions, argv, "keyhole check")
    config = options.settings
    if options.print_config:
        return print_config(config)
    options.check_data("check")

    from keyhole.tools.check.run import check
    from keyhole.util.files import write_atomic
    from keyhole.util.progress import Progress

    with Progress(0, "checking") as progress:

        def show(done: int, total: int) -> None:
            progress.total_images = total
            progress.update(images=done - progress.images)

        previews = _previews(options.previews, config)
        report = check(config, deep=options.deep, previews=previews, progress=show, labels=not options.no_labels)
    if not options.no_labels:
        report = replace(report, time=_expected(config, report))
    as_json = json.dumps(report.to_json(), indent=2) + "\n"
    to_stdout = options.json_ == Path("-")
    show_report(report, sys.stderr if to_stdout else sys.stdout, options.json_ is not None)
    if to_stdout:
        print(as_json, end="")
    elif options.json_ is not None:
        write_atomic(options.json_, as_json)
    return 0 if report.ok else 1


def _expected(config: Config, report: CheckReport) -> str:
    """Return how long training will take; empty where it is short or no image can be used."""
    work, reading = report.work, report.reading
    if work is None or reading is None or work.epochs * (work.train_patches + work.val_patches) < SOON:
        return ""
    from keyhole.training.trial import forecast

    width = report.spreads.get("feature width")
    return forecast(config, work, reading, None if width is None else round(width.min)) or ""


def _previews(folder: str, config: Config) -> Path | None:
    from keyhole.data.listing import PREVIEW_FOLDER

    if folder == "auto":
        return None if config.patch.foreground == "all" else Path(PREVIEW_FOLDER)
    return None if folder.lower() == "none" else Path(folder).expanduser()


def show_report(report: CheckReport, stream: TextIO, as_json: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    width = None if stream.isatty() else 160  # a narrower table would cut the names of classes
    console = Console(file=stream, width=width, highlight=False, markup=False, soft_wrap=True)
    for rows in (report.class_table(), report.table()):
        table = Table(*rows[0], header_style="bold")
        for row in rows[1:]:
            table.add_row(*row)
        if len(rows) > 1:
            console.print(table)
    for line in (*report.notes, *filter(None, (report.memory, report.time))):
        console.print(line)
    if report.previews is not None:
        console.print(f"foreground masks and patches to look at: {report.previews}")
    same: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for finding in report.findings:
        same[finding.severity, finding.problem, finding.fix].append(finding.name)
    for (severity, problem, fix), names in same.items():
        style = "bold red" if severity == "error" else "yellow"
        console.print(f"{severity}: {listed(names, SAME_LISTED)}: {problem}", style=style)
        console.print(f"    fix: {fix}")
    if any(len(names) > SAME_LISTED for names in same.values()) and not as_json:
        console.print("--json FILE names every image")
    for left in report.left_out[:LISTED]:
        console.print(f"left out: {left.name}: {left.reason}")
    if len(report.left_out) > LISTED:
        console.print(f"... {len(report.left_out)} left out in all; --json FILE lists them")
    counts = Counter(finding.severity for finding in report.findings)
    verdict = ", ".join(f"{kind}s: {counts[kind]}" for kind in ("error", "warning") if counts[kind])
    console.print(f"{report.images} images can be used; {verdict or 'nothing is wrong'}")
