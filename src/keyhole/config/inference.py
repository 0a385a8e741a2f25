"""Settings of predict, evaluate and embed, the same in Python and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from keyhole.config.base import ONE_PERCENT, Contradiction, Memory, Settings, Share
from keyhole.config.settings import Channels, Decode, Device, Encoder, ModelConfig, PatchConfig, Positive, Switch
from keyhole.errors import ConfigError


class InferenceSettings(Settings):
    """Settings of everything that computes with a trained model or encoder."""

    device: Device = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`; `auto` is a CUDA GPU, else Apple's GPU, else the CPU."""
    decode: Decode = "auto"
    """Where JPEG tiles of slides are decoded: `auto` lets a GPU take part, which changes results a little from run to
    run; `cpu` does not."""
    memory: Memory = None
    """Budget such as `5GB`, of the device or, on CPU, of the process; `auto` is what is free."""
    unreadable: Share = ONE_PERCENT
    """Share of an image's patches that may be unreadable."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What an unreadable image does: end the command, or be left out, counted and listed."""


class EvaluateSettings(InferenceSettings):
    """Evaluate the best model of a run."""

    run: Path
    """Run folder of `keyhole train`; with other data, also the folder of a model."""
    data: Path | None = None
    """Other labelled data to evaluate on: a folder of classes or a CSV; default is the run's own."""
    root: Path | None = None
    """Folder that the run's own images were moved to. With `data`, folder that relative paths of the CSV start from."""
    split: str = "test"
    """Split to evaluate: train, val or test; images of other data without splits count as test."""
    out: Path | None = None
    """Folder for metrics, table and contact sheet; default is in the run folder, under evaluation. With it, nothing is
    written into the run folder."""
    features: Path | None = None
    """Folder of feature files of the images in `data`."""
    masks: Path | None = None
    """Folder of masks of the images in `data`."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What an unreadable image or annotation does: end the evaluation, or be left out, counted and listed."""


class CompareSettings(Settings):
    """Put the predictions of several runs for the same images side by side."""

    runs: tuple[Path, ...] = ()
    """Run folders, or folders of evaluations; the others are compared with the first."""
    split: Literal["train", "val", "test"] = "test"
    """Split of the run folders."""
    out: Path | None = None
    """Folder for compare.html and the tables; default is `comparison-A-B` in the current folder, where A
    and B are the names of the runs."""


class EmbedSettings(InferenceSettings):
    """Encode the foreground patches of every image, and write one file of features for each."""

    data: Path | None = None
    """CSV with `image` (labels are not needed), folder of classes, or any folder of images."""
    out: Path | None = None
    """Folder for the files; created if it is not there."""
    run: Path | None = None
    """Run, or folder of a model, whose encoder embeds: gives the encoder, its weights and the patch settings; given
    patch settings override them."""
    encoder: Encoder = "resnet50"
    """Any timm name, `lite0` (which brings its weights), or `small`."""
    pretrained: Switch = False
    """Download timm's pretrained weights. Nothing is downloaded without being asked for."""
    weights: Path | None = None
    """Safetensors file with weights for the encoder."""
    stages: Positive | None = None
    """Keep only the first stages of a timm encoder; for `small`, halvings after the first convolution."""
    width: Positive = 32
    """Channels of the first stage of the `small` encoder."""
    channels: Channels = 3
    """Channels the encoder sees: 1 where a run that goes on from these features has `model.channels` 1."""
    patch: PatchConfig = Field(default_factory=PatchConfig)
    root: Path | None = None
    """Folder that relative image paths of a CSV start from; default is the CSV's own folder."""
    masks: Path | None = None
    """Folder of masks (.png, .geojson), one per image, named like the image without its suffix, for `patch.foreground
    mask`."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored features; float16 halves the files."""
    precision: Literal["auto", "float32", "tf32", "bf16"] = "float32"
    """Arithmetic of the encoder; `auto` is bf16 on a GPU that has it, `tf32` is float32 rounded in convolutions and
    products on a GPU; both are faster. Features outlive the machine, hence float32, without TF32."""
    chunk: Positive | None = None
    """Patches that are encoded at once; default is what `memory` allows, 64 at most on a CPU."""
    threads: Positive | None = None
    """Threads that read and decode; default one per core, at most 16. With a GPU one core of 3 or more stays free."""
    unreadable: Share = ONE_PERCENT
    """Share of an image's patches that may be unreadable; they are left out of its features, and counted."""

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        try:
            ModelConfig(encoder=self.encoder, pretrained=self.pretrained, weights=self.weights)
        except ConfigError as error:  # settings have other names here
            raise Contradiction(str(error).replace("model.", "--")) from error
        return self
