"""The dated Markdown of a call, written again whenever there is something new, so that it is there in any case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from machine import card, cores, processor

from on_gpu.aims import AIMS, Figure
from on_gpu.calls import Call, Part

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 400
"""Lines of a part that the Markdown shows, the last ones; the log has all."""


@dataclass
class Record:
    """What is known of a part.

    Attributes:
        part: which.
        end: how it ended; empty while it runs, or before.
        seconds: that it has taken.
        lines: of its output.
    """

    part: Part
    end: str = "not begun"
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)


class Result:
    """All that a call has found.

    Args:
        call: which.
        folder: for the Markdown.
        figures: folder to which the parts append their figures, each to a file of its own.
        dry: the figures mean nothing.
        commit: of the sources, where git does not tell.
    """

    def __init__(self, call: Call, folder: Path, figures: Path, dry: bool, commit: str = "") -> None:
        self.call, self.figures_folder, self.dry = call, figures, dry
        self.records = {part.name: Record(part) for part in call.parts}
        self.machine = describe(commit_of(ROOT) or commit)
        gpu = gpu_name()
        name = f"on_gpu_{call.name}_{'dry' if dry else card(gpu) if gpu else f'{cores()}cpu'}"
        self.path = folder / f"{name}_{time.strftime('%Y-%m-%d')}.md"
        self.note = ""

    def cut(self) -> None:
        """Notes what has not ended, where the call ends before its parts do."""
        self.note = self.note or "cut before its end"
        for record in self.records.values():
            record.end = record.end or "cut with the call"

    def figures(self) -> dict[str, Figure]:
        """By key; of a file that is being written the complete lines."""
        found = {}
        for path in sorted(self.figures_folder.glob("*.jsonl")):
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    key, value, shown = json.loads(line)
                    found[key] = Figure(value, shown)
        return found

    def write(self) -> Path:
        """Replaces the Markdown as a whole."""
        beside = self.path.with_suffix(".part")
        beside.write_text("\n".join(self.text()), encoding="utf-8")
        beside.replace(self.path)
        return self.path

    def text(self) -> list[str]:
        lines = [f"# keyhole on a GPU: `{self.call.name}`, {time.strftime('%Y-%m-%d')}", ""]
        if self.dry:
            lines += [
                "**A dry run with tiny sizes on a CPU: it shows that the parts run; no figure means anything.**",
                "",
            ]
        lines += [f"{self.machine}", "", f"Made by `{command_line()}`; {self.note or 'under way'}.", ""]
        lines += self.aims() + self.ends()
        for record in self.records.values():
            if record.lines:
                lines += [f"## {record.part.name}: {record.part.shows}", "", "```"]
                lines += [*record.lines[-MOST_LINES:], "```", ""]
        return lines

    def aims(self) -> list[str]:
        """Every quantity that the call is to bring home, and what else it found."""
        found = self.figures()
        rows = ["| quantity | measured | aim | |", "|---|---|---|---|"]
        for aim in AIMS.get(self.call.name, ()):
            figure = found.pop(aim.key, None)
            cells = [aim.what, figure.shown if figure else "-", aim.wanted, aim.verdict(figure)]
            rows.append(f"| {' | '.join(cells)} |")
        rows += [f"| {key} | {figure.shown} | | |" for key, figure in found.items()]
        return [*rows, ""]

    def ends(self) -> list[str]:
        rows = ["| part | how it ended | seconds | expected |", "|---|---|---|---|"]
        for record in self.records.values():
            part = record.part
            rows.append(f"| {part.name} | {record.end or 'running'} | {record.seconds:.0f} | {part.expected} |")
        return [*rows, ""]


def describe(commit: str) -> str:
    """Card, driver, processor, cores, versions and commit, without loading torch."""
    found = nvidia_smi("name,driver_version,memory.total")
    gpu = ", driver ".join(found[:2]) + f", {found[2]}" if len(found) == 3 else "no NVIDIA GPU"
    packages = ", ".join(f"{name} {installed(name)}" for name in ("torch", "torchvision", "timm", "keyhole"))
    machine = f"{gpu}; {processor()}, {cores()} cores"
    return f"{machine}; Python {sys.version.split()[0]}, {packages}; commit {commit or 'unknown'}."


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def gpu_name() -> str:
    return next(iter(nvidia_smi("name")), "")


def nvidia_smi(fields: str) -> list[str]:
    """Fields of the first GPU; empty where there is none."""
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    first = next(iter(done.stdout.splitlines()), "")
    return [field.strip() for field in first.split(",")] if done.returncode == 0 and first else []


def commit_of(folder: Path) -> str:
    """The commit that is checked out, with `+` where files differ from it; empty where there is no git."""
    try:
        said = [
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return said[0] + ("+" if said[1] else "")


def command_line() -> str:
    """As typed, without folders and the options that name them, which mean nothing to a reader."""
    words: Sequence[str] = sys.argv[1:]
    told = [
        word
        for word, after in pairwise([*words, ""])
        if os.sep not in word and not (word.startswith("--") and os.sep in after)
    ]
    return " ".join(["benchmarks/on_gpu/run", *told])
