"""`keyhole check`: open every image before a run does, and report what would go wrong, each with a fix."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keyhole.config.file import configuration
from keyhole.config.settings import Config
from keyhole.data.companions import unused_masks
from keyhole.data.item import SPLITS, Finding, LeftOut, warning
from keyhole.data.listing import PREVIEW_LIST, listed_previews
from keyhole.data.manifest import Manifest, read_manifest
from keyhole.data.rows import MISSING_FILE
from keyhole.data.unlabelled import items_to_embed, without_labels
from keyhole.errors import OutputError
from keyhole.patches.features import idle_patch_settings
from keyhole.patches.image_cache import fits
from keyhole.report.mask_preview import preview_names
from keyhole.tools.check.findings import about_bits, about_content, about_images, about_labels, count_classes
from keyhole.tools.check.look import Failed, Probed, Request, Trouble
from keyhole.tools.check.worker import probe_all
from keyhole.training.duration import Work
from keyhole.util.files import csv_text, encoded, writable_folder, write_atomic
from keyhole.util.wording import counted

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
    """A quantity over the images."""

    min: float
    median: float
    max: float
    total: float


@dataclass(frozen=True)
class CheckReport:
    """What `check` found."""

    images: int  # that can be used
    classes: dict[str, dict[str, dict[str, int]]]  # labels per task, class and split; a regression has `value`
    spreads: dict[str, Spread]  # of width, height, levels, channels, mpp where known, patches, width of features
    findings: tuple[Finding, ...]  # errors first
    left_out: tuple[LeftOut, ...]  # files and rows that are not used
    notes: tuple[str, ...]  # decisions, such as drawn splits
    memory: str  # says whether decoded images would stay in memory; empty for stored features
    previews: str | None = None  # folder with a preview of each image
    work: Work | None = None  # of a run over these images
    reading: tuple[float, float] | None = None  # mean seconds of an image and of a patch on one thread
    time: str = ""  # estimated duration of a run, in words; empty for a short one

    def __repr__(self) -> str:
        """Return for example `CheckReport(383 images, 1 error, 2 warnings)`."""
        kinds = Counter(finding.severity for finding in self.findings)
        return f"CheckReport({', '.join([counted(self.images), *(counted(n, kind) for kind, n in kinds.items())])})"

    @property
    def ok(self) -> bool:
        """True if nothing would stop a run."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts and lists."""
        return {"ok": self.ok, **asdict(self)}

    def table(self) -> list[list[str]]:
        """Return a header and a row per quantity: sizes and numbers of patches."""
        rows = [["", "min", "median", "max", "total"]]
        for name, spread in self.spreads.items():
            total = f"{spread.total:,.0f}" if name == "patches" else ""
            rows.append([name, *(_shown(value) for value in (spread.min, spread.median, spread.max)), total])
        return rows

    def class_table(self) -> list[list[str]]:
        """Return a header and a row per task and class: images per split."""
        rows = [["task", "class", *SPLITS]]
        for task, classes in self.classes.items():
            rows += [[task, name, *(str(count[split]) for split in SPLITS)] for name, count in classes.items()]
        return rows


def check(
    data: str | Path | Mapping[str, Any] | Config,
    *,
    deep: bool = False,
    previews: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    labels: bool = True,
    **settings: Any,
) -> CheckReport:
    """Read a data set as a run would, open every image, and read its first and last patch.

    Images are opened in separate processes: a file that crashes one is a finding. Data without labels, such as a folder
    of images for `predict`, are checked without them.

    Args:
        data: as for `keyhole.train`: a folder, a CSV, a section, or a whole configuration.
        deep: also find files of equal content.
        previews: folder for a PNG per image that shows the foreground mask and the patches, also if no patch is left;
            created if needed. Stored features have none.
        progress: called with the number of images done and of all images.
        labels: False checks the images alone, whatever the folders and columns are.
        **settings: as for `keyhole.train`; `data`, `patch`, `select.m`, `train.seed`, `train.balance`, `run.threads`
            and `run.stall` are used.

    Returns:
        What was found.

    Raises:
        ConfigError: a setting is invalid.
        DataError: the data set cannot be read at all.
        OutputError: the previews cannot be written.

    Example:
        >>> import keyhole
        >>> from PIL import Image
        >>> for number in range(8):
        ...     Image.new("L", (64, 32), 25 * number).save(f"{number}.png")
        >>> rows = [f"{number}.png,{'dark' if number < 4 else 'light'}" for number in range(8)]
        >>> _ = Path("tones.csv").write_text("\\n".join(["image,tone", *rows]))
        >>> report = keyhole.check("tones.csv", patch={"size": 16}, run={"threads": 1})
        >>> report.ok, report.images, report.spreads["patches"].max
        (True, 8, 8)
        >>> report.findings[-1].problem.partition(":")[0]
        'all pixels that were read have one value'
    """
    config = configuration(data, settings)
    folder = None if previews is None else writable_folder(previews)
    manifest = _read(config, labels)
    findings, left_out = _missing(manifest, config)
    findings += manifest.doubts
    pictures = preview_names([item.name for item in manifest.items])
    requests = [
        Request(item, config.patch.model_dump(), folder and folder / picture)
        for item, picture in zip(manifest.items, pictures, strict=True)
    ]
    doubts = {doubt.line() for doubt in manifest.doubts}
    notes = [note for note in manifest.notes if note not in doubts]
    notes += unused_masks(manifest.items, config.patch.foreground)
    if any(item.features is not None for item in manifest.items):
        notes += idle_patch_settings(config)
    if folder is not None:
        notes += _list_previews(folder, requests)
    probed: dict[str, Probed] = {}
    unknown_bits: dict[str, int] = {}
    with closing(probe_all(requests, config.run.stall, config.run.threads)) as results:
        for done, (request, result) in enumerate(zip(requests, results, strict=True), start=1):
            item = request.item
            if isinstance(result, Probed):
                probed[item.name] = result
            elif result.trouble == "output":
                raise OutputError(result.problem)
            elif result.largest is not None:
                unknown_bits[item.name] = result.largest
            else:
                findings.append(_finding(request, result, config))
            if progress is not None:
                progress(done, len(requests))
    good = [item for item in manifest.items if item.name in probed]
    usable = replace(manifest, items=tuple(good))
    findings += [*about_bits(unknown_bits, config), *about_labels(usable, config), *about_images(good, probed, config)]
    if deep:
        findings += about_content(good, manifest, config)
    decoded = sum(image.level_bytes for image in probed.values())
    resident, memory = fits(decoded, config.data.cache) if decoded else (False, "")
    train, val = ([probed[item.name].patches for item in good if item.split == name] for name in ("train", "val"))
    opening = [image.image_seconds for image in probed.values()]
    reading = [image.patch_seconds for image in probed.values()]
    return CheckReport(
        images=len(good),
        classes=count_classes(usable),
        spreads=_spreads(list(probed.values())),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
        left_out=tuple(left_out),
        notes=tuple(notes),
        memory=memory,
        previews=None if folder is None else str(folder),
        work=Work(len(train), sum(train), len(val), sum(val), config.select.m, config.train.epochs, 0.0, resident),
        reading=(statistics.mean(opening), statistics.mean(reading)) if probed else None,
    )


