"""The split of each image: a model learns from train, val chooses the best model, and training does not read test.

Groups stay whole, classes keep their proportions, and the result depends only on the seed and the names. (The result of
scikit-learn's StratifiedGroupKFold depends on the order of the rows, and a share of 15 % needs many folds.)
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keyhole.config.settings import DataConfig
from keyhole.data.item import SPLITS, Item, Row
from keyhole.errors import DataError
from keyhole.tasks.kinds import Task
from keyhole.util.wording import listed


def settle_splits(
    path: Path, rows: Sequence[Row], tasks: Sequence[Task], data: DataConfig, seed: int, grouped_by: str = ""
) -> tuple[list[Item], list[str]]:
    """Return the items with given or drawn splits, and notes; if only val is missing, only val is drawn."""
    items = [row.item for row in rows]
    given = [row for row in rows if row.item.split]
    notes = []
    if not given:
        shares = {"train": 1 - data.val - data.test, "val": data.val, "test": data.test}
        items = _drawn(path, items, tasks, shares, seed, grouped_by)
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
            drawn = _drawn(path, train, tasks, {"train": 1 - data.val, "val": data.val}, seed, grouped_by)
            new = {item.name: item for item in drawn}
            items = [new.get(item.name, item) for item in items]
            count = sum(item.split == "val" for item in items)
            lacking = "no folder val" if path.is_dir() else "no row has split val"
            notes.append(f"{lacking}: {count} of {len(train)} training images became val (seed {seed})")
    leaking = leaking_groups([item.group for item in items], [item.split for item in items])
    if leaking:
        where = f"images of one `{grouped_by}` are in" if grouped_by else f"{len(leaking)} groups have images in"
        notes.append(f"{where} more than one split: {listed(leaking)}")
    return items, notes


def _drawn(
    path: Path, items: Sequence[Item], tasks: Sequence[Task], shares: Mapping[str, float], seed: int, grouped_by: str
) -> list[Item]:
    classed = [task for task in tasks if task.classes]
    known = [{task.name: task.classes_of(item.labels[task.name]) for task in classed} for item in items]
    frequency = Counter(label for labels in known for label in labels[classed[0].name]) if classed else Counter()
    samples = [
        Sample(
            name=os.path.normpath(item.name),
            group=item.group,
            # The rarest of several labels is the hardest to distribute.
            stratum=min(labels[classed[0].name], key=lambda c: (frequency[c], c), default="") if classed else "",
            classes=[(task, label) for task, own in labels.items() for label in own],
        )
        for item, labels in zip(items, known, strict=True)
    ]
    try:
        splits = make_splits(samples, shares, seed, give_splits(path))
    except DataError as error:
        groups = f" The groups are the values of `{grouped_by}`; --data.group none ignores them." if grouped_by else ""
        raise DataError(f"{path}: {error}{groups}") from error
    return [replace(item, split=split) for item, split in zip(items, splits, strict=True)]


def give_splits(path: Path | None) -> str:
    """Return how a user states the split of each image, in a folder or a CSV."""
    return "give folders train, val and test" if path is not None and path.is_dir() else "give a `split` column"


def check_training(where: str, items: Sequence[Item], tasks: Sequence[Task]) -> None:
    """Require a training image of every class."""
    for task in tasks:
        trained: set[str] = set()
        others: set[str] = set()
        for item in items:
            (trained if item.split == "train" else others).update(task.classes_of(item.labels[task.name]))
        lacking = [repr(name) for name in task.classes if name not in trained]
        if lacking:
            has = f"only {next(iter(trained))!r}" if len(trained) == 1 else f"no {listed(lacking)}"
            if elsewhere := [repr(name) for name in task.classes if name in others - trained]:
                has += f", other splits have {listed(elsewhere)}"
            raise DataError(
                f"{where}: {task.name}: the training split has {has}. "
                "Give training an image of each class, or leave those images out."
            )


def leaking_groups(groups: Sequence[str | None], splits: Sequence[str]) -> list[str]:
    """Return the groups with images in more than one split, so that training sees a part of what is held out."""
    found = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        if group is not None:
            found[group].add(split)
    return sorted(group for group, where in found.items() if len(where) > 1)


@dataclass(frozen=True)
class Sample:
    """The facts about an image that its split depends on."""

    name: str
    group: str | None  # images of one group stay together; None if the image is its own group
    stratum: str  # images of one stratum are distributed in proportion
    classes: Collection[tuple[str, str]] = ()  # (task, class); the training split needs an image of each


@dataclass(frozen=True)
class _Group:
    members: tuple[int, ...]
    strata: Counter[str]
    classes: frozenset[tuple[str, str]]
    order: bytes

    @property
    def size(self) -> int:
        return len(self.members)


def make_splits(
    samples: Sequence[Sample], shares: Mapping[str, float], seed: int, remedy: str = "give a `split` column"
) -> list[str]:
    """Draw the split of every image.

    1. Each stratum gets a quota per split: its share of the stratum, rounded up or down so that the totals of the
       splits come out right. The training split gets at least one image of each stratum.
    2. Groups, in a random order from the seed and their names, go whole to the split that lacks most of what they hold.
       A group larger than a whole held-out split goes to training.
    3. Groups move until training has every class and no split is empty.

    Without groups the quotas are met exactly: each class is within one image of its share in each split. `remedy` says
    how a user states splits, for messages.
    """
    splits = ["train", *(split for split in sorted(shares, reverse=True) if split != "train" and shares[split] > 0)]
    shares = {split: shares[split] / sum(shares.values()) for split in splits}
    groups = _groups(samples, seed)
    if len(groups) < len(splits):
        what = "group" if any(sample.group is not None for sample in samples) else "image"
        raise DataError(
            f"{len(groups)} {what}{'s' * (len(groups) != 1)} cannot be shared out to {' and '.join(splits)}. "
            f"Add more, {remedy}, or set data.val or data.test to 0."
        )
    placed = _place(groups, _quotas(Counter(sample.stratum for sample in samples), shares), shares)
    _cover_classes(placed)
    _fill_empty(placed, remedy)
    split_of = {index: split for split, groups in placed.items() for group in groups for index in group.members}
    return [split_of[index] for index in range(len(samples))]


def _groups(samples: Sequence[Sample], seed: int) -> list[_Group]:
    members = defaultdict(list)
    for index, sample in enumerate(samples):
        own = sample.group is None
        members[(own, sample.name if own else str(sample.group))].append(index)
    groups = [
        _Group(
            members=tuple(indices),
            strata=Counter(samples[index].stratum for index in indices),
            classes=frozenset(known for index in indices for known in samples[index].classes),
            order=hashlib.blake2b(f"{seed}\0{own}\0{name}".encode(errors="surrogateescape"), digest_size=16).digest(),
        )
        for (own, name), indices in members.items()
    ]
    return sorted(groups, key=lambda group: group.order)


def _quotas(counts: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """Round every share down, then give the rest, at most one per split, to the splits furthest below their total."""
    # Products such as 100 * 0.29 fall just short of the integer that is meant.
    ideal = {k: {split: count * share for split, share in shares.items()} for k, count in counts.items()}
    quotas = {k: {split: math.floor(want + 1e-9) for split, want in wants.items()} for k, wants in ideal.items()}
    lack = {split: sum(ideal[k][split] - quotas[k][split] for k in counts) for split in shares}
    for k in sorted(counts):
        left = counts[k] - sum(quotas[k].values())
        fractional = [split for split in shares if ideal[k][split] - quotas[k][split] > 1e-9]
        ranked = sorted(fractional, key=lambda split: -lack[split])
        if left and not quotas[k]["train"]:
            ranked = ["train", *(split for split in ranked if split != "train")]
        for split in ranked[:left]:
            quotas[k][split] += 1
            lack[split] -= 1
    return quotas


def _place(
    groups: Sequence[_Group], quotas: Mapping[str, Mapping[str, int]], shares: Mapping[str, float]
) -> dict[str, list[_Group]]:
    images = sum(group.size for group in groups)
    placed: dict[str, list[_Group]] = {split: [] for split in shares}
    lack = {split: {k: quota[split] for k, quota in quotas.items()} for split in shares}
    total = {split: sum(wants.values()) for split, wants in lack.items()}
    room = {
        group.members: [split for split in shares if split == "train" or group.size <= max(1.0, images * shares[split])]
        for group in groups
    }
    # Groups that fit only into training come first, so that the others can even out what they bring.
    for group in sorted(groups, key=lambda group: len(room[group.members]) > 1):
        best = max(
            room[group.members],
            key=lambda split: (sum(n * lack[split][k] for k, n in group.strata.items()), total[split]),
        )
        placed[best].append(group)
        total[best] -= group.size
        for k, n in group.strata.items():
            lack[best][k] -= n
    return placed


def _cover_classes(placed: dict[str, list[_Group]]) -> None:
    """For every class that training lacks, move the smallest group that has it to training."""
    held_out = [split for split in placed if split != "train"]
    for known in sorted({known for groups in placed.values() for group in groups for known in group.classes}):
        if any(known in group.classes for group in placed["train"]):
            continue
        group, split = min(
            ((group, split) for split in held_out for group in placed[split] if known in group.classes),
            key=lambda pair: (pair[0].size, pair[0].order),
        )
        placed[split].remove(group)
        placed["train"].append(group)


def _fill_empty(placed: dict[str, list[_Group]], remedy: str) -> None:
    """Move one small group into every empty split, without taking a class from training."""
    for split in placed:
        if placed[split]:
            continue
        in_train = Counter(known for group in placed["train"] for known in group.classes)
        spare = [
            (group, source)
            for source, groups in placed.items()
            if len(groups) > 1
            for group in groups
            if source != "train" or all(in_train[known] > 1 for known in group.classes)
        ]
        if not spare:
            raise DataError(
                f"no image is left for {split}: each class would lose its only training image or group. "
                f"Add more, {remedy}, or set data.val or data.test to 0."
            )
        group, source = min(spare, key=lambda pair: (pair[1] != "train", pair[0].size, pair[0].order))
        placed[source].remove(group)
        placed[split].append(group)
