"""The findings of `keyhole check` about images that can be opened: labels, sizes, resolutions, equal contents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

from keyhole.config.settings import Config
from keyhole.data.hashes import hash_files
from keyhole.data.item import SPLITS, Finding, Item, warning
from keyhole.data.manifest import Manifest
from keyhole.data.resolution import Resolution, enlarged, overridden
from keyhole.data.splits import give_splits, leaking_groups
from keyhole.errors import ImageError
from keyhole.patches.features import Origin
from keyhole.tools.check.look import MAX_DARK_VALUE, Probed
from keyhole.util.wording import listed, problem_and_fix

MIN_CLASS_IMAGES = 3  # training images of a class from which on weights can help
MAX_IMBALANCE = 10  # least ratio of the largest to the smallest class for a warning
MIN_STEP_PATCHES = 16
"""With fewer patches in a step the statistics of batch norm are mostly noise (Wu and He 2018, Group Normalization)."""
WITHOUT_BATCH_NORM = ("vit", "deit", "swin", "convnext", "beit", "eva", "mixer", "dino")
"""How the names of timm's encoders with layer norm begin."""
ALL_IMAGES = "all images"


def count_classes(manifest: Manifest) -> dict[str, dict[str, dict[str, int]]]:
    """Count the labels per task, class and split; a regression has the one class `value`."""
    classes: dict[str, dict[str, dict[str, int]]] = {}
    for task in manifest.tasks:
        counts = {name: dict.fromkeys(SPLITS, 0) for name in task.classes or ("value",)}
        for item in manifest.items:
            label = item.labels[task.name]
            for name in task.classes_of(label) if task.classes else ("value",) if label else ():
                counts[name][item.split] += 1
        classes[task.name] = counts
    return classes


def about_labels(manifest: Manifest, config: Config) -> Iterator[Finding]:
    """Yield findings about missing or rare classes, and groups in several splits; all images can be opened."""
    for task, classes in count_classes(manifest).items():
        train = {name: count["train"] for name, count in classes.items()}
        rare = [name for name, count in train.items() if 0 < count < MIN_CLASS_IMAGES and count < max(train.values())]
        if rare:
            problem = f"fewer than {MIN_CLASS_IMAGES} training images of {listed(map(repr, rare))}"
            fix = "Add images, correct labels that are mistyped, or take out what is so rare: it can hardly be learned."
            yield warning(task, problem, fix)
        train = {name: count for name, count in train.items() if name not in rare}
        largest, smallest = max(train, key=lambda name: train[name]), min(train, key=lambda name: train[name])
        if train[smallest] == 0:
            problem = f"no usable training image of class {smallest!r}"
            yield Finding(task, problem, "Repair the images of that class, or take the class out.")
        elif train[largest] >= MAX_IMBALANCE * train[smallest] and config.train.balance == "none":
            problem = f"{train[largest]} training images of {largest!r}, but {train[smallest]} of {smallest!r}"
            yield warning(task, problem, "Weigh the classes: --train.balance loss.")
        for split in ("val", "test"):
            lacking = [name for name, count in classes.items() if not count[split]]
            if manifest.split(split) and lacking:
                problem = f"no {split} image of {listed(map(repr, lacking))}: its figures will be missing"
                yield warning(task, problem, f"Add images, or {give_splits(config.data.path)}.")
    for group in leaking_groups([item.group for item in manifest.items], [item.split for item in manifest.items]):
        problem = "group with images in more than one split: what is held out is partly known from training"
        yield warning(group, problem, "Put the whole group into one split.")


def about_bits(largest: Mapping[str, int], config: Config) -> Iterator[Finding]:
    """Yield a finding about 16-bit images (name -> largest value) for which the number of bits in use is unknown."""
    if not largest:
        return
    most = max(largest.values())
    problem = f"16 bits a value, and the file does not say how many are in use; largest value {most:,} of 65,535"
    fix = (
        "Say how many bits the camera or scanner uses, the same for all images: "
        f"--patch.bits {max(8, most.bit_length())} holds the largest value; 16 takes them as they are."
    )
    if config.data.on_bad_image == "skip":
        yield warning(list(largest), problem, f"{fix} Until then they are left out.")
    else:
        yield replace(warning(list(largest), problem, fix), severity="error")


