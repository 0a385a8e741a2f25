"""`keyhole init`: a configuration that suits a data set."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from keyhole.config.settings import Config, PatchConfig
from keyhole.data.item import SPLITS
from keyhole.data.manifest import Manifest, read_manifest
from keyhole.errors import BitsUnknown, ConfigError, DataError, ImageError
from keyhole.images import open_image
from keyhole.images.geometry import Size
from keyhole.images.pixels import DEEP
from keyhole.loading import Reader
from keyhole.patches.grid import NoPatches
from keyhole.patches.opener import FileOpener

SAMPLE = 100
"""Largest number of images that are opened to measure sizes."""
COUNTED = 10
"""Number of images whose patches are counted."""
EMPTY = 0.2
"""Share of patches of one colour from which on they are left out: a model with random weights may keep nothing else."""
KEPT = "from 16 to 256; of fewer than 32 patches half, but at least 4"
"""Limits of the kept patches: from random weights, on canvases of 400 px with patches of 48 px, a run that kept 16
reached a validation AUROC of .89, and one that kept 4 reached .67."""
PRETRAINED = "its ImageNet weights make small data sets work; `small`, from random weights, is fast on tiny machines"
RANDOM = "it starts from random weights and needs many images; lite0 has ImageNet weights, which are installed already"
SLIDE_PATCH = 384
"""Largest side of a slide's patch in pixels from random weights: of patches at random some must show what decides."""
SLIDE_MPP = 0.5
"""Microns per pixel for microscopy: 20x shows nuclei, with a quarter of the patches of 40x."""


@dataclass(frozen=True)
class Measured:
    """Facts about the images and labels."""

    manifest: Manifest  # as training would read it
    sizes: tuple[Size, ...]  # level-0 sizes of the images opened
    mpp: tuple[float | None, ...]  # microns per pixel of each, from the CSV or the file
    grey: bool  # all images are
    pyramids: bool  # all images have more than one level
    largest: int | None = None  # largest value of 16-bit images whose used bits are unknown


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
        raise DataError(f"{config.data.path}: none of the opened images can be read. keyhole check gives the reasons.")
    return Measured(manifest, tuple(sizes), tuple(mpp), all(grey), all(pyramids), max(largest, default=None))


class _Choices:
    """Values of settings, with the reasons for some of them by the setting's name."""

    def __init__(self) -> None:
        self.values: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        self.reasons: dict[str, str] = {}

    def add(self, name: str, value: object, reason: str = "") -> None:
        section, field = name.split(".")
        self.values[section][field] = value
        if reason:
            self.reasons[name] = reason


def propose(config: Config, measured: Measured) -> Proposal:
    """Return `config` with values that suit the data and its encoder, by rough rules for a run on a small machine."""
    choices = _Choices()
    learned = config.model.learned_before
    choices.add("model.encoder", config.model.encoder, PRETRAINED if learned else RANDOM)
    small_slides = measured.pyramids and config.model.encoder == "small" and not learned
    _choose_patches(choices, config, measured, small_slides)
    _choose_training(choices, config, measured.manifest, largest=4 if small_slides else config.train.batch)
    if small_slides:
        _choose_for_slides(choices)
    return Proposal(config.replace(**choices.values), choices.reasons, tuple(_summary(measured)))


