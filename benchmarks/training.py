"""Runs of `keyhole train` and `keyhole evaluate` in processes of their own: skipped if done, else begun or resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from keyhole.config.file import dump_config
from keyhole.config.settings import Config
from keyhole.util.files import write_atomic


def train_and_evaluate(config: Config, run: Path) -> None:
    """Train and evaluate a run as far as that is not done; its log is beside it.

    Ends the process if a command fails, or if the run was begun with other settings: delete it, or name it otherwise.
    """
    file, config = run.parent / f"{run.name}.yaml", config.replace(out=None)
    if file.exists() and run.exists() and (changed := different(yaml.safe_load(file.read_text()), config)):
        sys.exit(f"{run}: begun with another {', '.join(changed)}. Delete it, or give these settings another name.")
    if not run.exists():
        run.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, dump_config(config))
    if problem := finish(run, ("--config", file)):
        sys.exit(problem)


@contextmanager
def going_on(failed: list[str]) -> Iterator[None]:
    """Add to `failed` what ends the process inside, and go on: one run does not stop the others of a night."""
    try:
        yield
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        failed.append(str(error))


def finish(run: Path, new: Sequence[str | Path], evaluate: Sequence[str] = (), **environment: str) -> str:
    """Begin a run or resume it, and evaluate it, unless that is done; return what went wrong, or "".

    Args:
        run: The run folder; the output goes into RUN.log beside it.
        new: Words of `keyhole train` for a new run.
        evaluate: Further words of `keyhole evaluate`.
        environment: Variables for both.
    """
    if (run / "evaluation" / "test" / "metrics.json").exists():
        return ""
    log = run.parent / f"{run.name}.log"
    learn = ("resume", run) if run.exists() else ("train", *new, "--out", run)
    for words in (learn, ("evaluate", run, *evaluate)):
        print(time.strftime("%H:%M:%S"), f"{run.name}: keyhole {words[0]}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "keyhole", *map(str, words)]
        with log.open("a") as out:
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment, check=False
            )
        if done.returncode:
            return f"{run}: keyhole {words[0]} ended with {done.returncode}; see {log}"
    return ""


def different(old: Mapping[str, Any], config: Config) -> list[str]:
    """Return the settings that differ from those of a file, which may be older: what it lacks was at its default.

    >>> different({"train": {"epochs": 3}}, Config().replace(train={"epochs": 4}, select={"m": 5}))
    ['select.m', 'train.epochs']
    """
    new, plain = (dict(_flat(yaml.safe_load(dump_config(each)))) for each in (config, Config()))
    before = dict(_flat(old))
    return sorted(name for name, value in new.items() if before.get(name, plain[name]) != value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def sections(dotted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings such as `train.lr` as sections; the error for an unknown one is keyhole's.

    >>> sections({"train.lr": 0.001, "train.epochs": 3, "select.m": 5})
    {'train': {'lr': 0.001, 'epochs': 3}, 'select': {'m': 5}}
    """
    found: dict[str, dict[str, Any]] = {}
    for name, value in dotted.items():
        section, _, field = name.partition(".")
        found.setdefault(section, {})[field] = value
    return found
