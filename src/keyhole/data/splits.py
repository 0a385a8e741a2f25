"""Which images are learned from, which choose the best model, and which are never looked at in training.

Groups stay whole, classes keep their proportions, and the result depends on the seed and the names alone: not on the
order of the rows, nor on where the images lie.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from keyhole.errors import DataError

Quotas = dict[str, dict[str, int]]
"""Images wanted per stratum and split."""


@dataclass(frozen=True)
class Subject:
    """An image as the splitting sees it.

    Attributes:
        name: identifies the image, whatever the order of the rows.
        group: images of one group stay together; None: the image is its own group.
        stratum: images of one stratum are shared out in proportion.
        classes: what the training split must have at least one image of.
    """

    name: str
    group: str | None
    stratum: str
    classes: Collection[tuple[str, str]] = ()


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
    subjects: Sequence[Subject], shares: Mapping[str, float], seed: int, remedy: str = "give a `split` column"
) -> list[str]:
    """The split of every image.

    1. Each stratum gets a quota per split, its share of the stratum rounded up or down so that the splits' totals come
       out right; the training split gets at least one image of each stratum.
    2. Groups, in an order drawn from the seed and their name, go whole to the split that lacks most of what they hold.
       A group larger than a whole held-out split goes to training.
    3. Groups move until training has every class and no split is empty.

    Without groups the quotas are met exactly: each class is within one image of its share in each split.

    Args:
        subjects: the images.
        shares: of the images per split, `train` among them; splits with share 0 stay empty.
        seed: another seed gives another draw.
        remedy: how a user gives splits, for messages.

    Raises:
        DataError: too few images or groups for the splits asked for.
    """
    splits = ["train", *(split for split in sorted(shares, reverse=True) if split != "train" and shares[split] > 0)]
    shares = {split: shares[split] / sum(shares.values()) for split in splits}
    groups = _groups(subjects, seed)
    if len(groups) < len(splits):
        what = "group" if any(subject.group is not None for subject in subjects) else "image"
        raise DataError(
            f"{len(groups)} {what}{'s' * (len(groups) != 1)} cannot be shared out to {' and '.join(splits)}. "
            f"Add more, {remedy}, or set data.val or data.test to 0."
        )
    quotas = _quotas(Counter(subject.stratum for subject in subjects), shares)
    placed = _place(groups, quotas, shares, len(subjects))
    _cover_classes(placed)
    _fill_empty(placed, remedy)

    out = [""] * len(subjects)
    for split, members in placed.items():
        for group in members:
            for index in group.members:
                out[index] = split
    return out


def leaking_groups(groups: Sequence[str | None], splits: Sequence[str]) -> list[str]:
    """Groups with images in more than one split: what is held out is then partly known from training."""
    sides = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        if group is not None:
            sides[group].add(split)
    return sorted(group for group, where in sides.items() if len(where) > 1)


def _groups(subjects: Sequence[Subject], seed: int) -> list[_Group]:
    """Groups in drawn order."""
    members = defaultdict(list)
    for index, subject in enumerate(subjects):
        own = subject.group is None
        members[(own, subject.name if own else str(subject.group))].append(index)
    groups = [
        _Group(
            members=tuple(indices),
            strata=Counter(subjects[index].stratum for index in indices),
            classes=frozenset(known for index in indices for known in subjects[index].classes),
            order=hashlib.blake2b(f"{seed}\0{own}\0{name}".encode(errors="surrogateescape"), digest_size=16).digest(),
        )
        for (own, name), indices in members.items()
    ]
    return sorted(groups, key=lambda group: group.order)


def _quotas(counts: Mapping[str, int], shares: Mapping[str, float]) -> Quotas:
    """Whole numbers per stratum and split: every share rounded down, and what is left over given, one per split at
    most, to the splits that are furthest below their total."""
    # Float products such as 100 * 0.29 fall just short of the whole number that is meant.
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
    groups: Sequence[_Group], quotas: Quotas, shares: Mapping[str, float], images: int
) -> dict[str, list[_Group]]:
    placed: dict[str, list[_Group]] = {split: [] for split in shares}
    lack = {split: {k: quota[split] for k, quota in quotas.items()} for split in shares}
    total = {split: sum(wants.values()) for split, wants in lack.items()}
    room = {
        group.members: [split for split in shares if split == "train" or group.size <= max(1.0, images * shares[split])]
        for group in groups
    }
    # Those that can only go to training come first, so that the others even out what they bring.
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
    """Moves the smallest group that has it to training for every class that training lacks."""
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
    """Moves one small group into every split that has none, without taking a class from training."""
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
