"""Every setting of a run, with its help and its checks beside it, for Python, YAML and the command line.

Precedence: default < recipe < `--config` file < flags. The config.yaml of a run folder is itself a valid `--config`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Field, Strict, model_validator

from keyhole.config.base import ONE_PERCENT, Contradiction, Memory, Settings, Share


# The text of a ValueError below says what was expected.
def _without_zero_byte(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path without a zero byte")
    return path


def _not_bool(value: object) -> object:
    if isinstance(value, bool):  # to Python, true is 1
        raise ValueError("a whole number")
    return value


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError("auto, cpu, cuda, cuda:1 (a number) or mps")
    return name


def _encoder(name: str) -> str:
    if not name.strip():
        raise ValueError("`small` or the name of a timm model")
    return name


Number = Annotated[float, AllowInfNan(False), Strict()]
Fraction = Annotated[Number, Ge(0), Le(1)]
Rate = Annotated[Number, Ge(0), Lt(1)]
Positive = Annotated[int, Gt(0), Strict()]
NotNegative = Annotated[int, Ge(0), Strict()]
PositiveFloat = Annotated[Number, Gt(0)]
NotNegativeFloat = Annotated[Number, Ge(0)]
Switch = Annotated[bool, Strict()]
Location = Annotated[Path, AfterValidator(_without_zero_byte)]
Device = Annotated[str, AfterValidator(_device)]
Encoder = Annotated[str, AfterValidator(_encoder)]
Channels = Annotated[Literal[1, 3], BeforeValidator(_not_bool)]
Auto = Literal["auto"]
Bits = Annotated[Literal[8, 9, 10, 11, 12, 13, 14, 15, 16], BeforeValidator(_not_bool)]
"""Bits in use of a value that is stored in 16."""
PACKAGED = ("lite0",)
"""Encoders whose ImageNet weights are installed with keyhole."""
FIXED_CHUNK_RULES = ("streaming",)
"""Selection rules whose result depends on how many patches are scored at a time."""
Decode = Literal["auto", "cpu"]


class DataConfig(Settings):
    """Which images, which labels, which split."""

    path: Location | None = None
    """Folder of classes, or CSV with `image`, one column per task, optional `split`, `group`, `mpp`."""
    root: Location | None = None
    """Folder that relative image paths of a CSV start from; default is the CSV's own folder."""
    tasks: tuple[str, ...] = ()
    """Columns to learn, each `name` or `name=kind` (multiclass, binary, multilabel, regression). If none is given, all
    columns that describe the images are learned, not those that only identify them, such as `slide_id`.
    `name=binary:class` names the positive class."""
    group: str = "auto"
    """Column whose images stay in one split, such as `patient`; `auto` takes `group`, else a column with a name
    such as `patient`, `case` or `slide`; `none` takes no column."""
    missing: tuple[str, ...] = ("nan", "NA", "N/A", "#N/A", "<NA>", "null", "None")
    """Words in label cells of a CSV that mean unknown, like an empty cell. They match in any case, but a word in mixed
    case only as written, so that `none` may be a class. Remove a word from the list to learn it as a class."""
    val: Rate = 0.15
    """Share of the images held out to choose the best model, where no `split` is given."""
    test: Rate = 0.15
    """Share of the images that training never opens, where no `split` is given."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What an unreadable image does: end the run, or be left out, counted and listed."""
    features: Location | None = None
    """Folder of feature files (.h5, .pt), one per image, named like the image without its suffix, as CLAM, TRIDENT and
    `keyhole embed` write them; they are read instead of the images."""
    masks: Location | None = None
    """Folder of masks (.png, .geojson), one per image, named like the image without its suffix, for `patch.foreground
    mask`; a column `mask` of the CSV overrides it."""
    hash_gb: NotNegativeFloat = 50.0
    """GB of files up to which the manifest holds their SHA-256; larger data are compared by file size."""
    cache: NotNegativeFloat | None = None
    """GB of decoded pixels that may stay in memory; default is a quarter of the memory free at the start, 0 never."""

    @model_validator(mode="after")
    def _leaves_images(self) -> Self:
        if self.val + self.test >= 1:
            raise Contradiction(
                f"data.val (={self.val}) and data.test (={self.test}) must leave images to learn from: their sum must "
                "be below 1"
            )
        return self


