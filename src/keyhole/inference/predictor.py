"""A trained model at work: from an image file to a `Prediction`.

    predictor = keyhole.load("runs/one")
    prediction = predictor.predict("slide.svs")

Everything in a prediction comes from its one selection pass: the score map is what the selection computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import PIL.Image
import torch
from numpy.typing import NDArray

from keyhole.config.amounts import Bytes
from keyhole.config.settings import Config, Decode
from keyhole.data.companions import mask_of
from keyhole.data.item import Item
from keyhole.data.resolution import NOT_KNOWN, Resolution
from keyhole.engine import Engine, Inference
from keyhole.engine.device import choose_device, choose_precision
from keyhole.engine.memory.pace import prediction_plan
from keyhole.engine.memory.plan import PREDICTING_OPTIONS
from keyhole.engine.opening import opener
from keyhole.errors import ConfigError, ImageLost, KeyholeError, RunError
from keyhole.images.pillow import image_in_memory
from keyhole.images.scale import given_scale
from keyhole.inference.answer import make_prediction, with_pictures
from keyhole.loading.unreadable import Ledger
from keyhole.nn import IPSClassifier, build_classifier
from keyhole.nn.build import patch_shape
from keyhole.patches.features import FeaturePatches, learned_origin
from keyhole.patches.image_cache import ImageCache
from keyhole.patches.sources import PatchSource
from keyhole.report.prediction import Prediction
from keyhole.runs.checkpoint import load_weights, model_file, read_tensors
from keyhole.tasks.kinds import Task
from keyhole.util.progress import Progress, say
from keyhole.util.version import VERSION

SECTIONS = ("patch", "model", "select")
"""Sections of the configuration that a model carries with it."""


def describe(config: Config, tasks: Sequence[Task], **about: Any) -> dict[str, Any]:
    """What has to be known of a model beside its weights; goes into model.json."""
    plain: dict[str, Any] = {name: getattr(config, name).model_dump() for name in SECTIONS}
    # the weights are in the file, so nothing is to be downloaded or read from elsewhere
    plain["model"] |= {"pretrained": False, "weights": None}
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
    run: str | Path,
    device: str = "auto",
    memory: str | Bytes | None = "auto",
    unreadable: str | float = "1%",
    decode: Decode = "auto",
) -> Predictor:
    """The best model of a run, or a model copied out of one.

    Args:
        run: a run folder, or a folder with model.safetensors.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        memory: budget such as `5GB`, of the device or, on CPU, of the process; `auto` is what is free.
        unreadable: share of an image's patches that may be unreadable, such as `1%`.
        decode: `auto` lets a GPU decode JPEG tiles of slides too, `cpu` does not; see `RunConfig.decode`.

    Raises:
        RunError: there is no model, or it is damaged.
        ConfigError: a device, budget or share that is none.
    """
    return Predictor.open(run, device, memory, unreadable, decode)


class Predictor:
    """Predicts images with one model.

    Args:
        model: on its device.
        config: with the model's patch, model and select sections.
        tasks: what it predicts, in the order of its queries.
        name: what predictions call it.
        resolution: at which it learned, where that is known.
        engine: of the model; default is one that computes in the model's precision.
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
        self._free: list[Engine] | None = None  # engines that no call uses; None before the first call
        self.tells_doubts = True  # about features and resolution; off where they have been told
        self._told: set[str] = set()

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str = "auto",
        memory: str | Bytes | None = "auto",
        unreadable: str | float = "1%",
        decode: Decode = "auto",
        engine: Engine | None = None,
    ) -> Predictor:
        """See `load`. The weights may be loaded into the model of an `engine` of the same settings."""
        path = Path(path)
        asked = Config(memory=memory, unreadable=unreadable)
        if decode not in get_args(Decode):
            raise ConfigError(f"decode {decode}: expected {' or '.join(get_args(Decode))}")
        file = model_file(path)
        weights, info = read_tensors(file)
        chosen = choose_device(device, option="--device")
        try:
            tasks = [Task.from_json(task) for task in info["tasks"]]
            given = {name: info[name] for name in SECTIONS} | {"train": {"batch": info["batch"]}}
            config = asked.replace(run={"decode": decode}, **given)
            name, precision = str(info["name"]), str(info["precision"])
            resolution = Resolution.from_json(info.get("resolution"))
        except (KeyError, TypeError, ConfigError, RunError) as error:
            raise RunError(
                f"{file}: its description does not fit keyhole {VERSION} ({error}). Was it made by another version?"
            ) from error
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
        return cls(engine.model, config, tasks, name, resolution, engine)

    def predict(
        self,
        image: str | Path | NDArray[Any] | PIL.Image.Image,
        mpp: float | None = None,
        mask: str | Path | None = None,
        pictures: bool = True,
    ) -> Prediction:
        """Label, probabilities, kept patches and the score of every patch of one image.

        Args:
            image: an image or slide file; for a model of stored features a file of these. Or pixels in memory: uint8
                (h, w, 3), (h, w, 1) or (h, w), or a picture of Pillow.
            mpp: microns per level-0 pixel, 0.02 ... 100, where the file does not say or is wrong.
            mask: PNG or GeoJSON of the foreground, for a model of `patch.foreground mask`.
            pictures: whether the prediction carries a small picture of the image and of its kept patches.

        Raises:
            ImageError: the file cannot be read, or the pixels are of another kind.
            TooMuchUnreadable: more of its patches than `Config.unreadable` allows.
            ConfigError: it is smaller than a patch or does not have the resolution that the model needs; or `mpp` is
                not a possible one.
        """
        known = None if mpp is None else given_scale(mpp)
        store = None
        if isinstance(image, str | Path):
            item = _item(image)
            if not item.source.exists():  # the reader would wait for a share that may come back
                raise ImageLost(item.source, "no such file. Check the path.")
        else:
            picture = image_in_memory(image)
            store, item = ImageCache(image=picture), Item(str(picture.path), picture.path, {})
        item = replace(item, mpp=known, mask=None if mask is None else Path(mask).absolute())
        wanted = (lambda _item, _prediction: True) if pictures else None
        return next(
            prediction for _, prediction in self.predict_items([item], store=store, quiet=True, pictures=wanted)
        )

    def predict_many(
        self,
        paths: Sequence[str | Path],
        on_bad_image: Literal["fail", "skip"] = "fail",
        left_out: Callable[[str, str], None] | None = None,
        masks: str | Path | None = None,
    ) -> Iterator[Prediction]:
        """Predictions in the order of the paths.

        Args:
            paths: image files, or files of stored features.
            on_bad_image: "fail" raises at the first that cannot be read, "skip" goes on without it. An image may have
                a few unreadable patches (`Config.unreadable`); they are in `Prediction.unreadable`.
            left_out: told the name and the reason of each image skipped.
            masks: folder of masks by the images' names, for a model of `patch.foreground mask`.

        Raises:
            ImageError, ConfigError, TooMuchUnreadable: as `predict`, where `on_bad_image` is "fail".
        """
        items = [_item(path) for path in paths]
        if masks is not None:
            items = [replace(item, mask=mask_of(Path(masks), item)) for item in items]

        def tell(item: Item, error: KeyholeError) -> None:
            if left_out is not None:
                left_out(item.name, str(error))

        for _, prediction in self.predict_items(items, on_bad_image=on_bad_image, left_out=tell):
            yield prediction

    def predict_items(
        self,
        items: Sequence[Item],
        *,
        engine: Engine | None = None,
        store: ImageCache | None = None,
        on_bad_image: Literal["fail", "skip"] = "fail",
        left_out: Callable[[Item, KeyholeError], None] | None = None,
        on_chunk: Callable[[int], None] | None = None,
        description: str = "predicting",
        quiet: bool = False,
        pictures: Callable[[Item, Prediction], bool] | None = None,
    ) -> Iterator[tuple[Item, Prediction]]:
        """As `predict_many`, for rows of a manifest.

        Args:
            items: what to predict.
            engine: of the model, planned by the caller; default is the predictor's own.
            store: where images are opened.
            on_bad_image: as in `predict_many`.
            left_out: told each image skipped, with the error.
            on_chunk: called after each chunk; may raise to stop.
            description: for the progress line.
            quiet: show no progress.
            pictures: asked of each prediction whether it is to carry pictures; default none does.
        """
        self._check_kind(items)
        with self._lent() if engine is None else nullcontext(engine) as engine:
            reader, store = engine.reader, store or ImageCache()
            size = self.config.train.batch
            batches = [items[start : start + size] for start in range(0, len(items), size)]
            openers = [[opener(self.config, store, item) for item in each] for each in batches]
            doubtful = 0
            progress, waited = None if quiet else Progress(len(items), description), reader.waited

            def chunk(patches: int) -> None:
                nonlocal waited
                if on_chunk is not None:
                    on_chunk(patches)
                if progress is not None:
                    progress.update(patches=patches, waited=reader.waited - waited)
                waited = reader.waited

            try:
                if progress is not None:
                    progress.__enter__()
                stream = engine.infer(openers, "mask", keep_logits=True, on_chunk=chunk)
                for number, (each, done) in enumerate(zip(batches, stream, strict=True), start=1):
                    if number == 1:
                        self._compile(engine, done, len(batches) - 1)
                    self._tell_doubts(done)
                    failed = dict(done.batch.failed) | self._too_damaged(done)
                    for row, error in sorted(failed.items()):
                        if on_bad_image == "fail":
                            raise error
                        if left_out is not None:
                            left_out(each[row], error)
                    for place, row in enumerate(done.bags.rows):
                        if row in failed:
                            continue
                        said = make_prediction(self.model, self.tasks, self.name, each[row], done, place, row, reader)
                        doubt = self._resolution_doubt(said)
                        open_questions = self._feature_doubts(done.batch.sources[row])
                        said = replace(said, notes=(*open_questions, *filter(None, [doubt])))
                        if doubt:
                            doubtful += 1
                            if self.tells_doubts and doubtful == 1:
                                say(f"warning: {said.name}: {doubt}")
                        if pictures is not None and pictures(each[row], said):
                            said = with_pictures(said, done, row, reader)
                        yield each[row], said
                    if progress is not None:
                        progress.update(images=len(each))
                if self.tells_doubts and doubtful > 1:
                    told = f"{doubtful} of {len(items)} images have another resolution than the model learned at"
                    say(f"warning: {told} ({self.resolution} um per pixel), or none")
            finally:
                if progress is not None:
                    progress.__exit__(*sys.exc_info())  # after an error no line says that all is done

    @contextmanager
    def _lent(self) -> Iterator[Engine]:
        """An engine that no other call uses. A model is measured once, and only where that matters."""
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
        """Compiles the encoder after the first batch where that pays back over the others, if they are like it."""
        source = next((source for source in done.batch.sources if source is not None), None)
        if not batches or source is None or engine.encoders.compiled:
            return
        expected = batches * sum(len(each) for each in done.batch.sources if each is not None)
        choice = engine.choose_compile("auto", source.patch_shape, expected)
        if choice.compile:
            say(f"encoder {engine.encoders.describe(choice, source.patch_shape)}")

    def _resolution_doubt(self, prediction: Prediction) -> str:
        """A sentence where an image has another resolution than the model learned at; files of features may not say."""
        mpp = prediction.patch["mpp"]
        return "" if mpp is None and "features" in prediction.patch else self.resolution.doubt(mpp)

    def _feature_doubts(self, source: PatchSource | None) -> list[str]:
        """What stored features leave open; nothing of images."""
        return source.doubts(learned_origin(self.config.model)) if isinstance(source, FeaturePatches) else []

    def _tell_doubts(self, done: Inference) -> None:
        """Says once what stored features leave open, such as which encoder made them."""
        for source in done.batch.sources:
            for text in self._feature_doubts(source):
                if source is not None and self.tells_doubts and text not in self._told:
                    self._told.add(text)
                    say(f"warning: {source.name}: {text}")

    def _check_kind(self, items: Sequence[Item]) -> None:
        """A model is of images or of stored features, and says nothing of the others."""
        width = self.config.model.feature_width
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

    def _too_damaged(self, done: Inference) -> dict[int, KeyholeError]:
        """The images of which more patches are unreadable than one may do without."""
        found: dict[int, KeyholeError] = {}
        for row, reasons in done.batch.unreadable.items():
            source = done.batch.sources[row]
            assert source is not None
            ledger = Ledger(len(source), self.config.unreadable)
            index = list(reasons)
            ledger.add(done.batch.names[row], source.boxes(index), index, list(reasons.values()))
            try:
                ledger.check()
            except KeyholeError as error:
                found[row] = error
        return found


def _warn(text: str) -> None:
    say(f"warning: {text}")


def _item(path: str | Path) -> Item:
    """A file given by its path alone."""
    return Item(str(path), Path(path).absolute(), {})
