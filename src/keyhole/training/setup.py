"""Make what the loop needs from a configuration: images, labels, model, engine and optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keyhole.config.auto import number
from keyhole.config.settings import AugmentConfig, Config
from keyhole.data.companions import unused_masks
from keyhole.data.item import Item
from keyhole.data.manifest import Manifest
from keyhole.data.resolution import Resolution, enlarged
from keyhole.engine import Engine
from keyhole.engine.device import choose_precision
from keyhole.engine.memory.plan import cpu_chunk, fixed_chunk
from keyhole.engine.opening import opener
from keyhole.engine.to_device import may_decode
from keyhole.errors import ConfigError, DataError, ImageError
from keyhole.loading import Opener, Reader
from keyhole.nn import IPSClassifier, build_classifier
from keyhole.nn.build import patch_shape
from keyhole.patches.image_cache import ImageCache, fits
from keyhole.patches.sources import View
from keyhole.runs.checkpoint import load_encoder
from keyhole.runs.start import load_start
from keyhole.tasks.kinds import Task
from keyhole.util.tally import Tally
from keyhole.util.timing import Timer
from keyhole.util.wording import counted, from_to

DECODING = 7 / 3
"""Bytes that decoding a picture takes beside its pixels, as a multiple of them: Pillow has 4 bytes a pixel of RGB, and
numpy takes a copy of 3."""


def absolute(config: Config) -> Config:
    """Return the configuration with absolute paths, as it is written into the run folder."""

    def each(path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    paths: dict[str, Any] = {name: each(getattr(config.data, name)) for name in ("path", "root", "features", "masks")}
    model = {name: each(getattr(config.model, name)) for name in ("weights", "start")}
    return config.replace(out=each(config.out), data=paths, model=model)


def with_features(config: Config, manifest: Manifest) -> tuple[Config, list[str]]:
    """Return the configuration for the data, and lines for the log: features set their width and are not augmented.

    Raises:
        ConfigError: an encoder is set for stored features, or a feature setting for images.
        ImageError: the first file cannot be read.
    """
    first = next((item.features for item in manifest.items if item.features is not None), None)
    if first is None:
        for name in ("width", "encoder", "weights", "patches"):
            if getattr(config.model, f"feature_{name}") is not None:
                raise ConfigError(f"model.feature_{name} is for stored features, but the data are images: leave it out")
        return config, []
    from keyhole.patches.features import check_features_config, common_origin, feature_width, idle_patch_settings

    check_features_config(config)
    width = feature_width(first)
    learned = (item.features for split in ("train", "val") for item in manifest.split(split))
    origin = common_origin(path for path in learned if path is not None)
    model = {"feature_width": width}
    model |= {f"feature_{name}": getattr(origin, name) for name in ("encoder", "weights", "patches")}
    still = AugmentConfig(flip=False, rotate=False, shift=False, color=0.0)
    line = f"stored features of {width} numbers, projected to {config.model.dim}; they are not augmented"
    return config.replace(model=model, augment=still), [line, *idle_patch_settings(config)]


@dataclass(frozen=True)
class Images:
    """How the images of a manifest are opened, and how many patches each has.

    Attributes:
        counts: patches of each image of the training and validation splits, by name.
        largest: patches of the largest image, as augmentation may shift its grid; see `Grid.most_shifted`.
        patch_shape: of one patch, such as (s, s, c), or (f,) of stored features.
        held_bytes: bytes of decoded images that stay in memory.
        open_bytes: bytes of the pictures decoded whole that are open at the same time.
        resolution: of the training images' patches; part of the model.
        usual_patches: nearly all training images have as many patches or more; part of the model.
        jpeg: a GPU may decode patches from JPEG.
    """

    config: Config
    store: ImageCache
    counts: Mapping[str, int]
    largest: int
    patch_shape: tuple[int, ...]
    held_bytes: int
    open_bytes: int
    resolution: Resolution
    usual_patches: int
    jpeg: bool

    def opener(self, item: Item, view: View | None = None, offset: tuple[int, int] = (0, 0)) -> Opener:
        """Return the function with which a reading thread opens the patches of `item`."""
        return opener(self.config, self.store, item, view, offset)


def scan(
    config: Config, manifest: Manifest, reader: Reader, device: torch.device
) -> tuple[Images, Manifest, list[str]]:
    """Open every image of the splits that are used once; one of the test split only if it is watched.

    Returns:
        The images, the manifest without those that cannot be opened, and lines for the log.

    Raises:
        ImageError: an image cannot be opened, unless `--data.on-bad-image skip`.
        DataError: no training image can be opened.
    """
    probe = ImageCache()
    counts: dict[str, int] = {}
    bad: dict[str, str] = {}
    shape: tuple[int, ...] = ()
    total = largest = 0
    doubts: Counter[str] = Counter()
    scales = Tally()
    pictures: list[int] = []
    mpp: list[float | None] = []
    jpeg = False
    for item in (item for split in config.train.splits for item in manifest.split(split)):
        try:
            source = reader.run(item.name, opener(config, probe, item))
        except (ImageError, ConfigError) as error:
            if config.data.on_bad_image == "fail":
                raise
            bad[item.name] = str(error)
            continue
        counts[item.name], shape = len(source), source.patch_shape
        shifted = config.augment.shift and item.split == "train"
        largest = max(largest, source.grid.most_shifted if shifted else len(source))
        if item.split == "train":
            mpp.append(source.mpp)
        total += source.decoded_bytes
        pictures.append(source.whole_bytes)
        jpeg = jpeg or (config.run.decode == "auto" and may_decode(device) and source.gives_jpeg())
        doubts.update(source.doubts())
        if note := enlarged(source.l0_mpp, source.scale):
            scales.add(item.name, note)
        source.close()
    manifest = manifest.without(bad)
    if not manifest.split("train"):
        raise DataError(f"{config.data.path}: no image of the training split can be read; see keyhole check")
    patches = sorted(counts.values())
    what = f"patches of {config.patch.size} px" if total else "stored features"
    lines = [
        f"{len(counts)} images with {from_to(str(patches[0]), str(patches[-1]))} {what}, "
        f"{sum(patches)} in all; {config.select.m if patches[-1] > config.select.m else 'all'} of each are kept"
    ]
    lines += unused_masks(manifest.items, config.patch.foreground)
    keep = False
    if total:
        keep, sentence = fits(total, cache_limit(config, device))
        lines.append(sentence)
    lines += [f"warning: {text} ({count} of {len(counts)} files)" for text, count in doubts.items()]
    lines += [f"warning: {line}" for line in scales.lines(len(counts))]
    if bad:
        lines.append(f"left out {counted(len(bad))} that cannot be read; see left_out.csv")
    resolution = Resolution.of(mpp)
    lines += [f"warning: {'. '.join(spread)}"] if (spread := resolution.spread()) else []
    # Pictures decoded whole: each thread decodes one; those of the batch and of the chunks read ahead are open.
    pictures.sort(reverse=True)
    decoded = sum(pictures[: reader.threads.count])
    ahead = -(-(config.run.ahead + 2) * (fixed_chunk(config.select) or cpu_chunk(shape)) // patches[len(patches) // 2])
    opened = round(DECODING * decoded) + (decoded if keep else sum(pictures[: config.train.batch + ahead]))
    store = ImageCache(keep=keep, masks=probe.masks)
    held, jpeg = total if keep else 0, jpeg and not keep
    usual = usual_patches([counts[item.name] for item in manifest.split("train")])
    images = Images(config, store, counts, largest, shape, held, opened, resolution, usual, jpeg)
    return images, manifest, lines


def usual_patches(counts: Sequence[int]) -> int:
    """Return the number of patches that 95 % of the images have at least: a few blank slides do not count.

    >>> usual_patches([200, 300, 250]), usual_patches([1, *[200] * 99])
    (200, 200)
    """
    return sorted(counts)[len(counts) // 20]


def cache_limit(config: Config, device: torch.device) -> float | None:
    """Return the GB of decoded images that may stay in memory: on a CPU with a budget, a quarter of it."""
    budget = config.memory
    if config.data.cache is not None or budget is None or device.type != "cpu":
        return config.data.cache
    return budget / 4 / 1e9


def targets(manifest: Manifest, items: Sequence[Item]) -> dict[str, Tensor]:
    """Return the encoded labels (b w) of each task, on the host; NaN where missing."""
    return {name: torch.from_numpy(rows) for name, rows in manifest.targets(items).items()}


def new_model(config: Config, tasks: Sequence[Task], device: torch.device, fresh: bool = True) -> IPSClassifier:
    """Build the model on its device; the caller's random state does not change.

    `fresh` starts from pretrained or given weights; it is off if weights are loaded afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)  # the state of the GPUs would not be restored
        model = build_classifier(config.model, tasks, config.patch.size, pretrained=fresh)
    if fresh and config.model.weights is not None:
        load_encoder(model.encoder, config.model.weights)
    if fresh and config.model.start is not None:
        load_start(model, tasks, config.model.start)
    if fresh and number(config.train.explore, "train.explore"):
        torch.nn.init.zeros_(model.pool.key_proj.weight)  # attention starts uniform
    return model.to(device)


