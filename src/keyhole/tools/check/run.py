"""`keyhole check`: opens every image before a run does, and says what would go wrong, with a fix beside it."""

from __future__ import annotations

import os
import queue
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keyhole.config.file import configuration, validate
from keyhole.config.settings import Config
from keyhole.data.companions import unused_masks
from keyhole.data.item import SPLITS, Doubt, Item, LeftOut
from keyhole.data.listing import PREVIEW_LIST, listed_previews
from keyhole.data.manifest import MISSING_FILE, Manifest, read_manifest, write_csv
from keyhole.errors import OutputError
from keyhole.inference.embed_items import items_to_embed, without_labels
from keyhole.patches.image_cache import fits
from keyhole.report.mask_preview import preview_names
from keyhole.tools.check.findings import (
    Finding,
    about_bits,
    about_content,
    about_images,
    about_labels,
    count_classes,
)
from keyhole.tools.check.look import Failed, Probed, Request, Trouble
from keyhole.tools.check.worker import ImageProbe
from keyhole.training.duration import Work
from keyhole.util.files import writable_folder

PROCESSES = 4
"""At a time, at most: each may hold a tile or a thumbnail of gigapixels in memory."""
LABELS = "one folder per class with its images in it, or a CSV with the columns image and label."
SKIP = "Or leave it out: --data.on-bad-image skip."
FIXES: Mapping[Trouble, str] = {
    "image": f"Copy it again from where it came, or convert it. {SKIP}",
    "settings": f"Change the patch settings. {SKIP}",
    "died": "Take it out of the data or convert it: reading it in a run would end the run.",
    "stalled": f"Copy it to a local disk, or allow more time with --run.stall. {SKIP}",
    "output": "Choose another folder: --previews DIR.",
    "unexpected": "This is a fault of the reader, not of the file: report it, and take the file out until then.",
}


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
        spreads: of width, height, levels, channels, mpp where known, and patches; of features their width.
        findings: errors first.
        left_out: files and rows that are not used at all.
        notes: what was decided, such as splits made.
        memory: whether decoded images would stay in memory, and why; empty for stored features.
        work: what a run has to do with these images.
        time: how long a run will take, where it is worth a line.
        reading: seconds of an image and of a patch on one thread, on average; None where nothing was read.
        previews: folder with a picture per image of the foreground mask and the patches, or None.
    """

    images: int
    classes: dict[str, dict[str, dict[str, int]]]
    spreads: dict[str, Spread]
    findings: tuple[Finding, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    memory: str
    previews: str | None = None
    work: Work | None = None
    reading: tuple[float, float] | None = None
    time: str = ""

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


def check(
    data: str | Path | Mapping[str, Any] | Config,
    *,
    deep: bool = False,
    previews: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    labels: bool = True,
    **settings: Any,
) -> CheckReport:
    """Reads the data set as a run would, opens every image and reads its first and last patch.

    Images are opened in processes that may die: a file that takes one down is a finding. Data without any labels, such
    as a folder of images for `predict`, are looked at without them.

    Args:
        data: as for `keyhole.train`: a folder, a CSV, a section, or a whole configuration.
        deep: also read files of equal size whole, to find those of equal content.
        previews: folder for a PNG per image that shows the foreground mask and the patches; made if need be. Also for
            images of which no patch is left. Stored features have none.
        progress: called with the images done and their number.
        labels: False looks at the images alone, whatever the folders and columns say.
        **settings: as for `keyhole.train`; `data`, `patch`, `select.m`, `train.seed`, `train.balance`, `run.threads`
            and `run.stall` are looked at.

    Raises:
        ConfigError: a setting is not as it must be.
        DataError: the data set cannot be read at all.
        OutputError: the previews cannot be written.
    """
    config = validate(configuration(data, settings))
    previews = None if previews is None else Path(previews)
    manifest = _read(config, labels)
    findings, left_out = _missing(manifest, config)
    findings += [Finding(doubt.name, doubt.problem, doubt.fix, "warning") for doubt in manifest.doubts]
    no_bits: dict[str, int] = {}
    requests = _requests(manifest.items, config, None if previews is None else writable_folder(previews))
    notes = [*manifest.notes, *unused_masks(manifest.items, config.patch.foreground)]
    if previews is not None:
        pictures = [Path(str(request.preview)).name for request in requests if not request.features]
        if removed := clear_previews(previews, pictures):
            plural = "preview" if removed == 1 else "previews"
            notes.append(f"{previews}: removed {removed} earlier {plural} of images that are not checked now")
        _list_previews(previews, requests)
    probed: dict[str, Probed] = {}
    results = _probe_all(requests, config, progress)
    for item, request, result in zip(manifest.items, requests, results, strict=True):
        if isinstance(result, Probed):
            probed[item.name] = result
        elif result.largest is not None:
            no_bits[item.name] = result.largest
        else:
            findings.append(_finding(item, request, result, config))
    good = [item for item in manifest.items if item.name in probed]
    findings += about_bits(no_bits, config)
    findings += about_labels(replace(manifest, items=tuple(good)), config)
    findings += about_images(good, probed, config)
    if deep:
        findings += about_content(good, manifest, config)
    decoded = sum(image.level_bytes for image in probed.values())
    resident, memory = fits(decoded, config.data.cache) if decoded else (False, "")
    return CheckReport(
        images=len(good),
        classes=count_classes(replace(manifest, items=tuple(good))),
        spreads=_spreads(list(probed.values())),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
        left_out=tuple(left_out),
        notes=tuple(note for note in notes if note not in {doubt.line() for doubt in manifest.doubts}),
        memory=memory,
        previews=None if previews is None else str(previews),
        work=_work(good, probed, config, resident),
        reading=_reading(list(probed.values())),
    )


def _read(config: Config, labels: bool) -> Manifest:
    """The data as training reads them, or as `predict` and `embed` do where there are no labels."""
    data = replace(config.data, on_bad_image="skip")
    if labels and not without_labels(data):
        return read_manifest(data, config.train.seed)
    assert data.path is not None
    items, left_out = items_to_embed(data.path, data.root, data.masks, "skip")
    doubt = Doubt("all images", "no labels, so only the images were looked at", f"To train on them: {LABELS}")
    return Manifest(
        items=tuple(replace(item, split="test") for item in items),
        tasks=(),
        left_out=tuple(LeftOut(name, reason) for name, reason in left_out.items()),
        notes=() if labels else ("labels were not looked at",),
        doubts=(doubt,) if labels else (),
    )


def _work(good: Sequence[Item], probed: Mapping[str, Probed], config: Config, resident: bool) -> Work:
    """What a run over the images that can be used has to do."""
    train, val = ([probed[item.name].patches for item in good if item.split == name] for name in ("train", "val"))
    sizes = len(train), sum(train), len(val), sum(val)
    return Work(*sizes, config.select.m, config.train.epochs, 0.0, resident)


def _reading(probed: Sequence[Probed]) -> tuple[float, float] | None:
    if not probed:
        return None
    return statistics.mean(x.image_seconds for x in probed), statistics.mean(x.patch_seconds for x in probed)


def _missing(manifest: Manifest, config: Config) -> tuple[list[Finding], list[LeftOut]]:
    """Files that a CSV names and that are not there: findings, unless the user said to leave them out."""
    if config.data.on_bad_image == "skip":
        return [], list(manifest.left_out)
    gone = [left for left in manifest.left_out if left.reason.startswith((MISSING_FILE, "not a regular file"))]
    fix = f"Correct the path, or say where relative paths start: --data.root. {SKIP}"
    return [Finding(left.name, left.reason, fix) for left in gone], [x for x in manifest.left_out if x not in gone]


def _requests(items: Sequence[Item], config: Config, previews: Path | None) -> list[Request]:
    pictures = preview_names([item.name for item in items])
    return [
        Request(
            path=str(item.source),
            patch=asdict(config.patch),
            image_mpp=item.mpp,
            mask=None if item.mask is None else str(item.mask),
            features=item.features is not None,
            name=item.name,
            preview=None if previews is None else str(previews / picture),
        )
        for item, picture in zip(items, pictures, strict=True)
    ]


def _list_previews(folder: Path, requests: Sequence[Request]) -> None:
    """Names the preview of each image, for people and for keyhole, which must not take them for images."""
    pictures = [request for request in requests if request.preview is not None and not request.features]
    if pictures:
        rows = [(request.name, Path(str(request.preview)).name) for request in pictures]
        write_csv(folder / PREVIEW_LIST, [("image", "preview"), *rows])


def clear_previews(folder: Path, pictures: Collection[str]) -> int:
    """Remove the previews of an earlier check, so that none of them is taken for one of this check.

    Args:
        folder: where the previews go.
        pictures: the file names that this check will write.

    Returns:
        The number of removed previews that this check does not write again.

    Raises:
        OutputError: a file that is not a preview would be overwritten.
    """
    earlier = listed_previews(folder)
    removable = {name for name in earlier if Path(name).name == name and name.endswith(".png")}
    for name in pictures:
        if name not in removable and os.path.lexists(folder / name):
            raise OutputError(f"{folder / name}: not a preview of keyhole check. Choose another folder: --previews DIR")
    present = {name for name in removable if (folder / name).is_file()}
    for name in present:
        (folder / name).unlink()
    if earlier:
        (folder / PREVIEW_LIST).unlink(missing_ok=True)
    return len(present - set(pictures))


def _probe_all(
    requests: Sequence[Request], config: Config, progress: Callable[[int, int], None] | None
) -> list[Probed | Failed]:
    """Every image's result, in order; a few processes at a time."""
    count = min(len(requests), PROCESSES, config.run.threads or os.cpu_count() or 1)
    probes = [ImageProbe(config.run.stall) for _ in range(count)]
    free: queue.SimpleQueue[ImageProbe] = queue.SimpleQueue()
    for probe in probes:
        free.put(probe)

    def examine(request: Request) -> Probed | Failed:
        probe = free.get()
        try:
            return probe.probe(request)
        finally:
            free.put(probe)

    results: list[Probed | Failed] = []
    pool = ThreadPoolExecutor(count, thread_name_prefix="keyhole-check")
    try:
        for result in pool.map(examine, requests):
            if isinstance(result, Failed) and result.trouble == "output":
                raise OutputError(result.problem)
            results.append(result)
            if progress is not None:
                progress(len(results), len(requests))
    finally:
        # After Ctrl-C, ending the processes also ends the threads that wait for them.
        pool.shutdown(wait=False, cancel_futures=True)
        for probe in probes:
            probe.kill()
        pool.shutdown()
        for probe in probes:
            probe.close()
    return results


