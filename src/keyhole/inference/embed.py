"""Store features: encode every patch of every image once, and write one HDF5 file for each image.

The same call continues after a stop: a file is complete or absent, and complete files are not written again.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keyhole.config.inference import EmbedSettings
from keyhole.config.settings import Config, ModelConfig, PatchConfig, RunConfig, SelectConfig, TrainConfig
from keyhole.data.companions import feature_names
from keyhole.data.manifest import write_left_out
from keyhole.data.unlabelled import items_to_embed
from keyhole.engine import Engine
from keyhole.engine.device import choose_device, choose_precision
from keyhole.engine.embedding import encoder_alone
from keyhole.engine.memory.plan import OptionNames, Plan, cpu_chunk, make_plan
from keyhole.engine.memory.probe import Workload
from keyhole.engine.opening import open_reader, settle_edge
from keyhole.errors import ConfigError, DataError, KeyholeError, RunError
from keyhole.inference.embedding_files import EmbeddingFiles, image_bytes, own_settings, settings_of, unfinished_files
from keyhole.nn import IPSClassifier
from keyhole.nn.build import build_encoder, patch_shape, projected
from keyhole.patches.features.writer import already_there
from keyhole.runs.checkpoint import load_encoder, read_info, weights_file
from keyhole.util.files import writable_folder
from keyhole.util.progress import Progress, say
from keyhole.util.version import VERSION
from keyhole.util.wording import counted, listed

ENCODER = ("encoder", "channels", "width", "stages")
"""Settings that make an encoder, beside its weights."""


@dataclass(frozen=True)
class Embedded:
    """Result of `embed`.

    Attributes:
        path: Folder with the files and left_out.csv.
        files: Existing files by image name.
        made: Number of files that this call wrote.
        left_out: Images without features, with the reason.
        unreadable: Number of unreadable patches by image name; they are not in its file.
        unfinished: Unfinished files of runs that were killed.
    """

    path: Path
    files: dict[str, Path]
    made: int
    left_out: dict[str, str]
    unreadable: dict[str, int]
    unfinished: tuple[Path, ...]

    def __repr__(self) -> str:
        return f"Embedded({str(self.path)!r}, {counted(len(self.files))})"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return what was done, what was left out and where everything is."""
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


def embed(data: str | Path, out: str | Path, quiet: bool = False, **settings: Any) -> Embedded:
    """Encode the foreground patches of every image, and write one file of features for each.

    Args:
        data: CSV with `image` (labels are not needed), a folder of classes, or any folder of images.
        out: Folder for the files; each is named after its image, or after its path where names are taken twice.
        quiet: Show no progress.
        settings: Fields of `EmbedSettings`, such as `encoder="resnet50", pretrained=True`. With `run`, its patches are
            used unless `patch` is given.

    Returns:
        The files, and what is missing.

    Raises:
        ConfigError: Settings do not fit, there are no weights, or files in `out` were made with other settings.
        DataError: There are no images.
        ImageError: An image cannot be read and `on_bad_image` is "fail".
        TooMuchUnreadable: More of an image's patches are unreadable than `unreadable` and `on_bad_image` is "fail".
        OutputError: `out` cannot be written.

    Example:
        >>> done = keyhole.embed("photos", "features", run="runs/one", quiet=True)
        >>> done.made, done.left_out
        (24, {})
    """
    asked = EmbedSettings(data=Path(data), out=Path(out), **settings)
    config = _config(asked)
    if asked.masks is not None and config.patch.foreground != "mask":
        rule = config.patch.foreground
        raise ConfigError(f"--masks {asked.masks}: not used with patch.foreground {rule}. Add --patch.foreground mask.")
    items, left_out = items_to_embed(Path(data), asked.root, asked.masks, asked.on_bad_image)
    with open_reader(config.run, torch.device("cpu")) as reader:
        config, _ = settle_edge(config, items, reader)
    folder = writable_folder(out)
    files = feature_names(folder, items)
    engine = _engine(config)
    arithmetic = engine.encoders.arithmetic
    written = settings_of(config, engine.model.encoder, asked.dtype, arithmetic.name(arithmetic.look))
    open_items = [
        item
        for item in items
        if not already_there(files[item.name], {**written, **own_settings(item)}, image_bytes(item))
    ]
    unfinished = unfinished_files(list(files.values()))
    bad: dict[str, int] = {}
    with nullcontext() if quiet else Progress(len(open_items), "embedding") as progress:
        if open_items:
            _plan(config, engine)
            with engine.limit():
                writer = EmbeddingFiles(config, engine, asked.dtype, written, progress)
                for item, missing in writer.embed_all(open_items, files):
                    if isinstance(missing, KeyholeError):
                        if asked.on_bad_image == "fail":
                            raise missing
                        left_out[item.name] = str(missing)
                    elif missing:
                        bad[item.name] = missing
    write_left_out(folder / "left_out.csv", left_out.items())
    there = {item.name: files[item.name] for item in items if item.name not in left_out}
    if not there:
        raise DataError(f"{data}: none of the {len(items)} images can be embedded; see {folder / 'left_out.csv'}")
    return Embedded(folder, there, sum(item.name in there for item in open_items), left_out, bad, unfinished)


