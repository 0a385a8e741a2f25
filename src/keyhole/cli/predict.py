"""`keyhole predict`: labels of images, and what they rest on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from keyhole.cli.options import Options, print_options, read
from keyhole.config.inference import InferenceSettings
from keyhole.config.settings import Bits, Fraction, Number, Positive, Switch
from keyhole.errors import ConfigError, DataError
from keyhole.util.wording import listed

if TYPE_CHECKING:
    from keyhole.data.item import Item
    from keyhole.errors import KeyholeError
    from keyhole.report.prediction import Prediction
    from keyhole.report.table import TableRow


class PredictOptions(Options, InferenceSettings):
    """Labels of images by a run's best model, the patches they rest on, and the score of every patch.

    Writes predictions.csv with one row per image, and a folder per image, named in its row: prediction.json,
    kept.csv, scores.csv, scores.npz, and kept.geojson, which QuPath opens; on request pictures and tiles.geojson.
    """

    EXAMPLES: ClassVar = (
        "keyhole predict runs/one new/*.png --out answers",
        "keyhole predict runs/one new/*.png --out answers --overlay --save-patches 8 --tiles",
    )
    POSITIONAL: ClassVar = {"run": "RUN", "images": "IMAGES"}

    run: Path
    """Run folder of `keyhole train`, or the folder of a model."""
    images: tuple[Path, ...] = ()
    """Image files, folders of them, or CSVs with a column image and, where known, mpp, mask and features."""
    out: Path | None = None
    """Folder to write to; created if it is not there."""
    mpp: Number | None = None
    """Microns per pixel of the full resolution, where the files do not state it or state it wrongly: it replaces what
    they state, with a warning. A CSV says it per image."""
    masks: Path | None = None
    """Folder of masks by the images' names, for a model of `patch.foreground mask`."""
    threshold: Fraction | Literal["balanced", "sensitive"] | None = None
    """Probability above which the positive class of a binary task, or a label of a multilabel one, is predicted, 0.5 by
    default; or the rule that chooses it on the run's validation images: `balanced`, the largest sum of sensitivity and
    specificity, or `sensitive`, the highest that finds 95 % of the class."""
    bits: Bits | None = None
    """Bits in use of 16-bit images that do not state them; default is what the model learned with."""
    overlay: Switch = False
    """Also draw, per task, the image with the score of every patch and the kept patches outlined (overlay_TASK.png),
    and a contact sheet of the kept patches (kept_TASK.png)."""
    save_patches: Positive | None = None
    """Also write this number of kept patches, those with the highest scores, as the model saw them: patches/*.png."""
    tiles: Switch = False
    """Also write tiles.geojson, every patch as a tile with its score, which QuPath colours as a map."""


def run(argv: list[str]) -> int:
    options = read(PredictOptions, argv, "keyhole predict")
    if options.print_config:
        return print_options(options)
    if not options.images:
        raise ConfigError("no images given: keyhole predict RUN IMAGES... --out DIR")
    if options.out is None:
        raise ConfigError("--out is missing: keyhole predict RUN IMAGES... --out DIR, a folder for the results")

    from keyhole.data.unlabelled import new_images
    from keyhole.images.scale import given_scale

    mpp = None if options.mpp is None else given_scale(options.mpp)
    items, others = new_images(options.images, options.on_bad_image, mpp, options.masks)
    skipped = {other.name: other.reason for other in others}

    from keyhole.data.companions import unused_masks
    from keyhole.data.manifest import write_left_out  # torch only after the images have been found
    from keyhole.inference.predictor import load
    from keyhole.inference.thresholds import advice, threshold_lines
    from keyhole.report.table import AnswerFolder, write_table
    from keyhole.runs.run import learned_nothing, unfinished

    nothing = learned_nothing(options.run)
    for said in (unfinished(options.run), nothing):
        if said:
            print(said, file=sys.stderr)
    predictor = load(
        options.run,
        options.device,
        options.memory,
        options.unreadable,
        options.decode,
        threshold=options.threshold,
    )
    predictor.check_masks("--masks", options.masks)
    for said in unused_masks(items, predictor.config.patch.foreground, trained=True):
        print(f"note: {said}", file=sys.stderr)
    for said in threshold_lines(predictor.tasks, predictor.thresholds):
        print(said, file=sys.stderr)
    if options.threshold is None and not nothing and (said := advice(options.run, predictor.tasks)):
        print(f"note: {said}", file=sys.stderr)
    if options.bits is not None:
        predictor.config = predictor.config.replace(patch={"bits": options.bits})
    predictor.whole_patches = options.save_patches or 0
    drawn = options.overlay or options.save_patches is not None
    images = [item.image for item in items]
    answers = AnswerFolder(options.out, images, overlay=options.overlay, tiles=options.tiles)
    if answers.replaced:
        print(f"{options.out}: replaces earlier answers for {answers.replaced} of these images", file=sys.stderr)

    done = 0

    def tell(item: Item, error: KeyholeError) -> None:
        skipped[item.name] = str(error)

    def rows() -> Iterator[TableRow]:
        """Write and show predictions one by one; none is kept, since each has the score of every patch."""
        nonlocal done
        without = []
        skip = tell if options.on_bad_image == "skip" else None
        for _, prediction in predictor.predict_items(items, left_out=skip, pictures=lambda *_: drawn):
            row = answers.write(prediction)
            with contextlib.suppress(OSError):  # a closed pipe does not stop the files
                print(_line(prediction), flush=True)
            done += 1
            if options.save_patches and (prediction.pictures is None or not len(prediction.pictures.whole)):
                without.append(prediction.name)
            yield row
        write_left_out(answers.out / "left_out.csv", skipped.items())
        for name, reason in skipped.items():
            print(f"left out: {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)
        if without:
            print(f"no patches saved, since there are no pixels of: {listed(without)}", file=sys.stderr)
        if not done:
            raise DataError(f"none of the {len(items)} images can be predicted; see {answers.out / 'left_out.csv'}")

    write_table(rows(), answers.out / "predictions.csv")
    answers.finish()
    print(f"predicted: {done}, left out: {len(skipped)}; in {answers.out}")
    return 0


def _line(prediction: Prediction) -> str:
    """Return `slides/a.svs  tumour 0.970`, with one entry per task."""
    answers = []
    for task, label in prediction.label.items():
        probability = prediction.probability[task]
        share = f" {probability[label]:.3f}" if label in probability else ""
        if label in probability and label != max(probability, key=lambda name: probability[name]):
            share += "".join(f" ({name} above {limit:.3g})" for name, limit in prediction.threshold[task].items())
        answers.append((f"{task} " if len(prediction.label) > 1 else "") + (label or "(none)") + share)
    return f"{prediction.name}  {', '.join(answers)}"
