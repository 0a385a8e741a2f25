"""What `keyhole check` has to say about images that can be opened: labels, sizes, resolutions, equal contents."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from keyhole.config.settings import Config
from keyhole.data.hashes import hash_files
from keyhole.data.item import SPLITS, Item
from keyhole.data.manifest import Manifest
from keyhole.data.resolution import Resolution
from keyhole.data.splits import give_splits, leaking_groups
from keyhole.errors import ImageError
from keyhole.patches.features.origin import Origin
from keyhole.tools.check.look import DARK, Probed
from keyhole.util.wording import listed

IMBALANCE = 10
"""A class this many times larger than another is worth a word."""

STEADY_PATCHES = 16
"""Patches of a step below which the statistics of batch norm are mostly noise (Wu and He 2018, Group Normalization)."""

WITHOUT_BATCH_NORM = ("vit", "deit", "swin", "convnext", "beit", "eva", "mixer", "dino")
"""How timm's encoders with layer norm instead of batch norm are called."""

MPP_DIFFERS = 0.05
"""Share by which the microns per pixel of the CSV and of the file may differ: rounding, and what scanners calibrate."""


@dataclass(frozen=True)
class Finding:
    """Something that would go wrong (error) or is worth knowing (warning), and what to do about it."""

    name: str
    problem: str
    fix: str
    severity: Literal["error", "warning"] = "error"


def count_classes(manifest: Manifest) -> dict[str, dict[str, dict[str, int]]]:
    """Labels per task, class and split; a regression has the one class `value`."""
    classes: dict[str, dict[str, dict[str, int]]] = {}
    for task in manifest.tasks:
        names = task.classes or ("value",)
        counts = Counter(
            (name, item.split)
            for item in manifest.items
            for name in (
                task.classes_of(item.labels[task.name]) if task.classes else names if item.labels[task.name] else ()
            )
        )
        classes[task.name] = {name: {split: counts[name, split] for split in SPLITS} for name in names}
    return classes


def about_labels(manifest: Manifest, config: Config) -> list[Finding]:
    """Return what is odd about the labels of the images that open: missing or rare classes, groups in two splits."""
    found = []
    for task, classes in count_classes(manifest).items():
        train = {name: count["train"] for name, count in classes.items()}
        largest, smallest = max(train, key=lambda name: train[name]), min(train, key=lambda name: train[name])
        if train[smallest] == 0:
            problem = f"no usable training image of class {smallest!r}"
            found.append(Finding(task, problem, "Repair the images of that class, or take the class out."))
        elif train[largest] >= IMBALANCE * train[smallest] and config.train.balance == "none":
            problem = f"{train[largest]} training images of {largest!r}, but {train[smallest]} of {smallest!r}"
            found.append(Finding(task, problem, "Weigh the classes: --train.balance loss.", "warning"))
        for split in ("val", "test"):
            lacking = [name for name, count in classes.items() if not count[split]]
            if manifest.split(split) and lacking:
                problem = f"no {split} image of {listed(map(repr, lacking))}: its figures will be missing"
                fix = f"Add images, or {give_splits(config.data.path)}."
                found.append(Finding(task, problem, fix, "warning"))
    leaking = leaking_groups([item.group for item in manifest.items], [item.split for item in manifest.items])
    for group in leaking:
        problem = "group with images in more than one split: what is held out is partly known from training"
        found.append(Finding(group, problem, "Put the whole group into one split.", "warning"))
    return found


def about_bits(largest: Mapping[str, int], config: Config) -> list[Finding]:
    """Findings on images of 16 bits that cannot be read as long as nobody says how many bits are in use.

    Args:
        largest: value of each image.
        config: says whether such images are left out.
    """
    if not largest:
        return []
    most = max(largest.values())
    problem = f"16 bits a value, and the file does not say how many are in use; largest value {most:,} of 65,535"
    fix = (
        "Say how many bits the camera or scanner uses, the same for all images: "
        f"--patch.bits {max(8, most.bit_length())} holds the largest value; 16 takes them as they are."
    )
    name, which = _together(list(largest))
    skip = config.data.on_bad_image == "skip"
    fix += " Until then they are left out." if skip else ""
    return [Finding(name, problem + which, fix, "warning" if skip else "error")]


