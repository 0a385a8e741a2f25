"""Images -> stored features: every patch through an encoder once, one HDF5 file for each image.

The same call goes on where it was stopped: a file is complete or absent, and complete ones are not made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
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
from keyhole.data.companions import feature_names
from keyhole.data.manifest import write_left_out
from keyhole.data.unlabelled import items_to_embed
from keyhole.engine import Engine
from keyhole.engine.device import choose_device, choose_precision
from keyhole.engine.embedding import encoder_alone
from keyhole.engine.memory.meter import steady_heap
from keyhole.engine.memory.plan import CPU_CHUNK, OptionNames, Plan, make_plan
from keyhole.engine.memory.probe import Workload
from keyhole.engine.opening import open_reader, settle_edge
from keyhole.errors import ConfigError, DataError, KeyholeError, RunError
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
    """What a call of `embed` has done.

    Attributes:
        path: Folder with the files and left_out.csv.
        files: By image name, those that exist now.
        made: How many of them were made by this call.
        left_out: Images without features, and why.
        unreadable: By image name, the number of patches that could not be read and are not in its file.
        unfinished: Files of runs that were killed.
    """

    path: Path
    files: dict[str, Path]
    made: int
    left_out: dict[str, str]
    unreadable: dict[str, int]
    unfinished: tuple[Path, ...]

    def lines(self) -> list[str]:
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


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """Encodes the foreground patches of every image, and writes one file of features for each.

    Attributes:
        encoder, pretrained, weights, stages, width, channels: As in `ModelConfig`; weights must come from somewhere.
        run: A run, or the folder of a model, whose encoder embeds: its settings and weights instead of the fields
            above, and its patches unless `patch` is given.
        patch: Which patches, at which resolution; default as in `PatchConfig`; a mapping gives some of it.
        root: Folder that relative paths of a CSV start from.
        masks: Folder of masks, for `patch.foreground` mask.
        dtype: Of the stored features; float16 halves the files.
        precision: Arithmetic of the encoder.
        chunk: Patches that are encoded at once; default is what `memory` allows, 64 at most on a CPU.
        memory: Budget such as `5GB`, of the device or, on a CPU, of the process; `auto` is what is free.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        decode: `auto` lets a GPU decode JPEG tiles of slides too, `cpu` does not; see `RunConfig.decode`.
        threads: Threads that read and decode.
        on_bad_image: An image that cannot be read ends the run, or is left out, counted and listed.
        unreadable: Share of an image's patches that may be unreadable.
        quiet: Show no progress.
    """

    encoder: str = "resnet50"
    pretrained: bool = False
    weights: str | Path | None = None
    stages: int | None = None
    width: int = 32
    channels: Literal[1, 3] = 3
    run: str | Path | None = None
    patch: PatchConfig | Mapping[str, Any] | None = None
    root: str | Path | None = None
    masks: str | Path | None = None
    dtype: Literal["float32", "float16"] = "float32"
    precision: Literal["auto", "float32", "tf32", "bf16"] = "float32"
    chunk: int | None = None
    memory: str | Bytes | None = "auto"
    device: str = "auto"
    decode: Decode = "auto"
    threads: int | None = None
    on_bad_image: Literal["fail", "skip"] = "fail"
    unreadable: str | float = "1%"
    quiet: bool = False

    def __call__(self, data: str | Path, out: str | Path) -> Embedded:
        config = self.config()
        items, left_out = items_to_embed(Path(data), self.root, self.masks, self.on_bad_image)
        with open_reader(config.run, torch.device("cpu")) as reader:
            config, _ = settle_edge(config, items, reader)
        folder = writable_folder(out)
        files = feature_names(folder, items)
        engine = self._engine(config)
        arithmetic = engine.encoders.arithmetic
        settings = settings_of(config, engine.model.encoder, self.dtype, arithmetic.name(arithmetic.look))
        open_items = [
            item
            for item in items
            if not already_there(files[item.name], {**settings, **own_settings(item)}, image_bytes(item))
        ]
        unfinished = unfinished_files(list(files.values()))
        bad: dict[str, int] = {}
        with nullcontext() if self.quiet else Progress(len(open_items), "embedding") as progress:
            if open_items:
                self._plan(config, engine)
                with engine.limit():
                    writer = EmbeddingFiles(config, engine, self.dtype, settings, progress)
                    for item, missing in writer.embed_all(open_items, files):
                        if isinstance(missing, KeyholeError):
                            if self.on_bad_image == "fail":
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

    def config(self) -> Config:
        patch = self.patch
        if self.run is not None:
            if self.pretrained or self.weights is not None:
                raise ConfigError("run gives the weights: leave out pretrained and weights")
            model, learned = encoder_of(self.run)
            patch = patch or learned
        else:
            names = ("encoder", "channels", "width", "stages", "pretrained", "weights")
            model = ModelConfig(**{name: getattr(self, name) for name in names})
        return Config(
            patch=patch or PatchConfig(),
            model=model,
            select=SelectConfig(chunk=self.chunk),
            train=TrainConfig(precision=self.precision),
            run=RunConfig(device=self.device, threads=self.threads, decode=self.decode),
            memory=self.memory,
            unreadable=self.unreadable,
        )

    def _engine(self, config: Config) -> Engine:
        device = choose_device(self.device, option="--device")
        if device.type == "cpu":
            steady_heap(False)
        network = _encoder(config, device)
        shape = patch_shape(config.model, config.patch.size)
        engine = Engine(
            network,
            run=config.run,
            plan=Plan(chunk=self.chunk or CPU_CHUNK),
            arithmetic=choose_precision(self.precision, network.encoder, shape),
            warn=lambda text: say(f"warning: {text}"),
        )
        engine.pace.options = _OPTIONS
        return engine

    def _plan(self, config: Config, engine: Engine) -> None:
        if config.memory is None and engine.device.type != "cuda":
            return
        work = Workload(
            patch_shape=patch_shape(config.model, config.patch.size),
            m=1,
            batch_size=1,
            largest_bag=1,
            chunk=self.chunk,
            ahead=config.run.ahead,
            jpeg=config.run.decode == "auto",
            host_buffers=2 * 4 * engine.model.pool.dim * (self.chunk or CPU_CHUNK),
        )
        engine.plan = make_plan(engine.encoders, work, config.memory, options=_OPTIONS)


def embed(data: str | Path, out: str | Path, **settings: Any) -> Embedded:
    """Encode the foreground patches of every image, and write one file of features for each.

    Args:
        data: CSV with `image` (labels are not needed), a folder of classes, or any folder of images.
        out: Folder for the files; each is named after its image, or after its path where names are taken twice.
        settings: Attributes of `Embedder`, such as `encoder="resnet50", pretrained=True`.

    Returns:
        The files, and what is missing.

    Raises:
        ConfigError: Settings do not fit, there are no weights, or files in `out` were made with other settings.
        DataError: There are no images.
        ImageError: An image cannot be read and `on_bad_image` is "fail".
        TooMuchUnreadable: Likewise more of its patches than `unreadable`.
        OutputError: `out` cannot be written.

    Example:
        >>> done = keyhole.embed("photos", "features", run="runs/one", quiet=True)
        >>> done.made, done.left_out
        (24, {})
    """
    return Embedder(**settings)(data, out)


def encoder_of(run: str | Path) -> tuple[ModelConfig, PatchConfig]:
    """Return the encoder of a run's best model, with its weights, and the patches that it was trained on."""
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
    model = config.model
    if not model.pretrained and model.weights is None:
        raise ConfigError(
            f"encoder {model.encoder}: where are its weights? Give --weights FILE (safetensors), or --pretrained to "
            "download timm's"
        )
    try:
        encoder = build_encoder(model, model.pretrained)
        if model.weights is not None:
            load_encoder(encoder, model.weights)
    except ValueError as error:
        raise ConfigError(f"--encoder: {error}") from error
    except (ConfigError, RunError) as error:  # options have other names here
        kind = ConfigError if isinstance(error, ConfigError) else RunError
        raise kind(str(error).replace("--model.", "--")) from error
    width = embedding_width(encoder, model, config.patch.size)
    return encoder_alone(encoder.to(device), width)


_OPTIONS = OptionNames("--encoder", "--patch.size", kept="", cache="", chunk="--chunk", device="--device")
