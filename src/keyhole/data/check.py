"""`keyhole check`: opens every image before a run does, and says what would go wrong, with a fix beside it."""

from __future__ import annotations

import os
import queue
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from keyhole.config import Config
from keyhole.data.check_worker import Failed, ImageProbe, Probed, Trouble
from keyhole.data.hashes import hash_files
from keyhole.data.item import SPLITS, Item, LeftOut
from keyhole.data.manifest import MISSING_FILE, Manifest, read_manifest
from keyhole.data.settle import classes_of
from keyhole.data.splits import leaking_groups
from keyhole.errors import ImageError
from keyhole.store import fits
from keyhole.wording import listed

PROCESSES = 4
"""At a time, at most: each may hold a tile or a thumbnail of gigapixels in memory."""
IMBALANCE = 10
"""A class this many times larger than another is worth a word."""

SKIP = "Or leave it out: --data.on-bad-image skip."
FIXES: Mapping[Trouble, str] = {
    "image": f"Copy it again from where it came, or convert it. {SKIP}",
    "settings": f"Change the patch settings. {SKIP}",
    "died": "Take it out of the data or convert it: reading it in a run would end the run.",
    "stalled": f"Copy it to a local disk, or allow more time with --run.stall. {SKIP}",
    "unexpected": "This is a fault of the reader, not of the file: report it, and take the file out until then.",
}


