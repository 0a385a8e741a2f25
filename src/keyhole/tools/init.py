"""A configuration for a data set, from what can be measured on it: the logic of `keyhole init`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Literal, cast

from keyhole.config.settings import Bits, Config
from keyhole.data.item import SPLITS
from keyhole.data.manifest import Manifest, read_manifest
from keyhole.errors import BitsUnknown, ConfigError, DataError, ImageError
from keyhole.images import open_image
from keyhole.images.geometry import Size
from keyhole.images.pixels import DEEP
from keyhole.loading import Reader
from keyhole.patches.edge import Edge
from keyhole.patches.grid import NoPatches
from keyhole.patches.opener import FileOpener

SAMPLE = 100
"""Images opened to measure sizes."""
COUNTED = 10
"""Images whose patches are counted where a foreground has to be found first."""
SLIDE_MPP = 0.5
"""Microns per pixel to read microscopy at: 20x shows nuclei, with a quarter of the patches of 40x."""


@dataclass(frozen=True)
class Measured:
    """What the images and labels say."""

    manifest: Manifest  # as training would read it
    sizes: tuple[Size, ...]  # level-0 sizes of the images opened
    mpp: tuple[float | None, ...]  # microns per pixel of each, from the CSV or the file
    grey: bool  # all images are
    pyramids: bool  # all images have more than one level
    largest: int | None = None  # value in 16-bit images that do not state how many bits they use


@dataclass(frozen=True)
class Proposal:
    """A configuration, the reason for its values by the setting's name, and what was measured."""

    config: Config
    reasons: Mapping[str, str]
    summary: tuple[str, ...]


