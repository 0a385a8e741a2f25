"""Images -> stored features: every patch through an encoder once, one HDF5 file for each image.

    keyhole.embed("slides.csv", "features", encoder="resnet50", pretrained=True)

What is trained on the files does not read the images again. A run that was stopped goes on where it was: files are
whole or not there, and those that are there are not made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import keyhole
from keyhole.checkpoint import load_encoder, read_info, weights_file
from keyhole.config import Config, ModelConfig, PatchConfig, RunConfig
from keyhole.config_check import validate
from keyhole.config_file import build
from keyhole.data.embed_items import feature_names, items_to_embed
from keyhole.data.item import Item
from keyhole.data.manifest import write_left_out
from keyhole.device import choose_device, choose_precision
from keyhole.errors import ConfigError, DataError, KeyholeError, RunError
from keyhole.features.writer import BYTES, SETTINGS, already_there, feature_writer
from keyhole.files import file_size, writable_folder
from keyhole.memory.meter import steady_heap
from keyhole.nn import FastEncoder
from keyhole.nn.build import build_encoder, embedding_width, patch_shape
from keyhole.passes import open_reader, opener, settle_edge
from keyhole.patches import FilePatches
from keyhole.progress import Progress
from keyhole.reading import Batch
from keyhole.reading.unreadable import Ledger, parse_share
from keyhole.store import ImageStore
from keyhole.wording import counted, listed


@dataclass(frozen=True)
class Embedded:
    """What an embedding has done.

    Attributes:
        path: folder with the files and left_out.csv.
        files: by image name, those that are there now.
        made: how many of them were made by this call; the others were there.
        left_out: images without features, and why.
        unreadable: by image name, patches that could not be read and are not in its file.
        unfinished: files of runs that were killed.
    """

    path: Path
    files: dict[str, Path]
    made: int
    left_out: dict[str, str]
    unreadable: dict[str, int]
    unfinished: tuple[Path, ...]

    def lines(self) -> list[str]:
        """For people: what was done, and what is missing."""
        lines = [f"embedded: {self.made}, there already: {len(self.files) - self.made}; in {self.path}"]
        for name, count in self.unreadable.items():
            lines.append(f"{name}: {count} unreadable patches are not in its features")
        if self.left_out:
            listing = self.path / "left_out.csv"
            lines.append(f"left out {counted(len(self.left_out), 'image or file', 'images or files')}; see {listing}")
        if self.unfinished:
            lines.append(
                f"{len(self.unfinished)} unfinished files of runs that were killed can be deleted, unless another run "
                f"writes them now: {listed(file.name for file in self.unfinished)}"
            )
        return lines


def embed(
    data: str | Path,
    out: str | Path,
    *,
    encoder: str = "resnet50",
    pretrained: bool = False,
    weights: str | Path | None = None,
    stages: int | None = None,
    width: int = 32,
    channels: Literal[1, 3] = 3,
    patch: PatchConfig | Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    masks: str | Path | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    precision: Literal["auto", "float32", "bf16"] = "float32",
    chunk: int = 64,
    device: str = "auto",
    threads: int | None = None,
    on_bad_image: Literal["fail", "skip"] = "fail",
    unreadable: str = "1%",
    quiet: bool = False,
    run: str | Path | None = None,
) -> Embedded:
    """Embeds the foreground patches of every image.

    Args:
        data: CSV with `image` (labels are not needed), a folder of classes, or any folder of images.
        out: folder for the files; each is called after its image. Where names are taken twice, after its path.
        encoder, pretrained, weights, stages, width, channels: as in `ModelConfig`; weights must come from somewhere.
        patch: which patches, at which resolution; default as in `PatchConfig`; a mapping gives some of it.
        root: folder that relative paths of a CSV start from.
        masks: folder of masks, for `patch.foreground` mask.
        dtype: of the stored features; float16 halves the files.
        precision: arithmetic of the encoder.
        chunk: patches that are encoded at once.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        threads: that read and decode.
        on_bad_image: an image that cannot be read ends the run, or is left out, counted and listed.
        unreadable: share of an image's patches that may be unreadable.
        quiet: show no progress.
        run: a run, or the folder of a model, whose encoder embeds: its settings and weights instead of `encoder`,
            `pretrained`, `weights`, `stages`, `width` and `channels`, and its patches unless `patch` is given.

    Raises:
        ConfigError: settings that do not fit, no weights, or files in `out` that were made with others.
        DataError: no images.
        ImageError: an image cannot be read and `on_bad_image` is "fail".
        TooMuchUnreadable: likewise more of its patches than `unreadable`.
        OutputError: `out` cannot be written.
    """
    path = None if weights is None else Path(weights)
    model = ModelConfig(encoder, channels=channels, width=width, stages=stages, pretrained=pretrained, weights=path)
    if run is not None:
        if pretrained or weights is not None:
            raise ConfigError("run gives the weights: leave out pretrained and weights")
        model, learned = encoder_of(run)
        patch = patch or learned
    config = Config(
        patch=build(Config(), {"patch": patch or PatchConfig()}).patch,
        model=model,
        run=RunConfig(device=device, threads=threads),
        unreadable=unreadable,
    )
    validate(config)
    parse_share(unreadable)
    items, left_out = items_to_embed(Path(data), root, masks, on_bad_image)
    with open_reader(config.run, torch.device("cpu")) as reader:
        config, _ = settle_edge(config, items, reader)
    folder = writable_folder(out)
    files = feature_names(folder, items)
    chosen = choose_device(device)
    if chosen.type == "cpu":
        steady_heap(False)
    network = _encoder(config, chosen)
    arithmetic = choose_precision(precision, network, patch_shape(model, config.patch.size)).look
    settings = _settings(config, network, dtype, arithmetic)
    embedder = _Work(config, FastEncoder(network, arithmetic), chosen, dtype, chunk, settings)
    open_items = [
        item for item in items if not already_there(files[item.name], {**settings, **_own(item)}, _bytes(item))
    ]
    unfinished = _unfinished(list(files.values()))
    bad: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        progress = None if quiet else stack.enter_context(Progress(len(open_items), "embedding"))
        for item, missing in embedder.embed_all(open_items, files, progress):
            if isinstance(missing, KeyholeError):
                if on_bad_image == "fail":
                    raise missing
                left_out[item.name] = str(missing)
            elif missing:
                bad[item.name] = missing
    write_left_out(folder / "left_out.csv", left_out.items())
    there = {item.name: files[item.name] for item in items if item.name not in left_out}
    if not there:
        raise DataError(f"{data}: none of the {len(items)} images can be embedded; see {folder / 'left_out.csv'}")
    made = sum(item.name in there for item in open_items)
    return Embedded(folder, there, made, left_out, bad, unfinished)


@dataclass(frozen=True)
class _Work:
    """What is the same for all images."""

    config: Config
    encoder: FastEncoder
    device: torch.device
    dtype: str
    chunk: int
    settings: Mapping[str, Any]

    def embed_all(
        self, items: Sequence[Item], files: Mapping[str, Path], progress: Progress | None
    ) -> Iterator[tuple[Item, int | KeyholeError]]:
        """Each image with the number of its patches that could not be read, or with why it has no features."""
        with open_reader(self.config.run, self.device) as reader:
            # An image is a batch; the next is being read while the last chunks of one are encoded. A store keeps the
            # masks of its images, hence one for each.
            openers = ([opener(self.config, ImageStore(keep=False), item)] for item in items)
            stream = reader.stream(openers, self.chunk, "mask")
            for item, batch in zip(items, stream, strict=True):
                waited = reader.waited
                try:
                    found: int | KeyholeError = self._embed(item, batch, files[item.name], progress)
                except _Left as left:
                    found = left.error
                if progress is not None:
                    progress.update(images=1, waited=reader.waited - waited)
                yield item, found

    def _embed(self, item: Item, batch: Batch, path: Path, progress: Progress | None) -> int:
        source = batch.sources[0]
        if source is None:
            raise _Left(batch.failed[0])
        assert isinstance(source, FilePatches)
        writable_folder(path.parent)
        with feature_writer(path, self.dtype) as writer:
            for part in batch.chunks():
                features = self.encoder(torch.from_numpy(part.pixels[: part.count]).to(self.device))
                writer.add(features.cpu().numpy(), source.grid.boxes(part.index[: part.count])[:, :2], item.name)
                if progress is not None:
                    progress.update(patches=part.count)
            if 0 in batch.failed:
                raise _Left(batch.failed[0])
            missing = batch.unreadable.get(0, {})
            self._check(item, source, missing)
            about = {
                BYTES: _bytes(item),
                SETTINGS: json.dumps({**self.settings, **_own(item)}),
                "unreadable": len(missing),
            }
            writer.describe(source, {**self._about(), **about})
        return len(missing)

    def _check(self, item: Item, source: FilePatches, missing: Mapping[int, str]) -> None:
        ledger = Ledger(len(source), parse_share(self.config.unreadable))
        index = list(missing)
        ledger.add(item.name, source.grid.boxes(index), index, list(missing.values()))
        try:
            ledger.check()
        except KeyholeError as error:
            raise _Left(error) from error

    def _about(self) -> dict[str, Any]:
        return {"encoder": self.config.model.encoder, "weights_sha256": self.settings["weights"]}


def encoder_of(run: str | Path) -> tuple[ModelConfig, PatchConfig]:
    """The encoder of a run's best model, with its weights, and the patches it has learned from.

    Raises:
        RunError: there is no model, or it is of stored features.
    """
    file = weights_file(Path(run))
    info = read_info(file)
    try:
        own = build(Config(), {"model": info["model"], "patch": info["patch"]})
    except (KeyError, ConfigError) as error:
        raise RunError(f"{file}: its description does not fit keyhole {keyhole.__version__} ({error}).") from error
    if own.model.feature_width is not None:
        raise RunError(f"{file}: is a model of stored features, which has no encoder of images. Give another run.")
    kept = {name: getattr(own.model, name) for name in ("encoder", "channels", "width", "stages")}
    return ModelConfig(**kept, weights=file), own.patch


class _Left(Exception):  # noqa: N818 - ends the writing of one file, and goes no further
    """An image that has no features, and why."""

    def __init__(self, error: KeyholeError) -> None:
        super().__init__(str(error))
        self.error = error


def _encoder(config: Config, device: torch.device) -> nn.Module:
    """The encoder, with its weights, ready to embed.

    Raises:
        ConfigError: no such encoder, or no weights: features of random weights would be of no use to anyone.
    """
    model = config.model
    if not model.pretrained and model.weights is None:
        raise ConfigError(
            f"encoder {model.encoder}: where are its weights? Give --weights FILE (safetensors), or --pretrained to "
            "download timm's"
        )
    try:
        encoder = build_encoder(model, model.pretrained)
    except ValueError as error:
        raise ConfigError(f"--encoder: {error}") from error
    except ConfigError as error:  # options have other names here
        raise ConfigError(str(error).replace("--model.", "--")) from error
    if model.weights is not None:
        try:
            load_encoder(encoder, model.weights)
        except RunError as error:
            raise RunError(str(error).replace("--model.", "--")) from error
    embedding_width(encoder, model, config.patch.size)
    return encoder.eval().to(device)


def _settings(config: Config, encoder: nn.Module, dtype: str, precision: torch.dtype) -> dict[str, Any]:
    """All that the features depend on but the image."""
    model, patch = config.model, config.patch
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "encoder": model.encoder,
        "weights": digest.hexdigest(),
        "stages": model.stages,
        "channels": model.channels,
        "patch.size": patch.size,
        "patch.stride": patch.stride or patch.size,
        "patch.level": patch.level,
        "patch.mpp": patch.mpp,
        "patch.foreground": patch.foreground,
        "patch.min_foreground": patch.min_foreground,
        "patch.edge": patch.edge,
        **({} if patch.bits is None else {"patch.bits": patch.bits}),
        "dtype": dtype,
        "precision": str(precision).removeprefix("torch."),
    }


def _unfinished(files: Sequence[Path]) -> tuple[Path, ...]:
    """What killed processes have left of these files."""
    known = {f".{file.name}" for file in files}
    folders = sorted({file.parent for file in files if file.parent.is_dir()})
    return tuple(left for folder in folders for left in sorted(folder.glob(".*.h5.????????")) if left.stem in known)


def _own(item: Item) -> dict[str, Any]:
    """Settings of one image."""
    return {"image mpp": item.mpp, "mask": None if item.mask is None else item.mask.name}


def _bytes(item: Item) -> int:
    """Return the size of the image file; 0 where that cannot be read, which shows when the image is opened."""
    try:
        return file_size(item.image)
    except OSError:
        return 0
