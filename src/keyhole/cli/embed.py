"""`keyhole embed`: every patch of every image through an encoder once, into one file of features for each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from pydantic import Field

from keyhole.cli.options import Options, print_options, read
from keyhole.config.amounts import ONE_PERCENT, Memory, Share
from keyhole.config.settings import Channels, Decode, Device, Encoder, ModelConfig, PatchConfig, Positive
from keyhole.errors import ConfigError


class EmbedOptions(Options):
    """Embed the patches of every image, and write one HDF5 file of features for each, as CLAM and TRIDENT do.

    `keyhole train DATA --data.features DIR` learns from them. The same line again goes on where it was stopped.
    """

    EXAMPLES: ClassVar = (
        "keyhole embed slides.csv --encoder resnet50 --pretrained --patch.foreground tissue --out features",
        "keyhole embed slides --encoder small --width 16 --weights small.safetensors --out features",
    )
    ESSENTIAL: ClassVar = (
        *("out", "run", "encoder", "pretrained", "weights", "patch.size", "patch.mpp", "patch.foreground", "masks"),
        *("root", "dtype", "memory", "device", "on-bad-image", "print-config"),
    )

    data: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = None
    """CSV with `image` (labels are not needed), folder of classes, or any folder of images."""
    out: Path | None = None
    """Folder for the files; created if it is not there."""
    run: Path | None = None
    """Run, or folder of a model, whose encoder embeds: gives the encoder, its weights and the patch settings; flags of
    patches go over it."""
    encoder: Encoder = "resnet50"
    """Any timm name, or `small`."""
    pretrained: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Download timm's pretrained weights. Nothing is downloaded without being asked for."""
    weights: Path | None = None
    """Safetensors file with weights for the encoder."""
    stages: Positive | None = None
    """Keep only the first stages of a timm encoder; for `small`, halvings after the first convolution."""
    width: Positive = 32
    """Channels of the first stage of the `small` encoder."""
    channels: Channels = 3
    """Channels the encoder sees."""
    patch: PatchConfig = Field(default_factory=PatchConfig)
    root: Path | None = None
    """Folder that relative image paths of a CSV start from; default is the CSV's own folder."""
    masks: Path | None = None
    """Folder of masks (.png, .geojson), one an image by its name without suffix, for `--patch.foreground mask`."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored features; float16 halves the files."""
    precision: Literal["auto", "float32", "tf32", "bf16"] = "float32"
    """Arithmetic of the encoder; `auto` is bf16 on a GPU that has it, `tf32` is float32 rounded in convolutions and
    products on a GPU; both are faster. Features outlive the machine, hence float32, without TF32."""
    chunk: Positive | None = None
    """Patches that are encoded at once; default is what `--memory` allows, 64 at most on a CPU."""
    memory: Memory = None
    """Budget such as `5GB`, of the device or, on CPU, of the process; `auto` is what is free."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    decode: Decode = "auto"
    """Where JPEG tiles of slides are decoded: `auto` lets a GPU take part, which changes features a little from run to
    run; `cpu` does not."""
    threads: Positive | None = None
    """Threads that read and decode; default one per core, at most 16. With a GPU one core of 3 or more stays free."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What an unreadable image does: end the run, or be left out, counted and listed."""
    unreadable: Share = ONE_PERCENT
    """Share of an image's patches that may be unreadable; they are left out of its features, and counted."""


def run(argv: list[str]) -> int:
    options = _over_run(read(EmbedOptions, argv, "keyhole embed"), argv)
    _check(options)
    if options.print_config:
        return print_options(options)
    if options.data is None:
        raise ConfigError("no data given: keyhole embed DATA --out DIR, where DATA is a CSV or a folder of images")
    if options.out is None:
        raise ConfigError("--out is missing: keyhole embed DATA --out DIR, a folder for the files of features")

    from keyhole.inference.embed import embed

    given: dict[str, Any] = {name: each.expanduser() if isinstance(each, Path) else each for name, each in options}
    del given["print_config"]
    done = embed(**given)
    for name, reason in done.left_out.items():
        print(f"left out: {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)
    print("\n".join(done.lines()))
    return 0


def _over_run(options: EmbedOptions, argv: list[str]) -> EmbedOptions:
    """Return the options, over the patch settings of `--run`, beside which an encoder is an error."""
    if options.run is None:
        return options
    from keyhole.inference.embed import encoder_of

    for name in ("encoder", "pretrained", "weights", "stages", "width", "channels"):
        if getattr(options, name) != EmbedOptions.model_fields[name].default:
            raise ConfigError(f"--run gives the encoder and its weights: leave out --{name}")
    _, patch = encoder_of(options.run.expanduser())
    return read(EmbedOptions, argv, "keyhole embed", {"patch": patch.model_dump()})


def _check(options: EmbedOptions) -> None:
    """Raise ConfigError for options that exclude each other, under the names they have here."""
    try:
        ModelConfig(encoder=options.encoder, pretrained=options.pretrained, weights=options.weights)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.", "--")) from error
