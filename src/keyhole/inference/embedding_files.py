"""Write the embeddings of each image to a file of features, together with their settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from torch import nn

from keyhole.config.settings import Config
from keyhole.data.item import Item
from keyhole.engine import Engine
from keyhole.engine.embedding import Embedding, End, Rows
from keyhole.engine.opening import opener
from keyhole.errors import KeyholeError
from keyhole.inference.answer import damage
from keyhole.nn.weights import weights_digest
from keyhole.patches.features.writer import BYTES, SETTINGS, feature_writer
from keyhole.patches.image_cache import ImageCache
from keyhole.patches.sources import FilePatches
from keyhole.util.files import file_size, writable_folder
from keyhole.util.progress import Progress


@dataclass(frozen=True)
class EmbeddingFiles:
    """Embeds images and writes their files, with `settings` from `settings_of`."""

    config: Config
    engine: Engine
    dtype: str
    settings: Mapping[str, Any]
    progress: Progress | None

    def embed_all(self, items: Sequence[Item], files: Mapping[str, Path]) -> Iterator[tuple[Item, int | KeyholeError]]:
        """Yield each image with the number of its unreadable patches, or the error for which it has no features."""
        with closing(self.engine):
            reader, embed = self.engine.reader, Embedding(self.engine)
            # A cache keeps the masks of its images, so each image has its own.
            openers = [opener(self.config, ImageCache(), item) for item in items]
            waited = reader.waited
            for number, told in groupby(embed(openers), key=lambda each: each.number):
                item = items[number]
                try:
                    found: int | KeyholeError = self._embed(item, told, files[item.name])
                except _Left as left:
                    found = left.error
                if self.progress is not None:
                    self.progress.update(images=1, waited=reader.waited - waited)
                    waited = reader.waited
                yield item, found

    def _embed(self, item: Item, told: Iterator[Rows | End], path: Path) -> int:
        """Write the file; return the number of patches that are not in it."""
        first = next(told)
        if isinstance(first, End):
            assert first.failed is not None, "an image without patches is not opened"
            raise _Left(first.failed)
        writable_folder(path.parent)
        with feature_writer(path, self.dtype) as writer:
            for each in chain([first], told):
                if isinstance(each, Rows):
                    writer.add(each.embedding(), each.source.grid.boxes(each.index)[:, :2], item.name)
                    if self.progress is not None:
                        self.progress.update(patches=len(each.index))
                    continue
                if each.failed is not None:
                    raise _Left(each.failed)
                assert isinstance(each.source, FilePatches)
                if error := damage(item.name, each.source, each.unreadable, self.config.unreadable):
                    raise _Left(error)
                about = {
                    "encoder": self.config.model.encoder,
                    "weights_sha256": self.settings["weights"],
                    BYTES: image_bytes(item),
                    SETTINGS: json.dumps({**self.settings, **own_settings(item)}),
                    "unreadable": len(each.unreadable),
                }
                writer.describe(each.source, about)
                return len(each.unreadable)
        raise AssertionError("an image has an end")


class _Left(Exception):  # noqa: N818 - ends the writing of one file, and goes no further
    def __init__(self, error: KeyholeError) -> None:
        super().__init__(str(error))
        self.error = error


def settings_of(config: Config, encoder: nn.Module, dtype: str, precision: str) -> dict[str, Any]:
    """Return all settings that features depend on, besides the image."""
    model, patch = config.model, config.patch
    return {
        "encoder": model.encoder,
        "weights": weights_digest(encoder.state_dict()),
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
        "precision": precision,
    }


def unfinished_files(files: Sequence[Path]) -> tuple[Path, ...]:
    """Return unfinished copies of these files, which killed processes left."""
    known = {f".{file.name}" for file in files}
    folders = sorted({file.parent for file in files if file.parent.is_dir()})
    return tuple(left for folder in folders for left in sorted(folder.glob(".*.h5.????????")) if left.stem in known)


def own_settings(item: Item) -> dict[str, Any]:
    return {"image mpp": item.mpp, "mask": None if item.mask is None else item.mask.name}


def image_bytes(item: Item) -> int:
    """Return the size of the image file; 0 if it cannot be read, which opening the image reports."""
    try:
        return file_size(item.image)
    except OSError:
        return 0