def _read(config: Config, labels: bool) -> Manifest:
    """Read the data as training does or, without labels, as `embed` does."""
    data = config.data.replace(on_bad_image="skip")
    if labels and not without_labels(data):
        return read_manifest(data, config.train.seed)
    assert data.path is not None
    items, left_out = items_to_embed(data.path, data.root, data.masks, "skip")
    doubt = warning("all images", "no labels, so only the images were checked", f"To train on them: {LABELS}")
    return Manifest(
        items=tuple(replace(item, split="test") for item in items),
        tasks=(),
        left_out=tuple(LeftOut(name, reason) for name, reason in left_out.items()),
        notes=() if labels else ("labels were not checked",),
        doubts=(doubt,) if labels else (),
    )


def _missing(manifest: Manifest, config: Config) -> tuple[list[Finding], list[LeftOut]]:
    """Return findings about missing files, unless the user leaves them out, and what else is left out."""
    if config.data.on_bad_image == "skip":
        return [], list(manifest.left_out)
    gone = [left for left in manifest.left_out if left.reason.startswith((MISSING_FILE, "not a regular file"))]
    fix = f"Correct the path, or say where relative paths start: --data.root. {SKIP}"
    return [Finding(left.name, left.reason, fix) for left in gone], [x for x in manifest.left_out if x not in gone]


def _list_previews(folder: Path, requests: Sequence[Request]) -> list[str]:
    """Remove the previews of an earlier check and list the new ones; return a note about those removed for good."""
    images = [request for request in requests if request.item.features is None]
    rows = [(request.item.name, request.preview.name) for request in images if request.preview is not None]
    pictures = {picture for _, picture in rows}
    earlier = {name for name in listed_previews(folder) if Path(name).name == name and name.endswith(".png")}
    for name in sorted(pictures - earlier):
        if os.path.lexists(folder / name):
            raise OutputError(f"{folder / name}: not a preview of keyhole check. Choose another folder: --previews DIR")
    present = {name for name in earlier if (folder / name).is_file()}
    for name in present:
        (folder / name).unlink()
    if listed_previews(folder):
        (folder / PREVIEW_LIST).unlink()
    if rows:
        write_atomic(folder / PREVIEW_LIST, encoded(csv_text([("image", "preview"), *rows])))
    removed = len(present - pictures)
    said = f"{folder}: removed {counted(removed, 'earlier preview')} of images that are not checked now"
    return [said] if removed else []


def _finding(request: Request, failed: Failed, config: Config) -> Finding:
    name, problem, fix = request.item.name, failed.problem, failed.fix
    if failed.previewed:
        problem = f"{problem}; see {request.preview}"
    if failed.previewed and "--previews" in fix:
        fix = "Choose another --patch.foreground (`all` takes every patch), or a lower --patch.min-foreground."
    if config.data.on_bad_image == "skip" and failed.trouble in ("image", "settings", "stalled"):
        return Finding(name, problem, "It will be left out, as --data.on-bad-image skip says.", "warning")
    if fix and failed.trouble in ("image", "settings"):
        fix = f"{fix.rstrip('.')}. {SKIP}"
    return Finding(name, problem, fix or FIXES[failed.trouble])


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