def measure(config: Config) -> Measured:
    """Read the labels and open up to `SAMPLE` images, spread over the data set."""
    manifest = read_manifest(config.data, config.train.seed)
    if any(item.features is not None for item in manifest.items):
        raise ConfigError(
            f"{config.data.path}: keyhole init measures images, and these are stored features, of which there is "
            "little to measure. Begin with: keyhole train DATA --recipe camelyon16-features, and lower select.m"
        )
    step = max(1, len(manifest.items) // SAMPLE)
    sizes, mpp, grey, pyramids, largest = [], [], [], [], []
    with Reader(threads=1, stall=config.run.stall) as reader:
        for item in manifest.items[::step]:
            try:
                try:
                    image = reader.run(str(item.image), partial(open_image, item.image, config.patch.bits))
                except BitsUnknown as error:
                    largest.append(error.largest)
                    image = reader.run(str(item.image), partial(open_image, item.image, DEEP))
                else:
                    if image.bits == DEEP:
                        largest.append(2**DEEP - 1)
            except ImageError:
                if config.data.on_bad_image == "fail":
                    raise
                continue
            with image:
                sizes.append(image.size)
                grey.append(image.channels == 1)
                pyramids.append(len(image.levels) > 1)
                mpp.append(item.mpp if item.mpp is not None else image.mpp)
    if not sizes:
        raise DataError(f"{config.data.path}: none of the images opened can be read; keyhole check says why")
    return Measured(manifest, tuple(sizes), tuple(mpp), all(grey), all(pyramids), max(largest, default=None))


def propose(config: Config, measured: Measured) -> Proposal:
    """Return `config` with values that suit the data, by rough rules: the run fits on small machines and learns."""
    reasons: dict[str, str] = {}
    mpp = _common_mpp(measured, reasons)
    sides = [  # shorter side of each image in pixels, at the scale to be read
        min(size) * (own / mpp if mpp is not None and own is not None else 1.0)
        for size, own in zip(measured.sizes, measured.mpp, strict=True)
    ]
    shorter, aspect = median(sides), median(max(size) / min(size) for size in measured.sizes)
    size = max(1, min(max(32, min(224, round(shorter / 16 / 16) * 16)), int(min(sides))))
    bits = config.patch.bits
    if measured.largest is not None and bits is None:
        bits = cast(Bits, max(8, measured.largest.bit_length()))
        reasons["patch.bits"] = (
            f"the largest value of the 16-bit images opened is {measured.largest:,}; see the camera's"
        )
    reasons["patch.size"] = f"about a sixteenth of the median shorter side, {shorter:,.0f} px, from 32 to 224"
    patches = -(-shorter // size) * -(-shorter * aspect // size)
    m = _kept(patches)
    reasons["select.m"] = f"about an eighth of the {patches:,.0f} patches of a typical image, from 4 to 256"
    edge: Edge = "background" if measured.pyramids else "shift"
    reasons["patch.edge"] = (
        "the images have several levels, as slides do, and their border is glass"
        if measured.pyramids
        else "photographs show something up to their border, and filling draws an untrained model"
    )
    foreground: Literal["all", "tissue", "mask"] = "all"
    if all(item.mask is not None for item in measured.manifest.items):
        foreground = "mask"
        reasons["patch.foreground"] = "all images have a mask"
    elif measured.pyramids and None not in measured.mpp:
        foreground = "tissue"
        reasons["patch.foreground"] = "slides are mostly glass"
    if measured.grey:
        reasons["model.channels"] = "all images are grey"

    training = measured.manifest.split("train")
    batch = max(1, min(config.train.batch, len(training) // 4))
    reasons["train.batch"] = f"{len(training)} images to learn from"
    epochs = max(10, min(100, round(3000 * batch / max(1, len(training)))))
    reasons["train.epochs"] = f"about 3,000 steps, from 10 to 100 epochs; {len(training)} images, {batch} a step"
    imbalance = _imbalance(measured.manifest)
    if imbalance >= 2:
        reasons["train.balance"] = f"the largest class has {imbalance:.1f} times the images of the smallest"
    return Proposal(
        config.replace(
            patch={"size": size, "mpp": mpp, "bits": bits, "foreground": foreground, "edge": edge},
            model={"channels": 1 if measured.grey else 3},
            select={"m": m},
            train={
                "epochs": epochs,
                "batch": batch,
                "warmup": max(1.0, epochs / 10),
                "balance": "loss" if imbalance >= 2 else "none",
            },
        ),
        reasons,
        tuple(_summary(measured)),
    )


def with_counted_patches(proposal: Proposal, measured: Measured, stall: float) -> Proposal:
    """Return the proposal with `select.m` from the patches on its foreground, counted in a few of the images."""
    patch = proposal.config.patch
    if patch.foreground == "all":
        return proposal
    counts, items = [], measured.manifest.items
    with Reader(threads=1, stall=stall) as reader:
        for item in items[:: max(1, len(items) // COUNTED)][:COUNTED]:
            opener = FileOpener(item.image, item.name, mask=item.mask, image_mpp=item.mpp, **dict(patch))
            with contextlib.suppress(ImageError, NoPatches):  # `keyhole check` reports both
                counts.append(reader.run(str(item.image), partial(_count, opener)))
    if not counts:
        return proposal
    patches = median(counts)
    why = f"about an eighth of the {patches:,.0f} patches with {patch.foreground}, the median of {len(counts)} images"
    reasons = {**proposal.reasons, "select.m": f"{why}; from 4 to 256"}
    return replace(proposal, config=proposal.config.replace(select={"m": _kept(patches)}), reasons=reasons)


def _count(opener: FileOpener) -> int:
    with contextlib.closing(opener()) as source:
        return len(source)


def _kept(patches: float) -> int:
    """Return an eighth of the patches, down to a power of two, from 4 to 256 but not more than there are."""
    eighth = 1 << max(0, round(patches / 8).bit_length() - 1)
    return max(min(4, int(patches)), min(256, eighth, int(patches)), 1)


def _common_mpp(measured: Measured, reasons: dict[str, str]) -> float | None:
    """Return the microns per pixel to read all images at, if all state theirs: the same, or coarser where enough."""
    known = [mpp for mpp in measured.mpp if mpp is not None]
    if len(known) < len(measured.sizes):
        return None
    if max(known) / min(known) > 1.1:
        reasons["patch.mpp"] = f"the images differ, from {min(known):.3g} to {max(known):.3g}; never enlarged"
    elif median(known) < 0.8 * SLIDE_MPP:
        reasons["patch.mpp"] = f"the images have {median(known):.3g}, which costs time and memory; lower it for detail"
    else:
        reasons["patch.mpp"] = "what the images have; later ones of another resolution are resampled to it"
        return round(max(known), 4)
    return round(max(SLIDE_MPP, *known), 4)


def _imbalance(manifest: Manifest) -> float:
    """Return the size of the largest training class over that of the smallest, of the worst task."""
    worst = 1.0
    for task in manifest.tasks:
        if task.exclusive:
            counts = Counter(item.labels.get(task.name) for item in manifest.split("train"))
            known = [counts[name] for name in task.classes if counts[name]]
            worst = max(worst, max(known) / min(known)) if known else worst
    return worst


def _summary(measured: Measured) -> list[str]:
    manifest = measured.manifest
    splits = ", ".join(f"{name} {len(manifest.split(name))}" for name in SPLITS)
    left_out = f"; {len(manifest.left_out)} left out" if manifest.left_out else ""
    lines = [f"{len(manifest.items)} images: {splits}{left_out}"]
    for task in manifest.tasks:
        labels = [item.labels.get(task.name, "") for item in manifest.items]
        lines.append(f"task {task.name}: {task.summary(labels)}")
    lines += manifest.notes
    lines.append("size: {} x {} px".format(*map(_span, zip(*measured.sizes, strict=True))))
    if scales := [mpp for mpp in measured.mpp if mpp is not None]:
        said = f"{len(scales)} of the {len(measured.sizes)} images opened say it"
        lines.append(f"microns per pixel: {_span(scales)} ({said})")
        if len(scales) < len(measured.sizes):
            lines.append("patch.mpp is none, since not all say it: a column `mpp` makes all of them one resolution")
    return lines


def _span(values: Sequence[float]) -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{low:g}" if f"{low:g}" == f"{high:g}" else f"{low:g} ... {middle:g} ... {high:g}"