def _finding(item: Item, request: Request, failed: Failed, config: Config) -> Finding:
    problem, fix = failed.problem, failed.fix  # where there is something better to say than in general
    if failed.previewed:
        problem = f"{problem}; see {request.preview}"
        fix = "Choose another --patch.foreground (`all` takes every patch), or a lower --patch.min-foreground."
    if config.data.on_bad_image == "skip" and failed.trouble in ("image", "settings", "stalled"):
        return Finding(item.name, problem, "It will be left out, as --data.on-bad-image skip says.", "warning")
    if fix and failed.trouble in ("image", "settings"):
        fix = f"{fix.rstrip('.')}. {SKIP}"
    return Finding(item.name, problem, fix or FIXES[failed.trouble])


def _spreads(probed: Sequence[Probed]) -> dict[str, Spread]:
    images = [image for image in probed if image.size.width]
    quantities: dict[str, list[float]] = {
        "width": [image.size.width for image in images],
        "height": [image.size.height for image in images],
        "levels": [image.levels for image in images],
        "channels": [image.channels for image in images],
        "feature width": [image.channels for image in probed if not image.size.width],
        "mpp": [image.mpp for image in images if image.mpp is not None],
        "patches": [image.patches for image in probed],
    }
    return {
        name: Spread(min(values), statistics.median(values), max(values), sum(values))
        for name, values in quantities.items()
        if values
    }


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"