class PatchConfig(Settings):
    """How an image becomes patches."""

    size: Positive = 224
    """Side of a patch in pixels, at the chosen level or microns per pixel."""
    stride: Positive | None = None
    """Step between patches in pixels; default is the size, smaller overlaps."""
    level: NotNegative | None = None
    """Pyramid level to read; default 0. Excludes `mpp`."""
    mpp: PositiveFloat | None = None
    """Microns per pixel to read at, from the best level, resampled; none reads pixels as they are. Excludes `level`."""
    bits: Bits | None = None
    """Bits in use of a 16-bit picture that does not state them, such as 12 for the camera; the same for all images."""
    foreground: Literal["all", "non-empty", "tissue", "mask"] = "all"
    """Patches to look at: all, those not of one colour, those with stained tissue (Otsu on a thumbnail), or those on a
    mask file (column `mask`, or `data.masks`)."""
    min_foreground: Fraction = 0.01
    """Least share of a patch that must be `tissue` or on the `mask`. The paper's rule for CAMELYON16 is 1 %."""
    edge: Literal["auto", "drop", "shift", "reflect", "background"] = "auto"
    """Patches that reach over the image's border: `drop` leaves them out, `shift` moves them inwards, `reflect` mirrors
    the image, `background` fills them. `auto` is `background` for slides (several levels) and `shift` for others."""

    @model_validator(mode="after")
    def _one_scale(self) -> Self:
        if self.level is not None and self.mpp is not None:
            both = f"patch.level (={self.level}) and patch.mpp (={self.mpp})"
            raise Contradiction(f"{both} exclude each other: drop one")
        return self


class ModelConfig(Settings):
    """Encoder, attention pool and position code."""

    encoder: Encoder = "lite0"
    """`lite0` (EfficientNet-Lite0 with ImageNet weights, installed with keyhole), `small` (ours, from random weights,
    for small machines) or any timm name, such as `resnet18`. Stored features need none: they are projected to `dim`."""
    dim: Positive = 512
    """Width that stored features are projected to (LayerNorm, Linear, BatchNorm, ReLU), as published for CAMELYON16;
    also that of `projector linear`."""
    feature_width: Positive | None = None
    """Numbers of a stored feature; default is what the files hold."""
    feature_encoder: str | None = None
    """Encoder that made the stored features; default is what the files say."""
    feature_weights: str | None = None
    """SHA-256 of its weights; default is what the files say. Features of other weights are refused."""
    feature_patches: str | None = None
    """Patches that it saw, in words; default is what the files say."""
    channels: Channels = 3
    """Channels the encoder sees; grey images are repeated or colour turned to grey as needed."""
    width: Positive | None = None
    """Channels of the first stage of the encoder `small` (default 32; each later stage doubles them); other
    encoders have their own."""
    stages: Positive | None = None
    """Keep only the first stages of a timm encoder (the paper's Megapixel MNIST uses 2 of ResNet-18); for `small`,
    halvings after the first convolution, default 2."""
    pretrained: Switch = False
    """Download timm's pretrained weights. Nothing is downloaded unless you ask for it; `lite0` needs no download."""
    weights: Location | None = None
    """Weights for the encoder: a run, whose best model's encoder is taken, or a safetensors file."""
    start: Location | None = None
    """A run whose best model the new one starts from, for the same tasks. If it learned from images, all its weights
    are taken; if from stored features, its projector, attention and heads, on the encoder that made the features."""
    freeze: Switch = False
    """Do not train the encoder; only attention and heads learn."""
    batch_norm: Literal["auto", "learned", "frozen"] = "auto"
    """Statistics of the encoder's batch norms: `learned` from the kept patches of each step, or `frozen` as they are at
    the start. `auto` freezes those of ImageNet weights: both passes then see a patch alike."""
    projector: Literal["auto", "linear", "none"] = "auto"
    """Layers between a timm encoder and the attention: `linear` projects to `dim` as stored features are, which spreads
    patches apart; `none`, as published for images, attends to what the encoder gives. `auto` is `linear` where the
    encoder starts from pretrained or given weights."""
    heads: Positive = 8
    """Attention heads. The paper uses 8."""
    hidden: Positive | None = None
    """Width inside the attention block's MLP; default 4 times the embedding's."""
    dropout: Rate = 0.1
    """Dropout after attention and in the MLP, as in the paper."""
    attention_dropout: Rate = 0.1
    """Dropout of attention weights, as in the paper."""
    position: Literal["none", "1d", "2d"] = "none"
    """Position code: none, sinusoidal over the patch index (as published), or over patch coordinates."""

    @property
    def imagenet(self) -> bool:
        """Whether the encoder starts from ImageNet weights: timm's, or those of a package."""
        return self.weights is None and (self.pretrained or self.encoder in PACKAGED)

    @property
    def learned_before(self) -> bool:
        """Whether the encoder starts from weights that were learned before, not from random ones."""
        return self.imagenet or self.weights is not None or self.start is not None

    @property
    def freezes_norm(self) -> bool:
        """Whether the encoder's batch norms keep their statistics."""
        return self.batch_norm == "frozen" or (self.batch_norm == "auto" and self.imagenet)

    @property
    def projects(self) -> bool:
        """Whether the embeddings of an encoder of images are projected to `dim`."""
        if self.feature_width is not None or self.encoder == "small":
            return False
        return self.projector == "linear" or (self.projector == "auto" and self.learned_before)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.encoder == "small" and self.projector == "linear":
            raise Contradiction(
                "model.projector linear is for timm's encoders; `small` ends with a batch norm of its own"
            )
        if self.encoder == "small" and self.pretrained:
            raise Contradiction(
                "model.pretrained: the encoder `small` has no pretrained weights; name a timm model with "
                "model.encoder, or leave this off"
            )
        if self.pretrained and self.weights is not None:
            raise Contradiction("model.pretrained and model.weights exclude each other: drop one")
        return self


