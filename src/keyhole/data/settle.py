"""Which split each image of a manifest is in: as given or made, and whether training then has every class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from keyhole.config.settings import DataConfig
from keyhole.data.item import SPLITS, Item, Row
from keyhole.data.splits import Subject, leaking_groups, make_splits
from keyhole.errors import ConfigError, DataError
from keyhole.tasks.kinds import Task
from keyhole.util.wording import listed


def settle_splits(
    path: Path, rows: Sequence[Row], tasks: Sequence[Task], data: DataConfig, seed: int, grouped_by: str = ""
) -> tuple[list[Item], list[str]]:
    """Splits as given, or made; val out of training where only that is lacking."""
    items = [row.item for row in rows]
    given = [row for row in rows if row.item.split]
    notes = []
    if not given:
        if data.val + data.test >= 1:
            raise ConfigError(f"data.val (={data.val}) and data.test (={data.test}) leave nothing to train on.")
        shares = {"train": 1 - data.val - data.test, "val": data.val, "test": data.test}
        items = _made(path, items, tasks, shares, seed, grouped_by)
        counts = Counter(item.split for item in items)
        shared = ", ".join(f"{counts[split]} {split}" for split in SPLITS if counts[split])
        notes.append(f"splits made with seed {seed}: {shared}")
    else:
        for row in rows:
            if not row.item.split:
                raise DataError(f"{path}, {row.where}: no split, but {given[0].where} has one. Fill in all or none.")
        train = [item for item in items if item.split == "train"]
        if not train:
            lacking = "no folder train with class folders" if path.is_dir() else "no row with a label has split train"
            raise DataError(f"{path}: {lacking}, so there is nothing to learn from.")
        if data.val > 0 and not any(item.split == "val" for item in items):
            made = _made(path, train, tasks, {"train": 1 - data.val, "val": data.val}, seed, grouped_by)
            new = {item.name: item for item in made}
            items = [new.get(item.name, item) for item in items]
            count = sum(item.split == "val" for item in items)
            lacking = "no folder val" if path.is_dir() else "no row has split val"
            notes.append(f"{lacking}: {count} of {len(train)} training images became val (seed {seed})")
    leaking = leaking_groups([item.group for item in items], [item.split for item in items])
    if leaking:
        where = f"images of one `{grouped_by}` are in" if grouped_by else f"{len(leaking)} groups have images in"
        notes.append(f"{where} more than one split: {listed(leaking)}")
    return items, notes


def _made(
    path: Path, items: Sequence[Item], tasks: Sequence[Task], shares: Mapping[str, float], seed: int, grouped_by: str
) -> list[Item]:
    classed = [task for task in tasks if task.kind != "regression"]
    known = [{task.name: classes_of(task, item) for task in classed} for item in items]
    frequency = Counter(label for labels in known for label in labels[classed[0].name]) if classed else Counter()
    subjects = [
        Subject(
            name=os.path.normpath(item.name),
            group=item.group,
            # The rarest of several labels is the one that is hardest to share out.
            stratum=min(labels[classed[0].name], key=lambda c: (frequency[c], c), default="") if classed else "",
            classes=[(task, label) for task, own in labels.items() for label in own],
        )
        for item, labels in zip(items, known, strict=True)
    ]
    try:
        splits = make_splits(subjects, shares, seed, give_splits(path))
    except DataError as error:
        groups = f" The groups are the values of `{grouped_by}`; --data.group none ignores them." if grouped_by else ""
        raise DataError(f"{path}: {error}{groups}") from error
    return [replace(item, split=split) for item, split in zip(items, splits, strict=True)]


def give_splits(path: Path | None) -> str:
    """How a user says which image is in which split, in the words of a folder or a CSV."""
    return "give folders train, val and test" if path is not None and path.is_dir() else "give a `split` column"


def classes_of(task: Task, item: Item) -> tuple[str, ...]:
    """The classes of a classification task that an item's label names; none where it is unknown."""
    target = task.encode(item.labels[task.name])
    if np.isnan(target).any():
        return ()
    index = np.flatnonzero(target) if task.kind == "multilabel" else target.astype(int)
    return tuple(task.classes[i] for i in index)


def check_training(where: str, items: Sequence[Item], tasks: Sequence[Task]) -> None:
    """A model cannot know a class that no training image has."""
    train = [item for item in items if item.split == "train"]
    for task in tasks:
        if task.kind == "regression":
            continue
        seen = {label for item in train for label in classes_of(task, item)}
        lacking = [name for name in task.classes if name not in seen]
        if lacking:
            has = f"only {listed(map(repr, seen))}" if len(seen) == 1 else f"no {listed(map(repr, lacking))}"
            others = {label for item in items if item.split != "train" for label in classes_of(task, item)}
            elsewhere = [repr(name) for name in lacking if name in others]
            raise DataError(
                f"{where}: {task.name}: the training split has {has}"
                f"{f', other splits have {listed(elsewhere)}' if elsewhere else ''}. "
                "Give training an image of each class, or leave those images out."
            )
