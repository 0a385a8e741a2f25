"""Images -> stored features: every patch through an encoder once, one HDF5 file for each image.

    keyhole.embed("slides.csv", "features", encoder="resnet50", pretrained=True)

What is trained on the files does not read the images again. A run that was stopped goes on where it was: files are
whole or not there, and those that are there are not made again. `encoding.py` makes the embeddings,
`embedding_files.py` the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from keyhole.config.amounts import Bytes
from keyhole.config.settings import (
    Config,
    Decode,
    ModelConfig,
    PatchConfig,
    RunConfig,
    SelectConfig,
    TrainConfig,
)
from keyhole.data.item import Item
from keyhole.data.manifest import write_left_out
from keyhole.engine import Engine
from keyhole.engine.device import choose_device, choose_precision
from keyhole.engine.embedding import encoder_alone
from keyhole.engine.memory.meter import steady_heap
from keyhole.engine.memory.plan import CPU_CHUNK, OptionNames, Plan, make_plan
from keyhole.engine.memory.probe import Workload
from keyhole.engine.opening import open_reader, settle_edge
from keyhole.errors import ConfigError, DataError, KeyholeError, RunError
from keyhole.inference.embed_items import feature_names, items_to_embed
from keyhole.inference.embedding_files import EmbeddingFiles, image_bytes, own_settings, settings_of, unfinished_files
from keyhole.nn import IPSClassifier
from keyhole.nn.build import build_encoder, embedding_width, patch_shape
from keyhole.patches.features.writer import already_there
from keyhole.runs.checkpoint import load_encoder, read_info, weights_file
from keyhole.util.files import writable_folder
from keyhole.util.progress import Progress, say
from keyhole.util.version import VERSION
from keyhole.util.wording import counted, listed


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
    precision: Literal["auto", "float32", "tf32", "bf16"] = "float32",
    chunk: int | None = None,
    memory: str | Bytes | None = "auto",
    device: str = "auto",
    decode: Decode = "auto",
    threads: int | None = None,
    on_bad_image: Literal["fail", "skip"] = "fail",
    unreadable: str | float = "1%",
    quiet: bool = False,
    run: str | Path | None = None,
) -> Embedded:
    """Embed the foreground patches of every image.

    Args:
        data: CSV with `image` (labels are not needed), a folder of classes, or any folder of images.
        out: folder for the files; each is called after its image. Where names are taken twice, after its path.
        encoder, pretrained, weights, stages, width, channels: as in `ModelConfig`; weights must come from somewhere.
        patch: which patches, at which resolution; default as in `PatchConfig`; a mapping gives some of it.
        root: folder that relative paths of a CSV start from.
        masks: folder of masks, for `patch.foreground` mask.
        dtype: of the stored features; float16 halves the files.
        precision: arithmetic of the encoder.
        chunk: patches that are encoded at once; default is what `memory` allows, 64 at most on a CPU.
        memory: budget such as `5GB`, of the device or, on CPU, of the process; `auto` is what is free.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        decode: `auto` lets a GPU decode JPEG tiles of slides too, `cpu` does not; see `RunConfig.decode`.
        threads: that read and decode.
        on_bad_image: an image that cannot be read ends the run, or is left out, counted and listed.
        unreadable: share of an image's patches that may be unreadable.
        quiet: show no progress.
        run: a run, or the folder of a model, whose encoder embeds: its settings and weights instead of `encoder`,
            `pretrained`, `weights`, `stages`, `width` and `channels`, and its patches unless `patch` is given.

    Returns:
        The files, and what is missing.

    Raises:
        ConfigError: settings that do not fit, no weights, or files in `out` that were made with others.
        DataError: no images.
        ImageError: an image cannot be read and `on_bad_image` is "fail".
        TooMuchUnreadable: likewise more of its patches than `unreadable`.
        OutputError: `out` cannot be written.

    Example:
        >>> done = keyhole.embed("photos", "features", run="runs/one", quiet=True)
        >>> done.made, done.left_out
        (24, {})
    """
    path = None if weights is None else Path(weights)
    model = ModelConfig(
        encoder=encoder, channels=channels, width=width, stages=stages, pretrained=pretrained, weights=path
    )
    if run is not None:
        if pretrained or weights is not None:
            raise ConfigError("run gives the weights: leave out pretrained and weights")
        model, learned = encoder_of(run)
        patch = patch or learned
    config = Config(
        patch=patch or PatchConfig(),
        model=model,
        select=SelectConfig(chunk=chunk),
        train=TrainConfig(precision=precision),
        run=RunConfig(device=device, threads=threads, decode=decode),
        memory=memory,
        unreadable=unreadable,
    )
    items, left_out = items_to_embed(Path(data), root, masks, on_bad_image)
    with open_reader(config.run, torch.device("cpu")) as reader:
        config, _ = settle_edge(config, items, reader)
    folder = writable_folder(out)
    files = feature_names(folder, items)
    chosen = choose_device(device, option="--device")
    if chosen.type == "cpu":
        steady_heap(False)
    network = _encoder(config, chosen)
    arithmetic = choose_precision(precision, network.encoder, patch_shape(model, config.patch.size))
    engine = Engine(
        network,
        run=config.run,
        plan=Plan(chunk=chunk or CPU_CHUNK),
        arithmetic=arithmetic,
        warn=lambda text: say(f"warning: {text}"),
    )
    settings = settings_of(config, network.encoder, dtype, arithmetic.name(arithmetic.look))
    open_items = [
        item
        for item in items
        if not already_there(files[item.name], {**settings, **own_settings(item)}, image_bytes(item))
    ]
    unfinished = unfinished_files(list(files.values()))
    bad: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        progress = None if quiet else stack.enter_context(Progress(len(open_items), "embedding"))
        found: Iterable[tuple[Item, int | KeyholeError]] = ()
        if open_items:
            stack.enter_context(_planned(config, engine))
            found = EmbeddingFiles(config, engine, dtype, settings, progress).embed_all(open_items, files)
        for item, missing in found:
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


def encoder_of(run: str | Path) -> tuple[ModelConfig, PatchConfig]:
    """The encoder of a run's best model, with its weights, and the patches it has learned from.

    Raises:
        RunError: there is no model, or it is of stored features.
    """
    file = weights_file(Path(run))
    info = read_info(file)
    try:
        own = Config().replace(model=info["model"], patch=info["patch"])
    except (KeyError, ConfigError) as error:
        raise RunError(f"{file}: its description does not fit keyhole {VERSION} ({error}).") from error
    if own.model.feature_width is not None:
        raise RunError(f"{file}: is a model of stored features, which has no encoder of images. Give another run.")
    kept = {name: getattr(own.model, name) for name in ("encoder", "channels", "width", "stages")}
    return ModelConfig(**kept, weights=file), own.patch


def _encoder(config: Config, device: torch.device) -> IPSClassifier:
    """The encoder, with its weights, on its device.

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
    width = embedding_width(encoder, model, config.patch.size)
    return encoder_alone(encoder.to(device), width)


_OPTIONS = OptionNames("--encoder", "--patch.size", kept="", cache="", chunk="--chunk", device="--device")


@contextlib.contextmanager
def _planned(config: Config, engine: Engine) -> Iterator[None]:
    """Plan how many patches are encoded at once: as many as asked for, or as the budget allows. Inside, it is kept."""
    memory, chunk = config.memory, config.select.chunk
    engine.pace.options = _OPTIONS
    if memory is not None or engine.device.type == "cuda":
        work = Workload(
            patch_shape=patch_shape(config.model, config.patch.size),
            m=1,
            batch_size=1,
            largest_bag=1,
            chunk=chunk,
            ahead=config.run.ahead,
            jpeg=config.run.decode == "auto",
            host_buffers=2 * 4 * engine.model.pool.dim * (chunk or CPU_CHUNK),
        )
        engine.plan = make_plan(engine.encoders, work, memory, options=_OPTIONS)
    with engine.limit():
        yield