def about_images(items: Sequence[Item], probed: Mapping[str, Probed], config: Config) -> Iterator[Finding]:
    """Yield findings about patches, resolutions and colours; all `items` could be opened."""
    most = max((image.patches for image in probed.values()), default=0)
    if probed and config.select.m >= most:
        problem = f"select.m (={config.select.m}) keeps every patch (at most {most} per image): selection does nothing"
        yield warning(ALL_IMAGES, problem, "Use a smaller --select.m, or smaller patches.")
    yield from _about_batch_norm(items, probed, config)
    if any(item.features is not None for item in items):
        yield from _about_features(probed)
        return
    yield from _about_resolution(items, probed, config)
    if len({image.channels for image in probed.values()}) > 1:
        grey = [name for name, image in probed.items() if image.channels == 1]
        problem = f"{len(grey)} grey images among colour ones: {listed(grey)}"
        fix = "Make sure that colour does not tell the classes apart; --model.channels 1 reads all as grey."
        yield warning(ALL_IMAGES, problem, fix)
    yield from _about_values(probed)
    yield from _about_annotations(probed)
    for name, image in probed.items():
        if image.preview_problem:
            fix = "A run does not read that resolution; other programs may fail on the file."
            yield warning(name, f"no preview: {image.preview_problem}", fix)


def _about_batch_norm(items: Sequence[Item], probed: Mapping[str, Probed], config: Config) -> Iterator[Finding]:
    features = any(item.features is not None for item in items)
    learns = sum(item.split == "train" for item in items)
    without = config.model.freeze or config.model.freezes_norm or config.model.encoder.startswith(WITHOUT_BATCH_NORM)
    if not learns or (without and not features):
        return
    kept = min(config.select.m, round(median(image.patches for image in probed.values())))
    patches = min(config.train.batch, learns) * kept
    if patches < MIN_STEP_PATCHES:
        where = "the projection of features" if features else f"the encoder ({config.model.encoder})"
        problem = f"a step learns from {patches} {'patch' if patches == 1 else 'patches'} (train.batch x select.m)"
        fix = f"Raise --select.m or --train.batch, to {MIN_STEP_PATCHES} patches or more."
        yield warning("training", f"{problem}, few for the batch norm of {where}", fix)


def _about_resolution(items: Sequence[Item], probed: Mapping[str, Probed], config: Config) -> Iterator[Finding]:
    spread = Resolution.of(image.mpp for image in probed.values()).spread()
    if spread is not None and config.patch.mpp is None:
        yield warning(ALL_IMAGES, *spread)
    given = {item.name: overridden(item.mpp, probed[item.name].file_mpp) for item in items}
    for problem, names in _grouped(given).items():
        yield warning(names, problem, "Correct the column `mpp`, or leave it empty there.")
    if wanted := config.patch.mpp:
        read = {name: enlarged(image.mpp, wanted / image.mpp) for name, image in probed.items() if image.mpp}
        for problem, names in _grouped(read).items():
            coarsest = max(probed[name].mpp or 0 for name in names)
            fix = f"Enlarging adds no detail: read all at --patch.mpp {coarsest:.3g}, or leave them out. "
            yield warning(names, problem, f"{fix}If a file is wrong, give the true value in a column `mpp`.")
    for note, names in _grouped({x.name: probed[x.name].mpp_note for x in items if x.mpp is None}).items():
        fix = "Give the right value in a column `mpp`; it matters where --patch.mpp is set."
        yield warning(names, f"microns per pixel are not known ({note})", fix)