def about_images(items: Sequence[Item], probed: Mapping[str, Probed], config: Config) -> list[Finding]:
    """Return what is odd about the patches, resolutions and colours of `items`, all of which could be opened."""
    found = []
    most = max((image.patches for image in probed.values()), default=0)
    if probed and config.select.m >= most:
        problem = f"select.m (={config.select.m}) keeps every patch (at most {most} per image): selection does nothing"
        found.append(Finding("all images", problem, "Use a smaller --select.m, or smaller patches.", "warning"))
    found += _about_batch_norm(items, probed, config)
    if any(item.features is not None for item in items):
        return found + _about_features(probed)
    found += _about_resolution(items, probed, config)
    if len({image.channels for image in probed.values()}) > 1:
        grey = [name for name, image in probed.items() if image.channels == 1]
        problem = f"{len(grey)} grey images among colour ones: {listed(grey)}"
        fix = "Make sure that colour does not tell the classes apart; --model.channels 1 reads all as grey."
        found.append(Finding("all images", problem, fix, "warning"))
    found += _about_values(probed)
    for name, image in probed.items():
        if image.preview_problem:
            fix = "A run does not read that resolution; other programs may fail on the file."
            found.append(Finding(name, f"no preview: {image.preview_problem}", fix, "warning"))
    return found


def _about_batch_norm(items: Sequence[Item], probed: Mapping[str, Probed], config: Config) -> list[Finding]:
    """Steps of so few patches that batch norm has nothing to take a mean over."""
    features = any(item.features is not None for item in items)
    learns = sum(item.split == "train" for item in items)
    without = config.model.freeze or config.model.encoder.startswith(WITHOUT_BATCH_NORM)
    if not learns or (without and not features):
        return []
    kept = min(config.select.m, round(median(image.patches for image in probed.values())))
    patches = min(config.train.batch, learns) * kept
    if patches >= STEADY_PATCHES:
        return []
    where = "the projection of features" if features else f"the encoder ({config.model.encoder})"
    problem = f"a step learns from {patches} {'patch' if patches == 1 else 'patches'} (train.batch x select.m)"
    fix = f"Raise --select.m or --train.batch, to {STEADY_PATCHES} patches or more."
    return [Finding("training", f"{problem}, few for the batch norm of {where}", fix, "warning")]


def _about_resolution(items: Sequence[Item], probed: Mapping[str, Probed], config: Config) -> list[Finding]:
    """Microns per pixel that differ between images, between CSV and file, or that a file does not say credibly."""
    found = []
    spread = Resolution.of(image.mpp for image in probed.values()).spread()
    if spread is not None and config.patch.mpp is None:
        found.append(Finding("all images", *spread, severity="warning"))
    noted = defaultdict(list)
    for item in items:
        image = probed[item.name]
        if item.mpp is not None and image.file_mpp is not None:
            if abs(item.mpp / image.file_mpp - 1) > MPP_DIFFERS:
                problem = (
                    f"{item.mpp:g} microns per pixel in the CSV, {image.file_mpp:.4g} in the file; the CSV's is used"
                )
                found.append(
                    Finding(item.name, problem, "Correct the column `mpp`, or leave it empty there.", "warning")
                )
        elif item.mpp is None and image.mpp_note:
            noted[image.mpp_note].append(item.name)
    for note, names in noted.items():
        name, which = _together(names)
        fix = "Give the right value in a column `mpp`; it matters where --patch.mpp is set."
        found.append(Finding(name, f"microns per pixel are not known ({note}){which}", fix, "warning"))
    return found