def new_engine(config: Config, model: IPSClassifier, reader: Reader) -> Engine:
    """Build the engine of a run, without its memory plan."""
    shape = patch_shape(config.model, config.patch.size)
    arithmetic = choose_precision(config.train.precision, model.encoder, shape)
    timer = Timer(next(model.parameters()).device)
    engine = Engine(model, config.select, config.run, arithmetic=arithmetic, timer=timer)
    engine.reader = reader
    return engine


def learned_slowly(name: str) -> bool:
    """Return whether a weight of a model is of its encoder, but not of the projector, which is new."""
    return name.startswith("encoder.") and not name.startswith("encoder.projector.")


def new_optimizer(config: Config, model: IPSClassifier) -> torch.optim.AdamW:
    """Build AdamW for the weights that are not frozen: decay as `train.decay` says, the encoder at its own rate.

    It is fused, which runs few kernels and can skip a step without the host, see `finite.py`.
    """
    groups: list[dict[str, Any]] = []
    learned = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    for of_encoder, factor in ((True, config.train.encoder_lr), (False, 1.0)):
        part = [weight for name, weight in learned if learned_slowly(name) == of_encoder]
        for decay, decayed in ((config.train.weight_decay, True), (0.0, False)):
            if chosen := [weight for weight in part if (weight.ndim > 1 or config.train.decay == "all") == decayed]:
                groups.append({"params": chosen, "weight_decay": decay, "factor": factor})
    return torch.optim.AdamW(groups, lr=number(config.train.lr, "train.lr"), fused=True)