def _about_annotations(probed: Mapping[str, Probed]) -> Iterator[Finding]:
    """Yield warnings: training does not read annotations, but `keyhole evaluate` does."""
    for name, image in probed.items():
        if image.annotation_problem:
            yield warning(name, *problem_and_fix(image.annotation_problem))
    outside = [name for name, image in probed.items() if image.annotation_outside]
    if outside:
        first = probed[outside[0]]
        where = f"{first.size.width:,} x {first.size.height:,} px, regions at {first.annotation_outside}"
        problem = f"the annotated regions lie outside of the image ({where}{' in the first' if outside[1:] else ''})"
        fix = (
            "Are they in microns, or of another slide? Export them in pixels of the full resolution, and name the file "
            "of this image in the column `annotation`; keyhole evaluate leaves such annotations out."
        )
        yield warning(outside, problem, fix)


def _about_values(probed: Mapping[str, Probed]) -> Iterator[Finding]:
    flat = [name for name, image in probed.items() if image.darkest >= image.brightest]
    dark = [name for name, image in probed.items() if image.darkest < image.brightest < MAX_DARK_VALUE]
    if flat:
        fix = "Look at it: there is nothing to learn from. Export it again, or leave it out."
        yield warning(flat, "all pixels that were read have one value", fix)
    if dark:
        brightest = max(probed[name].brightest for name in dark)
        fix = "If its values use fewer bits than the file holds, say how many: --patch.bits; else export it brighter."
        yield warning(dark, f"nearly black: no pixel that was read is above {brightest} of 255", fix)
    for note, names in _grouped({name: image.note for name, image in probed.items()}).items():
        yield warning(names, note, "Save what else you want as files of their own.")


def _grouped(notes: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names by note, without empty notes."""
    names = defaultdict(list)
    for name, note in notes.items():
        if note:
            names[note].append(name)
    return names


def _about_features(probed: Mapping[str, Probed]) -> Iterator[Finding]:
    fix = "Use features of one encoder for all images."
    by_width = defaultdict(list)
    for name, image in probed.items():
        by_width[image.channels].append(name)
    if len(by_width) > 1:
        widths = "; ".join(f"{width} in {listed(names)}" for width, names in sorted(by_width.items()))
        yield Finding(ALL_IMAGES, f"stored features of different widths: {widths}", fix)
        return
    origins = {name: Origin(**image.origin) for name, image in probed.items()}
    first = next((origin for origin in origins.values() if origin.known), Origin())
    others = [name for name, origin in origins.items() if first.excludes(origin)]
    if others:
        problem = f"stored features of {first.describe()}, but of {origins[others[0]].describe()} in {listed(others)}"
        yield Finding(ALL_IMAGES, problem, fix)
        return
    for doubt, names in _grouped({name: origin.doubt(first) for name, origin in origins.items()}).items():
        yield warning(names, doubt, "This may be intended: training gives the same warning and continues.")


def about_content(items: Sequence[Item], manifest: Manifest, config: Config) -> Iterator[Finding]:
    """Yield findings about files with equal bytes, in particular in two splits or with two labels."""
    by_size = defaultdict(list)
    for item in items:
        try:
            if not item.source.is_dir():
                by_size[item.source.stat().st_size].append(item)
        except OSError as error:
            raise ImageError(item.source, f"was there a moment ago ({error.strerror}). Run the check again.") from error
    same_size = [item for group in by_size.values() if len(group) > 1 for item in group]
    hashes = hash_files(same_size, config.run.threads, config.run.stall)
    same = defaultdict(list)
    for item in same_size:
        same[hashes[item.name].sha256].append(item)
    for copies in (items for items in same.values() if len(items) > 1):
        problem = f"same content as {listed(copy.name for copy in copies[1:])}"
        differ = [task.name for task in manifest.tasks if len({copy.labels[task.name] for copy in copies}) > 1]
        splits = sorted({copy.split for copy in copies}, key=SPLITS.index)
        if differ:
            problem += f", with another {' and '.join(differ)}"
        if len(splits) > 1:
            problem += f", in {' and '.join(splits)}"
        yield warning(copies[0].name, problem, "Keep one of them, or give them one group.")