@dataclass(frozen=True)
class Finding:
    """Something that would go wrong (error) or is worth knowing (warning), and what to do about it."""

    name: str
    problem: str
    fix: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of a quantity over the images, and the sum."""

    min: float
    median: float
    max: float
    total: float


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        images: how many can be used.
        classes: per task and class, the labels per split; a regression has the one class `value`.
        spreads: of width, height, levels, patches, mpp where known.
        findings: errors first.
        left_out: files and rows that are not used at all.
        notes: what was decided, such as splits made.
        memory: whether decoded images would stay in memory, and why.
    """

    images: int
    classes: dict[str, dict[str, dict[str, int]]]
    spreads: dict[str, Spread]
    findings: tuple[Finding, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    memory: str

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way of a run."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {"ok": self.ok, **asdict(self)}

    def table(self) -> list[list[str]]:
        """Header and a row per quantity: the images' sizes and patch counts."""
        rows = [["", "min", "median", "max", "total"]]
        for name, spread in self.spreads.items():
            total = f"{spread.total:,.0f}" if name == "patches" else ""
            rows.append([name, *(_shown(value) for value in (spread.min, spread.median, spread.max)), total])
        return rows

    def class_table(self) -> list[list[str]]:
        """Header and a row per task and class: images per split."""
        rows = [["task", "class", *SPLITS]]
        for task, classes in self.classes.items():
            rows += [[task, name, *(str(count[split]) for split in SPLITS)] for name, count in classes.items()]
        return rows

    def finding_table(self) -> list[list[str]]:
        """Header and a row per finding."""
        rows = [["", "image", "problem", "fix"]]
        return rows + [[found.severity, found.name, found.problem, found.fix] for found in self.findings]


def check(config: Config, *, deep: bool = False, progress: Callable[[int, int], None] | None = None) -> CheckReport:
    """Reads the data set as a run would, opens every image and reads its first and last patch.

    Images are opened in processes that may die: a file that takes one down is a finding.

    Args:
        config: `data`, `patch`, `select.m`, `train.seed`, `train.balance`, `run.threads` and `run.stall` are looked at.
        deep: also read files of equal size whole, to find those of equal content.
        progress: called with the images done and their number.

    Raises:
        DataError: the data set cannot be read at all.
    """
    manifest = read_manifest(replace(config.data, on_bad_image="skip"), config.train.seed)
    findings, left_out = _missing(manifest, config)
    probed: dict[str, Probed] = {}
    for item, result in zip(manifest.items, _probe_all(manifest.items, config, progress), strict=True):
        if isinstance(result, Probed):
            probed[item.name] = result
        else:
            findings.append(_finding(item, result, config))
    good = [item for item in manifest.items if item.name in probed]
    findings += _about_labels(replace(manifest, items=tuple(good)), config)
    findings += _about_images(probed, config)
    if deep:
        findings += _about_content(good, manifest, config)
    return CheckReport(
        images=len(good),
        classes=_classes(replace(manifest, items=tuple(good))),
        spreads=_spreads(list(probed.values())),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
        left_out=tuple(left_out),
        notes=manifest.notes,
        memory=fits(sum(image.level_bytes for image in probed.values()), config.data.cache)[1],
    )


def _missing(manifest: Manifest, config: Config) -> tuple[list[Finding], list[LeftOut]]:
    """Files that a CSV names and that are not there: findings, unless the user said to leave them out."""
    if config.data.on_bad_image == "skip":
        return [], list(manifest.left_out)
    gone = [left for left in manifest.left_out if left.reason.startswith((MISSING_FILE, "not a regular file"))]
    fix = f"Correct the path, or say where relative paths start: --data.root. {SKIP}"
    return [Finding(left.name, left.reason, fix) for left in gone], [x for x in manifest.left_out if x not in gone]


def _probe_all(
    items: Sequence[Item], config: Config, progress: Callable[[int, int], None] | None
) -> list[Probed | Failed]:
    """Every image's result, in order; a few processes at a time."""
    patch = asdict(config.patch)
    count = min(len(items), PROCESSES, config.run.threads or os.cpu_count() or 1)
    probes = [ImageProbe(config.run.stall) for _ in range(count)]
    free: queue.SimpleQueue[ImageProbe] = queue.SimpleQueue()
    for probe in probes:
        free.put(probe)

    def examine(item: Item) -> Probed | Failed:
        probe = free.get()
        try:
            return probe.probe(item.image, item.mpp, patch)
        finally:
            free.put(probe)

    results: list[Probed | Failed] = []
    pool = ThreadPoolExecutor(count, thread_name_prefix="keyhole-check")
    try:
        for result in pool.map(examine, items):
            results.append(result)
            if progress is not None:
                progress(len(results), len(items))
    finally:
        # After Ctrl-C, ending the processes also ends the threads that wait for them.
        pool.shutdown(wait=False, cancel_futures=True)
        for probe in probes:
            probe.kill()
        pool.shutdown()
        for probe in probes:
            probe.close()
    return results


def _finding(item: Item, failed: Failed, config: Config) -> Finding:
    # Messages end with what to do as a sentence of its own, where there is something better to say than in general.
    problem, _, fix = failed.problem.partition(". ")
    if config.data.on_bad_image == "skip" and failed.trouble in ("image", "settings", "stalled"):
        return Finding(item.name, problem, "It will be left out, as --data.on-bad-image skip says.", "warning")
    if fix and failed.trouble in ("image", "settings"):
        fix = f"{fix.rstrip('.')}. {SKIP}"
    return Finding(item.name, problem, fix or FIXES[failed.trouble])


def _classes(manifest: Manifest) -> dict[str, dict[str, dict[str, int]]]:
    classes: dict[str, dict[str, dict[str, int]]] = {}
    for task in manifest.tasks:
        names = task.classes or ("value",)
        counts = Counter(
            (name, item.split)
            for item in manifest.items
            for name in (classes_of(task, item) if task.classes else names if item.labels[task.name] else ())
        )
        classes[task.name] = {name: {split: counts[name, split] for split in SPLITS} for name in names}
    return classes


def _spreads(probed: Sequence[Probed]) -> dict[str, Spread]:
    quantities: dict[str, list[float]] = {
        "width": [image.size.width for image in probed],
        "height": [image.size.height for image in probed],
        "levels": [image.levels for image in probed],
        "channels": [image.channels for image in probed],
        "mpp": [image.mpp for image in probed if image.mpp is not None],
        "patches": [image.patches for image in probed],
    }
    return {
        name: Spread(min(values), statistics.median(values), max(values), sum(values))
        for name, values in quantities.items()
        if values
    }


def _about_labels(manifest: Manifest, config: Config) -> list[Finding]:
    found = []
    for task, classes in _classes(manifest).items():
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
                found.append(Finding(task, problem, "Give more images, or a `split` column.", "warning"))
    leaking = leaking_groups([item.group for item in manifest.items], [item.split for item in manifest.items])
    for group in leaking:
        problem = "group with images in more than one split: what is held out is partly known from training"
        found.append(Finding(group, problem, "Put the whole group into one split.", "warning"))
    return found


def _about_images(probed: Mapping[str, Probed], config: Config) -> list[Finding]:
    found = []
    most = max((image.patches for image in probed.values()), default=0)
    if probed and config.select.m >= most:
        problem = f"select.m (={config.select.m}) keeps every patch (at most {most} per image): selection does nothing"
        found.append(Finding("all images", problem, "Use a smaller --select.m, or smaller patches.", "warning"))
    mpps = [image.mpp for image in probed.values() if image.mpp is not None]
    if mpps and config.patch.mpp is None and max(mpps) > 1.5 * min(mpps):
        problem = f"from {min(mpps):g} to {max(mpps):g} microns per pixel: patches show areas of different size"
        found.append(Finding("all images", problem, f"Read at one resolution: --patch.mpp {max(mpps):g}.", "warning"))
    if len({image.channels for image in probed.values()}) > 1:
        grey = [name for name, image in probed.items() if image.channels == 1]
        problem = f"{len(grey)} grey images among colour ones: {listed(grey)}"
        fix = "Make sure that colour does not tell the classes apart; --model.channels 1 reads all as grey."
        found.append(Finding("all images", problem, fix, "warning"))
    return found


def _about_content(items: Sequence[Item], manifest: Manifest, config: Config) -> list[Finding]:
    """Files that are the same byte for byte: worst where they are on two sides or have two labels."""
    by_size = defaultdict(list)
    for item in items:
        try:
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


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"
