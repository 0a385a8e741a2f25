"""Predict images with a trained model: one selection pass gives a `Prediction` with all that shows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import PIL.Image
import torch
from numpy.typing import NDArray

from keyhole.config.base import Bytes
from keyhole.config.settings import Config, Decode
from keyhole.data.companions import masks_in
from keyhole.data.item import Item, exists
from keyhole.data.resolution import NOT_KNOWN, Resolution
from keyhole.engine import Engine, Inference
from keyhole.engine.device import choose_device, choose_precision
from keyhole.engine.memory.plan import PREDICTING_OPTIONS, prediction_plan
from keyhole.engine.opening import opener
from keyhole.errors import ConfigError, ImageLost, KeyholeError, RunError
from keyhole.images.pillow import image_in_memory
from keyhole.images.scale import given_scale
from keyhole.inference.answer import Answers, damage
from keyhole.inference.thresholds import decisions
from keyhole.nn import IPSClassifier, build_classifier
from keyhole.nn.build import patch_shape
from keyhole.patches.image_cache import ImageCache
from keyhole.report.prediction import Prediction
from keyhole.runs.checkpoint import load_weights, model_file, read_tensors
from keyhole.tasks.kinds import Task
from keyhole.tasks.measures import THRESHOLD
from keyhole.tasks.operating_point import Threshold
from keyhole.util.progress import Progress, say
from keyhole.util.version import VERSION
from keyhole.util.wording import listed

SECTIONS = ("patch", "model", "select")
"""Sections of the configuration that a model file holds."""


def describe(config: Config, tasks: Sequence[Task], **about: Any) -> dict[str, Any]:
    """Return the description of a model without its weights, for model.json."""
    plain: dict[str, Any] = {name: getattr(config, name).model_dump() for name in SECTIONS}
    # The weights are in the file, so nothing is downloaded or read from elsewhere.
    plain["model"] |= {"pretrained": False, "weights": None, "start": None}
    return {
        "keyhole": VERSION,
        "name": config.out.name if config.out is not None else "model",
        "tasks": [task.to_json() for task in tasks],
        "precision": config.train.precision,
        "batch": config.train.batch,
        **plain,
        **about,
    }


def load(
    run: str | os.PathLike[str],
    device: str = "auto",
    memory: str | Bytes | None = "auto",
    unreadable: str | float = "1%",
    decode: Decode = "auto",
    engine: Engine | None = None,
    threshold: float | Literal["balanced", "sensitive"] | None = None,
) -> Predictor:
    """Load the best model of a run, or a model copied out of one.

    Args:
        run: A run folder, a `Run`, or a folder with model.safetensors.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        memory: Budget such as `5GB`, of the device or, on a CPU, of the process; `auto` is what is free.
        unreadable: Share of an image's patches that may be unreadable, such as `1%`.
        decode: `auto` lets a GPU decode JPEG tiles of slides too, `cpu` does not; see `RunConfig.decode`.
        engine: Engine with the same settings, whose model gets the weights; default is a new one.
        threshold: Probability above which the positive class of a binary task, or a label of a multilabel one, is
            predicted, 0.5 by default; or the rule that chose it on the validation images: `balanced`, the largest sum
            of sensitivity and specificity, or `sensitive`, the highest that finds 95 % of the class. A class that all
            or none of them have keeps 0.5.

    Returns:
        A predictor, in evaluation mode.

    Raises:
        RunError: There is no model, or it is damaged.
        ConfigError: The device, budget, share or threshold is invalid, or no threshold can be chosen.

    Example:
        >>> predictor = keyhole.load("runs/one", device="cpu")
        >>> predictor.predict("photos/red/1.png")
        Prediction('photos/red/1.png', label: red ..., kept 4 of 16 patches)
    """
    asked = Config(memory=memory, unreadable=unreadable)
    if decode not in get_args(Decode):
        raise ConfigError(f"decode {decode}: expected {' or '.join(get_args(Decode))}")
    folder = Path(run)
    if folder.is_file():
        raise RunError(
            f"{folder}: is a file, expected a run folder or the folder of a model. Give the folder that holds it: "
            f"{folder.parent}"
        )
    file = model_file(folder)
    weights, info = read_tensors(file)
    chosen = choose_device(device, option="--device")
    try:
        tasks = [Task.from_json(task) for task in info["tasks"]]
        given = {name: info[name] for name in SECTIONS} | {"train": {"batch": info["batch"]}}
        config = asked.replace(run={"decode": decode}, **given)
        name, precision = str(info["name"]), str(info["precision"])
        resolution = Resolution.from_json(info.get("resolution"))
        usual_patches = int(info.get("usual_patches", 0))
    except (KeyError, TypeError, ConfigError, RunError) as error:
        raise RunError(
            f"{file}: its description does not fit keyhole {VERSION} ({error}). Was it made by another version?"
        ) from error
    thresholds = {} if threshold is None else decisions(folder, tuple(tasks), threshold)
    if engine is not None:
        load_weights(engine.model, weights, file)
        engine.weights_changed()
    else:
        with torch.random.fork_rng(devices=[]):  # the fresh weights are replaced; a caller's random state stays
            model = build_classifier(config.model, tasks, config.patch.size, pretrained=False)
        load_weights(model, weights, file)
        shape = patch_shape(config.model, config.patch.size)
        arithmetic = choose_precision(precision, model.to(chosen).encoder, shape)
        engine = Engine(model, config.select, config.run, arithmetic=arithmetic, warn=_warn)
    predictor = Predictor(engine.model, config, tasks, name, resolution, engine)
    predictor.thresholds, predictor.usual_patches = thresholds, usual_patches
    return predictor


class Predictor:
    """Predicts images with one model.

    Args:
        model: The classifier, on its device.
        config: Configuration with the model's sections `patch`, `model` and `select`.
        tasks: Tasks of the model, in the order of its queries.
        name: Name of the model in predictions.
        resolution: Resolution of the training images, if known.
        engine: Engine of the model; default is one that computes in the model's precision.
    """

    def __init__(
        self,
        model: IPSClassifier,
        config: Config,
        tasks: Sequence[Task],
        name: str = "model",
        resolution: Resolution = NOT_KNOWN,
        engine: Engine | None = None,
    ) -> None:
        self.model, self.config, self.tasks, self.name = model.eval(), config, tuple(tasks), name
        self.engine = engine or Engine(model, config.select, config.run, warn=_warn)
        self.device, self.resolution = self.engine.device, resolution
        self.thresholds: dict[str, dict[str, Threshold]] = {}  # by task and class; one half where there is none
        self._free: list[Engine] | None = None  # engines that no call uses; None before the first call
        self.silent = False  # True: no warnings about doubts, which the user knows already
        self.usual_patches = 0  # number that nearly all training images have at least; 0 where it is not known
        self.whole_patches = 0  # number of kept patches, best first, that the pictures of a prediction hold in full
        self._told: set[str] = set()

    def __repr__(self) -> str:
        return f"Predictor({self.name!r} on {self.device}, of {listed(task.name for task in self.tasks)})"

    def predict(
        self,
        image: str | Path | NDArray[Any] | PIL.Image.Image,
        mpp: float | None = None,
        mask: str | Path | None = None,
        pictures: bool = True,
    ) -> Prediction:
        """Predict one image.

        Args:
            image: An image or slide file; for a model of stored features a file of these. Or pixels in memory: uint8
                (h, w, 3), (h, w, 1) or (h, w), or a picture of Pillow, whose grey values of 16 bits are scaled by
                `patch.bits` as those of a file are.
            mpp: Microns per level-0 pixel, 0.02 ... 100, where the file does not state it or is wrong. It replaces what
                the file states, with a warning and a note in the prediction.
            mask: PNG or GeoJSON of the foreground, for a model of `patch.foreground mask` only.
            pictures: Add a small picture of the image and of its kept patches to the prediction.

        Returns:
            Label, probabilities, kept patches and the score of every patch.

        Raises:
            ImageError: The file cannot be read, or the pixels are of another kind.
            TooMuchUnreadable: More of its patches are unreadable than `Config.unreadable` allows.
            ConfigError: The image is smaller than a patch, does not have the resolution that the model needs, `mpp` is
                impossible, or the model does not use the `mask`.

        Example:
            >>> prediction = keyhole.load("runs/one", device="cpu").predict("photos/red/1.png")
            >>> prediction.label
            {'label': 'red'}
            >>> len(prediction.kept)
            4
        """
        known = None if mpp is None else given_scale(mpp)
        self.check_masks("mask", mask)
        images = None
        if isinstance(image, str | Path):
            item = _item(image)
        else:
            picture = image_in_memory(image, self.config.patch.bits)
            images, item = ImageCache(image=picture), Item(str(picture.path), picture.path, {})
        item = replace(item, mpp=known, mpp_from="`mpp`", mask=None if mask is None else Path(mask).absolute())
        _existing([item], in_memory=images is not None)
        found = self.predict_items([item], images=images, description=None, pictures=lambda *_: pictures)
        ((_, prediction),) = found  # to the end, where it warns
        return prediction

    def predict_many(
        self,
        paths: Sequence[str | Path],
        on_bad_image: Literal["fail", "skip"] = "fail",
        left_out: Callable[[str, str], None] | None = None,
        masks: str | Path | None = None,
    ) -> Iterator[Prediction]:
        """Predict many images in batches that are read ahead.

        Args:
            paths: Image files, or files of stored features.
            on_bad_image: "fail" raises at the first image that cannot be read, "skip" leaves it out. An image may have
                a few unreadable patches (`Config.unreadable`), which `Prediction.unreadable` lists.
            left_out: Called with the name and the reason of each image skipped.
            masks: Folder of masks by the images' names, for a model of `patch.foreground mask` only.

        Yields:
            A prediction per image, in the order of the paths, without pictures.

        Raises:
            ImageError, ConfigError, TooMuchUnreadable: As for `predict`, where `on_bad_image` is "fail". Missing
                files are reported before the first image is predicted.
        """
        if isinstance(paths, str | Path):
            raise ConfigError(f"predict_many {paths}: expected a list of paths; `predict` takes one")
        if on_bad_image not in ("fail", "skip"):
            raise ConfigError(f"on_bad_image {on_bad_image}: expected fail or skip")
        self.check_masks("masks", masks)

        def tell(item: Item, error: KeyholeError) -> None:
            if left_out is not None:
                left_out(item.name, str(error))

        skip = tell if on_bad_image == "skip" else None
        items = _existing([_item(path) for path in paths], skip)
        if masks is not None:
            items = [replace(item, mask=masks_in(Path(masks)).find(item)) for item in items]
        for _, prediction in self.predict_items(items, left_out=skip):
            yield prediction

    def check_masks(self, argument: str, given: str | Path | None) -> None:
        """Raise ConfigError if masks are given to a model that does not use them."""
        rule = self.config.patch.foreground
        if given is None or (rule == "mask" and self.config.model.feature_width is None):
            return
        plain = self.config.model.feature_width is None
        why = f"was trained with patch.foreground {rule}" if plain else "takes stored features"
        raise ConfigError(
            f"{argument} {given}: the model {self.name!r} {why} and does not use masks. Leave `{argument}` out, or "
            "use a model that was trained with patch.foreground mask."
        )

    def predict_items(
        self,
        items: Sequence[Item],
        *,
        engine: Engine | None = None,
        images: ImageCache | None = None,
        left_out: Callable[[Item, KeyholeError], None] | None = None,
        on_chunk: Callable[[int], None] | None = None,
        description: str | None = "predicting",
        pictures: Callable[[Item, Prediction], bool] | None = None,
    ) -> Iterator[tuple[Item, Prediction]]:
        """Predict rows of a manifest, in their order.

        Args:
            items: Rows to predict.
            engine: Engine of the model with a plan; default is the predictor's own.
            images: Cache that opens the images.
            left_out: Called with each image that cannot be read and its error; default is to raise the error.
            on_chunk: Called with the number of patches after each chunk; may raise to stop.
            description: Text of the progress line; None shows no progress.
            pictures: Returns True for a prediction that gets pictures; default is none.

        Yields:
            Each image with its prediction.
        """
        size, width = self.config.train.batch, self.config.model.feature_width
        for item in items:
            if width is None and item.features is not None:
                raise ConfigError(
                    f"{item.name}: the model {self.name} is of images, not of stored features. Give the image itself."
                )
            if width is not None and item.features is None:
                raise ConfigError(
                    f"{item.name}: the model {self.name} is of stored features of {width} numbers, not of images. Give "
                    "their .h5 or .pt file, as `keyhole embed` writes it with the encoder of the training data."
                )
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        shown = nullcontext() if description is None else Progress(len(items), description)
        with self._lent() if engine is None else nullcontext(engine) as engine, shown as progress:
            reader, images = engine.reader, images or ImageCache()
            openers = [[opener(self.config, images, item) for item in each] for each in batches]
            above = {
                task.name: dict.fromkeys(task.thresholded, THRESHOLD)
                | {name: each.value for name, each in self.thresholds.get(task.name, {}).items()}
                for task in self.tasks
            }
            answers = Answers(
                engine, self.tasks, self.name, self.resolution, self._told, self.silent, self.whole_patches, above
            )
            answers.usual_patches = self.usual_patches
            waited = reader.waited

            def count(patches: int) -> None:
                nonlocal waited
                if on_chunk is not None:
                    on_chunk(patches)
                if progress is not None:
                    progress.update(patches=patches, waited=reader.waited - waited)
                waited = reader.waited

            stream = engine.infer(openers, "mask", keep_logits=True, on_chunk=count)
            for number, (each, done) in enumerate(zip(batches, stream, strict=True), start=1):
                if number == 1 < len(batches) and not engine.encoders.compiled:
                    self._compile(engine, done, len(batches) - 1)
                answers.warn_about_features(done)
                failed = dict(done.batch.failed)
                for row, reasons in done.batch.unreadable.items():
                    source = done.batch.sources[row]
                    assert source is not None
                    if error := damage(done.batch.names[row], source, reasons, self.config.unreadable):
                        failed[row] = error
                for row, error in sorted(failed.items()):
                    if left_out is None:
                        raise error
                    left_out(each[row], error)
                for row in done.bags.rows:
                    if row in failed:
                        continue
                    prediction = answers.prediction(done, each[row], row)
                    if pictures is not None and pictures(each[row], prediction):
                        prediction = answers.with_pictures(done, prediction, row)
                    yield each[row], prediction
                if progress is not None:
                    progress.update(images=len(each))
            answers.finish(len(items))

    @contextmanager
    def _lent(self) -> Iterator[Engine]:
        """Lend an engine that no other call uses at the same time; the first call plans the memory."""
        if self._free is None:
            self.engine.pace.options = PREDICTING_OPTIONS
            self.engine.plan = prediction_plan(self.engine.encoders, self.config)
            self._free = [self.engine]
        engine = self._free.pop() if self._free else self.engine.beside()
        try:
            with engine.limit():
                yield engine
        finally:
            engine.close()
            self._free.append(engine)

    def _compile(self, engine: Engine, done: Inference, batches: int) -> None:
        """Compile the encoder after the first batch if that saves time on the others, taken to be alike."""
        source = next((source for source in done.batch.sources if source is not None), None)
        expected = batches * sum(len(each) for each in done.batch.sources if each is not None)
        if source is not None and (choice := engine.choose_compile("auto", source.patch_shape, expected)).compile:
            say(f"encoder {engine.encoders.describe(choice, source.patch_shape)}")


def _warn(text: str) -> None:
    say(f"warning: {text}")


def _item(path: str | Path) -> Item:
    """A file given by its path alone."""
    return Item(str(path), Path(path).absolute(), {})


def _existing(
    items: Sequence[Item], left_out: Callable[[Item, KeyholeError], None] | None = None, in_memory: bool = False
) -> list[Item]:
    """Return the items whose files exist; raise ImageLost for others, or call `left_out` with each and its error.

    Reading them would try again for a while, as is right for a network share, but not for a misspelt path. Of images
    `in_memory` only the mask is a file.
    """
    there = []
    for item in items:
        files = (None if in_memory else item.source, item.mask)
        missing = next((file for file in files if file is not None and not exists(file)), None)
        if missing is None:
            there.append(item)
            continue
        error = ImageLost(missing, "no such file. Check the path.")
        if left_out is None:
            raise error
        left_out(item, error)
    return there