def _about_values(probed: Mapping[str, Probed]) -> list[Finding]:
    """Pictures of one value, nearly black ones, and files with more pictures than the one that is read."""
    found = []
    flat, dark, noted = [], [], defaultdict(list)
    for name, image in probed.items():
        if image.darkest >= image.brightest:
            flat.append(name)
        elif image.brightest < DARK:
            dark.append(name)
        if image.note:
            noted[image.note].append(name)
    if flat:
        name, which = _together(flat)
        fix = "Look at it: there is nothing to learn from. Export it again, or leave it out."
        found.append(Finding(name, f"every pixel looked at has one value{which}", fix, "warning"))
    if dark:
        name, which = _together(dark)
        brightest = max(probed[name].brightest for name in dark)
        problem = f"nearly black: no pixel looked at is above {brightest} of 255{which}"
        fix = (
            "Where its values use fewer bits than the file holds, say how many: --patch.bits; else export it brighter."
        )
        found.append(Finding(name, problem, fix, "warning"))
    for note, names in noted.items():
        name, which = _together(names)
        found.append(Finding(name, f"{note}{which}", "Save what else you want as files of their own.", "warning"))
    return found


def _together(names: Sequence[str]) -> tuple[str, str]:
    """What to call one or several images in a finding, and what to add to its problem: which they are."""
    return (names[0], "") if len(names) == 1 else (f"{len(names)} images", f": {listed(names)}")


def _about_features(probed: Mapping[str, Probed]) -> list[Finding]:
    by_width = defaultdict(list)
    for name, image in probed.items():
        by_width[image.channels].append(name)
    if len(by_width) > 1:
        problem = "stored features of different widths: " + "; ".join(
            f"{width} in {listed(names)}" for width, names in sorted(by_width.items())
        )
        return [Finding("all images", problem, "Use features of one encoder for all images.")]
    origins = {name: Origin(**image.origin) for name, image in probed.items()}
    first = next((origin for origin in origins.values() if origin.known), Origin())
    others = [name for name, origin in origins.items() if first.excludes(origin)]
    if others:
        problem = f"stored features of {first.describe()}, but of {origins[others[0]].describe()} in {listed(others)}"
        return [Finding("all images", problem, "Use features of one encoder for all images.")]
    doubts = defaultdict(list)
    for name, origin in origins.items():
        doubts[origin.doubt(first)].append(name)
    fix = "This may be intended: training says the same and goes on."
    found = []
    for doubt, names in doubts.items():
        if doubt:
            name, which = _together(names)
            found.append(Finding(name, f"{doubt}{which}", fix, "warning"))
    return found


def about_content(items: Sequence[Item], manifest: Manifest, config: Config) -> list[Finding]:
    """Files that are the same byte for byte: worst where they are on two sides or have two labels."""
    by_size = defaultdict(list)
    for item in items:
        item = replace(item, image=item.source)
        try:
            if not item.image.is_dir():
                by_size[item.image.stat().st_size].append(item)
        except OSError as error:
            raise ImageError(item.image, f"was there a moment ago ({error.strerror}). Run the check again.") from error
    alike = [item for group in by_size.values() if len(group) > 1 for item in group]
    hashes = hash_files(alike, config.run.threads, config.run.stall)
    same = defaultdict(list)
    for item in alike:
        same[hashes[item.name].sha256].append(item)
    found = []
    for copies in same.values():
        if len(copies) < 2:
            continue
        problem = f"same content as {listed(copy.name for copy in copies[1:])}"
        differ = [task.name for task in manifest.tasks if len({copy.labels[task.name] for copy in copies}) > 1]
        splits = sorted({copy.split for copy in copies}, key=SPLITS.index)
        if differ:
            problem += f", with another {' and '.join(differ)}"
        if len(splits) > 1:
            problem += f", in {' and '.join(splits)}"
        found.append(Finding(copies[0].name, problem, "Keep one of them, or give them one group.", "warning"))
    return found