def _choose_patches(choices: _Choices, config: Config, measured: Measured, small_slides: bool) -> None:
    mpp, why = _common_mpp(measured)
    choices.add("patch.mpp", mpp, why)
    sides = [  # shorter side of each image in pixels, at the scale to be read
        min(size) * (own / mpp if mpp is not None and own is not None else 1.0)
        for size, own in zip(measured.sizes, measured.mpp, strict=True)
    ]
    shorter, aspect = median(sides), median(max(size) / min(size) for size in measured.sizes)
    parts, least, step, name = (10, 64, 32, "tenth") if config.model.learned_before else (16, 48, 16, "sixteenth")
    most = 224
    if not config.model.learned_before:
        least = max(16, min(least, int(shorter / 8)))  # 8 patches across a small picture
    if small_slides:
        parts, most, name = 5, SLIDE_PATCH, "fifth"
    size = max(1, min(max(least, min(most, round(shorter / parts / step) * step)), int(min(sides))))
    why = f"about a {name} of the median shorter side, {shorter:,.0f} px, from {least} to {most}"
    choices.add("patch.size", size, why)
    if measured.largest is not None and config.patch.bits is None:
        why = f"the largest value of the 16-bit images opened is {measured.largest:,}; see the camera's"
        choices.add("patch.bits", max(8, measured.largest.bit_length()), why)
    patches = -(-shorter // size) * -(-shorter * aspect // size)
    why = f"about an eighth of the {patches:,.0f} patches of a typical image, {KEPT}"
    choices.add("select.m", _kept(patches), why)
    if measured.pyramids:
        why = "the images have several levels, as slides do, and their border is glass"
        choices.add("patch.edge", "background", why)
    else:
        why = "photographs show something up to their border, and filling draws an untrained model"
        choices.add("patch.edge", "shift", why)
    if all(item.mask is not None for item in measured.manifest.items):
        choices.add("patch.foreground", "mask", "all images have a mask")
    elif measured.pyramids and None not in measured.mpp:
        choices.add("patch.foreground", "tissue", "slides are mostly glass")
    else:
        choices.add("patch.foreground", "all")
    choices.add("model.channels", 1 if measured.grey else 3, "all images are grey" if measured.grey else "")


def _choose_for_slides(choices: _Choices) -> None:
    """Choose for `small` what the recipe `slides` does, twice as wide: other settings learned no such slides.

    With the width of the recipe it depended on the seed: of two runs on 200 of them one learned nothing in 800 steps.
    """
    choices.add("model.width", 64, "more random filters, of which one may answer to what decides")
    choices.add("model.stages", 1, "as in the recipe `slides`: what decides may be a few pixels wide")
    choices.add("model.hidden", 32, "as in the recipe `slides`: a wide attention block learns few slides by heart")
    choices.add("model.dropout", 0.0, "as in the recipe `slides`")
    choices.add("model.attention_dropout", 0.0, "as in the recipe `slides`")
    choices.add("augment.color", 0.0, "as in the recipe `slides`")
    epochs = choices.values["train"]["epochs"]
    choices.add("train.explore", round(0.7 * epochs, 1), "patches at random rarely show what decides")


def _choose_training(choices: _Choices, config: Config, manifest: Manifest, largest: int) -> None:
    count = len(manifest.split("train"))
    batch = max(1, min(largest, count // 4))
    choices.add("train.batch", batch, f"{count} images to learn from")
    steps, least, most = (600, 6, 30) if config.model.learned_before else (3000, 10, 100)
    epochs = max(least, min(most, round(steps * batch / max(1, count))))
    why = f"about {steps:,} steps, from {least} to {most} epochs; {count} images, {batch} a step"
    choices.add("train.epochs", epochs, why)
    if config.model.learned_before:
        choices.add(
            "train.encoder_lr",
            0.1,
            "small steps spare what the encoder has learned; attention and head take large ones",
        )
    choices.add("train.warmup", max(1.0, epochs / 10))
    if (imbalance := _imbalance(manifest)) >= 2:
        why = f"the largest class has {imbalance:.1f} times the images of the smallest"
        choices.add("train.balance", "loss", why)
    else:
        choices.add("train.balance", "none")


def with_counted_patches(proposal: Proposal, measured: Measured, stall: float) -> Proposal:
    """Return the proposal with `select.m` from the patches on its foreground, counted in a few of the images.

    Where many patches are of one colour, and every image has others, the foreground becomes `non-empty`.
    """
    patch, reasons = proposal.config.patch, dict(proposal.reasons)
    if patch.foreground == "all":
        every, patch = _counts(patch, measured, stall), patch.model_copy(update={"foreground": "non-empty"})
        counts = _counts(patch, measured, stall)
        share = 1 - sum(counts) / max(1, sum(every))
        if not counts or len(counts) < len(every) or share < EMPTY:
            return proposal
        reasons["patch.foreground"] = f"{share:.0%} of the patches of {len(counts)} images are of one colour"
    else:
        counts = _counts(patch, measured, stall)
        if not counts:
            return proposal
    patches = median(counts)
    why = f"about an eighth of the {patches:,.0f} patches with {patch.foreground}, the median of {len(counts)} images"
    reasons["select.m"] = f"{why}; {KEPT}"
    changed = {"select": {"m": _kept(patches)}, "patch": {"foreground": patch.foreground}}
    return replace(proposal, config=proposal.config.replace(**changed), reasons=reasons)


def _counts(patch: PatchConfig, measured: Measured, stall: float) -> list[int]:
    """Return the number of patches of a few images; those without any, or that cannot be read, are left out."""
    counts, items = [], measured.manifest.items
    with Reader(threads=1, stall=stall) as reader:
        for item in items[:: max(1, len(items) // COUNTED)][:COUNTED]:
            opener = FileOpener(item.image, item.name, mask=item.mask, image_mpp=item.mpp, **dict(patch))
            with contextlib.suppress(ImageError, NoPatches):  # `keyhole check` reports both
                counts.append(reader.run(str(item.image), partial(_count, opener)))
    return counts


def _count(opener: FileOpener) -> int:
    with contextlib.closing(opener()) as source:
        return len(source)


def _kept(patches: float) -> int:
    """Return an eighth of the patches, rounded down to a power of two, within the limits of `KEPT`.

    >>> [_kept(patches) for patches in (1, 4, 9, 40, 64, 300, 10_000)]
    [1, 4, 4, 16, 16, 32, 256]
    """
    eighth = 1 << max(0, round(patches / 8).bit_length() - 1)
    return max(1, min(4, int(patches)), min(max(16, min(256, eighth)), int(patches) // 2))


def _common_mpp(measured: Measured) -> tuple[float | None, str]:
    """Return the microns per pixel to read all images at, if all state theirs, and the reason.

    The coarsest of all, or `SLIDE_MPP` if that is coarser.
    """
    known = [mpp for mpp in measured.mpp if mpp is not None]
    if len(known) < len(measured.sizes):
        return None, ""
    if max(known) / min(known) > 1.1:
        why = f"the images differ, from {min(known):.3g} to {max(known):.3g}; never enlarged"
    elif median(known) < 0.8 * SLIDE_MPP:
        why = f"the images have {median(known):.3g}, which costs time and memory; lower it for detail"
    else:
        return round(max(known), 4), "what the images have; later ones of another resolution are resampled to it"
    return round(max(SLIDE_MPP, *known), 4), why


def _imbalance(manifest: Manifest) -> float:
    """Return the largest ratio in any task of the largest to the smallest training class."""
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
            lines.append("patch.mpp stays none: not all state it. With a column `mpp` all are read at one resolution")
    return lines


def _span(values: Sequence[float]) -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{low:g}" if f"{low:g}" == f"{high:g}" else f"{low:g} ... {middle:g} ... {high:g}"
