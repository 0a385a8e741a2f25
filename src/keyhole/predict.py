"""A trained model at work: from an image file to a `Prediction`.

    predictor = keyhole.load("runs/one")
    prediction = predictor.predict("slide.svs")

Everything in a prediction comes from its one selection pass: the score map is what the selection computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import keyhole
from keyhole.checkpoint import load_weights, read_tensors
from keyhole.config import Config
from keyhole.config_file import build
from keyhole.data.item import Item
from keyhole.device import choose_device, choose_precision
from keyhole.errors import ConfigError, KeyholeError, RunError
from keyhole.nn import IPSClassifier, build_classifier
from keyhole.nn.selection import Kept as KeptTensors
from keyhole.passes import Inference, infer, open_reader, opener
from keyhole.patches import FilePatches
from keyhole.prediction import Kept, Prediction, Scores, by_class
from keyhole.progress import Progress
from keyhole.reading import Reader
from keyhole.store import ImageStore
from keyhole.tasks import Task

SECTIONS = ("patch", "model", "select")
"""Sections of the configuration that a model carries with it."""


def describe(config: Config, tasks: Sequence[Task], **about: Any) -> dict[str, Any]:
    """What has to be known of a model beside its weights; goes into model.json."""
    plain: dict[str, Any] = {name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS}
    # the weights are in the file, so nothing is to be downloaded or read from elsewhere
    plain["model"] |= {"pretrained": False, "weights": None}
    return {
        "keyhole": keyhole.__version__,
        "name": config.out.name if config.out is not None else "model",
        "tasks": [task.to_json() for task in tasks],
        "precision": config.train.precision,
        "batch": config.train.batch,
        **plain,
        **about,
    }


def load(run: str | Path, device: str = "auto") -> Predictor:
    """The best model of a run, or a model copied out of one.

    Args:
        run: a run folder, or a folder with model.safetensors.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.

    Raises:
        RunError: there is no model, or it is damaged.
    """
    return Predictor.open(run, device)


class Predictor:
    """Predicts images with one model.

    Args:
        model: on its device.
        config: with the model's patch, model and select sections.
        tasks: what it predicts, in the order of its queries.
        name: what predictions call it.
    """

    def __init__(self, model: IPSClassifier, config: Config, tasks: Sequence[Task], name: str = "model") -> None:
        self.model, self.config, self.tasks, self.name = model.eval(), config, tuple(tasks), name
        self.device = next(model.parameters()).device

    @classmethod
    def open(cls, path: str | Path, device: str = "auto") -> Predictor:
        """See `load`."""
        path = Path(path)
        folder = path / "best" if (path / "best").is_dir() else path
        if not folder.is_dir() or not (folder / "model.safetensors").is_file():
            hint = "its first epoch is not finished" if (path / "last.safetensors").is_file() else "give a run folder"
            raise RunError(f"{path}: there is no model in it (no model.safetensors); {hint}")
        weights, info = read_tensors(folder / "model.safetensors")
        chosen = choose_device(device)
        try:
            tasks = [Task.from_json(task) for task in info["tasks"]]
            config = build(Config(), {name: info[name] for name in SECTIONS} | {"train": {"batch": info["batch"]}})
            precision = choose_precision(info["precision"], chosen)
            name = str(info["name"])
        except (KeyError, TypeError, ConfigError, RunError) as error:
            raise RunError(
                f"{folder}/model.safetensors: its description does not fit keyhole {keyhole.__version__} ({error}). "
                "Was it made by another version?"
            ) from error
        with torch.random.fork_rng(devices=[]):  # the fresh weights are replaced; a caller's random state is not ours
            model = build_classifier(config.model, tasks, config.patch.size, precision, pretrained=False)
        load_weights(model, weights, folder / "model.safetensors")
        return cls(model.to(chosen), config, tasks, name)

    def predict(self, path: str | Path, mpp: float | None = None) -> Prediction:
        """Label, probabilities, kept patches and the score of every patch of one image.

        Args:
            path: an image or slide file.
            mpp: microns per level-0 pixel, where the file does not say or is wrong.

        Raises:
            ImageError: the file cannot be read.
            ConfigError: it is smaller than a patch, or has not the resolution that the model needs.
        """
        item = Item(str(path), Path(path).absolute(), {}, mpp=mpp)
        return next(prediction for _, prediction in self.predict_items([item], quiet=True))

    def predict_many(
        self,
        paths: Sequence[str | Path],
        on_bad_image: Literal["fail", "skip"] = "fail",
        left_out: Callable[[str, str], None] | None = None,
    ) -> Iterator[Prediction]:
        """Predictions in the order of the paths.

        Args:
            paths: image files.
            on_bad_image: "fail" raises at the first that cannot be read, "skip" goes on without it.
            left_out: told the name and the reason of each image skipped.

        Raises:
            ImageError, ConfigError: as `predict`, where `on_bad_image` is "fail".
        """
        items = [Item(str(path), Path(path).absolute(), {}) for path in paths]

        def tell(item: Item, error: KeyholeError) -> None:
            if left_out is not None:
                left_out(item.name, str(error))

        for _, prediction in self.predict_items(items, on_bad_image=on_bad_image, left_out=tell):
            yield prediction

    def predict_items(
        self,
        items: Sequence[Item],
        *,
        reader: Reader | None = None,
        store: ImageStore | None = None,
        on_bad_image: Literal["fail", "skip"] = "fail",
        left_out: Callable[[Item, KeyholeError], None] | None = None,
        on_chunk: Callable[[int], None] | None = None,
        description: str = "predicting",
        quiet: bool = False,
    ) -> Iterator[tuple[Item, Prediction]]:
        """As `predict_many`, for rows of a manifest.

        Args:
            items: what to predict.
            reader: reading threads to use; default its own.
            store: where images are opened.
            on_bad_image: as in `predict_many`.
            left_out: told each image skipped, with the error.
            on_chunk: called after each chunk; may raise to stop.
            description: for the progress line.
            quiet: show no progress.
        """
        own = open_reader(self.config.run, self.device) if reader is None else None
        reader, store = reader or own, store or ImageStore(keep=False)
        assert reader is not None
        size = self.config.train.batch
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        openers = [[opener(self.config, store, item.image, item.name, item.mpp) for item in each] for each in batches]
        progress, waited = None if quiet else Progress(len(items), description), reader.waited

        def chunk(patches: int) -> None:
            nonlocal waited
            if on_chunk is not None:
                on_chunk(patches)
            if progress is not None:
                progress.update(patches=patches, waited=reader.waited - waited)
            waited = reader.waited

        on_error: Literal["raise", "skip"] = "raise" if on_bad_image == "fail" else "skip"
        try:
            if progress is not None:
                progress.__enter__()
            stream = infer(self.model, reader, openers, self.config.select, on_error, keep_logits=True, on_chunk=chunk)
            for each, done in zip(batches, stream, strict=True):
                for row, error in sorted(done.batch.failed.items()):
                    if left_out is not None:
                        left_out(each[row], error)
                for place, row in enumerate(done.bags.rows):
                    yield each[row], self._prediction(each[row], done, place, row)
                if progress is not None:
                    progress.update(images=len(each))
        finally:
            if progress is not None:
                progress.__exit__(None, None, None)
            if own is not None:
                own.close()

    def _prediction(self, item: Item, done: Inference, place: int, row: int) -> Prediction:
        kept, source = done.kept[row], done.batch.sources[row]
        assert kept is not None
        assert kept.logits is not None
        assert isinstance(source, FilePatches)
        index, grid = kept.index.cpu().numpy(), source.grid
        probability = {
            task.name: task.probability(done.logits[task.name][place].float().cpu().numpy()) for task in self.tasks
        }
        return Prediction(
            name=item.name,
            image=item.image,
            size=source.image.size,
            tasks=self.tasks,
            probability={task.name: by_class(task, probability[task.name]) for task in self.tasks},
            label={task.name: task.label(probability[task.name]) for task in self.tasks},
            kept=Kept(index, grid.boxes(index), kept.score.float().cpu().numpy(), self._attention(kept)),
            scores=self._scores(kept, source),
            patch={
                "size": grid.size,
                "stride": grid.stride,
                "level": grid.level,
                "mpp": source.image.mpp * grid.scale if source.image.mpp is not None else None,
                "scale": grid.scale,
            },
            model=self.name,
        )

    def _attention(self, kept: KeptTensors) -> dict[str, Any]:
        """Weight of each kept patch in the pooled embedding, per task: softmax over the kept, mean over heads."""
        assert kept.logits is not None
        weights = kept.logits[kept.index].softmax(dim=0).mean(dim=1).cpu().numpy()
        return {task.name: weights[:, self.model.queries[task.name]] for task in self.tasks}

    def _scores(self, kept: KeptTensors, source: FilePatches) -> Scores:
        """Every patch's share of the attention over all patches, per task: softmax over n, mean over heads."""
        assert kept.logits is not None
        score = kept.logits.softmax(dim=0).mean(dim=1)
        index = torch.arange(len(score)).numpy()
        grid = source.grid
        return Scores(
            rows=grid.rows,
            columns=grid.columns,
            index=index,
            cells=grid.cells(index),
            score=score.mean(dim=1).cpu().numpy(),
            per_task={task.name: score[:, self.model.queries[task.name]].cpu().numpy() for task in self.tasks},
            boxes=grid.boxes,
        )