class SelectConfig(Settings):
    """Iterative patch selection."""

    m: Positive = 32
    """Patches kept per image (M). The time of the learning pass grows with it, and its memory until `--memory` makes it
    learn from them in parts."""
    chunk: Positive | None = None
    """Patches scored at once in the pass without gradients (I); default is what `--memory` allows. Part of the
    method under `streaming`, where it must be given; under `global` the result does not depend on it."""
    rule: Literal["global", "streaming"] = "global"
    """`global` does not depend on order or chunk size; `streaming` is the published rule."""
    order: Literal["file", "shuffled"] = "file"
    """Order in which `streaming` sees the patches. `shuffled` is the published one, anew for each training step and
    alike for its images; files that are not decoded into memory are then read slowly."""

    @property
    def shuffles(self) -> bool:
        """Whether patches are looked at in a random order; `global` does not depend on it."""
        return self.order == "shuffled" and self.rule in FIXED_CHUNK_RULES

    @model_validator(mode="after")
    def _streaming_has_a_chunk(self) -> Self:
        if self.rule in FIXED_CHUNK_RULES and self.chunk is None:
            raise Contradiction(
                f"select.rule {self.rule} keeps other patches with other chunks: give select.chunk, the I of the "
                "published method"
            )
        return self


class TrainConfig(Settings):
    """Learning."""

    epochs: Positive = 30
    """Passes over the training images."""
    batch: Positive = 8
    """Images per step (B)."""
    lr: PositiveFloat | Auto = "auto"
    """Peak rate of AdamW. `auto` is 1e-3 for an encoder that starts from random weights, and 3e-4 for pretrained or
    given weights and for stored features, as published."""
    encoder_lr: NotNegativeFloat = 1.0
    """The encoder's rate as a multiple of `lr`; below 1 spares pretrained weights."""
    weight_decay: NotNegativeFloat = 0.1
    """AdamW's decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: `matrices`, or `all` weights, norms and biases too, as in the published code."""
    warmup: NotNegativeFloat = 1.0
    """Epochs of linear warm-up; selection is near random at first, so large first steps hurt."""
    final_lr: Fraction = 0.001
    """Rate at the end of the cosine, as a share of `lr`."""
    explore: NotNegativeFloat | Auto = "auto"
    """Epochs of exploring: in the first half patches are kept at random and attention is held uniform, in the second
    the random share falls to none. `auto` explores in half of the epochs where the encoder starts from random weights,
    whose scores mean nothing at first, and else not at all. 0 is the published method."""
    average: Fraction | Auto = "auto"
    """Decay per step of a running mean of the weights, which is validated and stored in place of the last step's; 0 is
    none, as published. `auto` is 0.99 where the encoder starts from random weights, and else 0."""
    clip: NotNegativeFloat = 1.0
    """Largest norm of the gradient; 0 never clips."""
    balance: Literal["none", "loss"] = "none"
    """`loss` weighs classes by the inverse of their frequency in the training split."""
    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"
    """Arithmetic of the encoder; `auto` is bf16 on a GPU that has it; on a CPU with bf16 instructions, bf16 in the pass
    without gradients, except with small encoders and those of depthwise convolutions, such as `lite0`; else float32.
    `tf32`, which is faster, is float32 rounded in convolutions and matrix products on a GPU."""
    metric: str = "auto"
    """Validation metric that names the best model: `loss`, `TASK.METRIC` or `METRIC` (mean over the tasks where it is
    defined); `auto` is `auroc` where all tasks have classes, `mae` for one regression task, else `loss`, also where
    kinds are mixed."""
    watch: Literal["val", "test"] = "val"
    """Split whose metrics are computed after each epoch. `val` names the best model. `test` names none: the last epoch
    is the model, as in the published code."""
    patience: NotNegative = 0
    """Stop after this number of epochs without a better validation metric; 0 never stops early."""
    seed: NotNegative = 0
    """Same seed, same run (on CPU, to the bit)."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that a run opens."""
        return ("train", "val") if self.watch == "val" else ("train", "val", "test")

    @model_validator(mode="after")
    def _chooses_on_val(self) -> Self:
        if self.watch == "test" and self.patience:
            raise Contradiction(
                f"train.patience (={self.patience}) would choose by the test split (train.watch test): drop one"
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.warmup > self.epochs:
            raise Contradiction(
                f"train.warmup (={self.warmup:g}) must not exceed train.epochs (={self.epochs}): the full rate would "
                "never be reached"
            )
        return self


class AugmentConfig(Settings):
    """Drawn once per image and epoch, the same in both passes."""

    flip: Switch = True
    """Mirror left-right and up-down at random. Off where orientation carries meaning: text, digits, roads."""
    rotate: Switch = True
    """Turn by 0, 90, 180 or 270 degrees at random."""
    shift: Switch = True
    """Shift the patch grid by up to one stride, so that borders fall elsewhere each epoch."""
    color: Fraction = 0.1
    """Strength of brightness, contrast, saturation and hue changes."""


class RunConfig(Settings):
    """Machine, output and progress."""

    device: Device = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`; `auto` is a CUDA GPU, else Apple's GPU, else the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the encoder for this machine; `auto` does on a GPU where that pays back within the run. It says why."""
    threads: Positive | None = None
    """Threads that read and decode; default one per core, at most 16. With a GPU one core of 3 or more stays free."""
    decode: Decode = "auto"
    """Where JPEG tiles of slides are decoded. `auto` gives a GPU those that the threads have not decoded in time; its
    colours differ a little, and which tiles these are differs from run to run. `cpu` leaves all of them to the threads,
    so that both passes see the same pixels."""
    ahead: Positive = 4
    """Chunks read ahead of the device; host memory grows with it."""
    stall: PositiveFloat = 120.0
    """Seconds that a single read may take; then it is tried again."""
    retries: NotNegative = 3
    """Number of further tries for a file that cannot be reached or stalls, after 1, 4, 16 ... seconds."""
    save_minutes: PositiveFloat = 5.0
    """Minutes after which the next step saves the state; the end of each epoch saves it too."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers to send metrics to; default none."""


class Config(Settings):
    """A whole run.

    Example:
        >>> config = keyhole.Config(patch={"size": 100}, select={"m": 10})
        >>> config.patch.size, config.select.m, config.train.epochs
        (100, 10, 30)
    """

    out: Location | None = None
    """Run folder to create; must not exist yet."""
    memory: Memory = None
    """Memory budget such as `5GB`, of the GPU or, on a CPU, of the process. How many patches are encoded at once is
    chosen so that it is kept. `auto` is the memory that is free."""
    unreadable: Share = ONE_PERCENT
    """Share of all patches that may be unreadable before training ends with an error; for each image in predicting."""
    data: DataConfig = Field(default_factory=DataConfig)
    patch: PatchConfig = Field(default_factory=PatchConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    select: SelectConfig = Field(default_factory=SelectConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    run: RunConfig = Field(default_factory=RunConfig)