def _config(asked: EmbedSettings) -> Config:
    patch = asked.patch
    if asked.run is not None:
        if asked.pretrained or asked.weights is not None:
            raise ConfigError("run gives the weights: leave out pretrained and weights")
        model, learned = encoder_of(asked.run)
        patch = patch if "patch" in asked.model_fields_set else learned
    else:
        given = {name: getattr(asked, name) for name in (*ENCODER, "pretrained", "weights")}
        model = ModelConfig(**given, projector="none")
    return Config(
        patch=patch,
        model=model,
        select=SelectConfig(chunk=asked.chunk),
        train=TrainConfig(precision=asked.precision),
        run=RunConfig(device=asked.device, threads=asked.threads, decode=asked.decode),
        memory=asked.memory,
        unreadable=asked.unreadable,
    )


def _engine(config: Config) -> Engine:
    device = choose_device(config.run.device, option="--device")
    network = _encoder(config, device)
    shape = patch_shape(config.model, config.patch.size)
    engine = Engine(
        network,
        run=config.run,
        plan=Plan(chunk=config.select.chunk or cpu_chunk(shape)),
        arithmetic=choose_precision(config.train.precision, network.encoder, shape),
        warn=lambda text: say(f"warning: {text}"),
    )
    engine.pace.options = _OPTIONS
    return engine


def _plan(config: Config, engine: Engine) -> None:
    """Plan the memory, where there is a budget."""
    if config.memory is None and engine.device.type != "cuda":
        return
    shape = patch_shape(config.model, config.patch.size)
    work = Workload(
        patch_shape=shape,
        m=1,
        batch_size=1,
        largest_bag=1,
        chunk=config.select.chunk,
        ahead=config.run.ahead,
        jpeg=config.run.decode == "auto",
        host_buffers=2 * 4 * engine.model.pool.dim * (config.select.chunk or cpu_chunk(shape)),
    )
    engine.plan = make_plan(engine.encoders, work, config.memory, options=_OPTIONS)


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
    kept = {name: getattr(own.model, name) for name in (*ENCODER, "dim")}
    return ModelConfig(**kept, projector="linear" if own.model.projects else "none", weights=file), own.patch


def _encoder(config: Config, device: torch.device) -> IPSClassifier:
    model = config.model
    try:
        encoder, width = projected(build_encoder(model), model, config.patch.size)
        if not model.learned_before:
            raise ConfigError(
                f"encoder {model.encoder}: where are its weights? Give --weights FILE (safetensors), --pretrained to "
                "download timm's, or --encoder lite0, whose weights are installed"
            )
        if model.weights is not None:
            load_encoder(encoder, model.weights)
    except ValueError as error:
        raise ConfigError(f"--encoder: {error}") from error
    except (ConfigError, RunError) as error:  # options have other names here
        kind = ConfigError if isinstance(error, ConfigError) else RunError
        raise kind(str(error).replace("--model.", "--")) from error
    return encoder_alone(encoder.to(device), width)


_OPTIONS = OptionNames("--encoder", "--patch.size", kept="", cache="", chunk="--chunk", device="--device")
