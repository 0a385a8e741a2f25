"""`keyhole predict`: labels of images, and what they rest on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from keyhole.cli.arguments import check_device, parse, print_options
from keyhole.config import Bits
from keyhole.errors import ConfigError, DataError

if TYPE_CHECKING:
    from keyhole.prediction import Prediction


@dataclass(frozen=True)
class PredictOptions:
    """Labels of images by a run's best model, the patches they rest on, and the score of every patch.

    Writes predictions.csv with one row per image, and a folder per image: prediction.json, kept.csv, scores.csv,
    scores.npz, and kept.geojson, which QuPath opens.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of `keyhole train`, or the folder of a model."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = ()
    """Image files, or folders of them."""
    out: Path | None = None
    """Folder to write to; created if it is not there."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    masks: Path | None = None
    """Folder of masks by the images' names, for a model of `patch.foreground mask`."""
    bits: Bits | None = None
    """Bits in use of 16-bit images that do not state them; default is what the model learned with."""
    memory: str = "auto"
    """Budget such as `5GB`, of the device or, on CPU, of the process; `auto` is what is free."""
    unreadable: str = "1%"
    """Share of an image's patches that may be unreadable."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What an unreadable image does: end the prediction, or be left out, counted and listed."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print these options as they result, as YAML, and end."""


def run(argv: list[str]) -> int:
    options = parse(PredictOptions, argv, "keyhole predict")
    check_device(options.device)
    if options.print_config:
        return print_options(options)
    if not options.images:
        raise ConfigError("no images given: keyhole predict RUN IMAGES... --out DIR")
    if options.out is None:
        raise ConfigError("--out is missing: keyhole predict RUN IMAGES... --out DIR, a folder for the results")

    from keyhole.data.manifest import expand_images

    images, others = expand_images(options.images, options.on_bad_image)
    skipped = {other.name: other.reason for other in others}

    from keyhole.data.manifest import write_left_out
    from keyhole.files import writable_folder
    from keyhole.predict import load
    from keyhole.prediction import write_prediction, write_table

    predictor = load(options.run, options.device, options.memory, options.unreadable)
    if options.bits is not None:
        predictor.config = replace(predictor.config, patch=replace(predictor.config.patch, bits=options.bits))
    out = writable_folder(options.out)
    folders = _folder_names(images)

    def predictions() -> Iterator[Prediction]:
        """Written and shown as they come; none is held, since each has the score of every patch."""
        done = 0
        for prediction in predictor.predict_many(images, options.on_bad_image, skipped.__setitem__, options.masks):
            write_prediction(prediction, out / folders[prediction.image])
            with contextlib.suppress(OSError):  # whoever read the lines may have gone; the files are still wanted
                print(_line(prediction), flush=True)
            done += 1
            yield prediction
        write_left_out(out / "left_out.csv", skipped.items())
        for name, reason in skipped.items():
            print(f"left out: {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)
        if not done:
            raise DataError(f"none of the {len(images)} images can be predicted; see {out / 'left_out.csv'}")

    write_table(predictions(), out / "predictions.csv")
    print(f"predicted: {len(images) + len(others) - len(skipped)}, left out: {len(skipped)}; in {out}")
    return 0


def _folder_names(images: Sequence[Path]) -> dict[Path, str]:
    """The file's name, with a mark of its place where another image has the same name."""
    taken = Counter(image.name.lower() for image in images)
    return {
        image: image.name
        if taken[image.name.lower()] == 1
        else f"{image.name}-{hashlib.sha256(os.fsencode(image)).hexdigest()[:8]}"
        for image in images
    }


def _line(prediction: Prediction) -> str:
    """`slides/a.svs  tumour 0.97`, one entry per task where there are several."""
    answers = []
    for task, label in prediction.label.items():
        probability = prediction.probability[task]
        share = f" {probability[label]:.3f}" if label in probability else ""
        answers.append((f"{task} " if len(prediction.label) > 1 else "") + (label or "(none)") + share)
    return f"{prediction.name}  {', '.join(answers)}"
