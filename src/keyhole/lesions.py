"""How much of what a prediction rests on lies in outlined lesions: prediction, regions -> shares -> means, a table.

A lesion is whatever the annotation outlines. Annotations are never seen in training; they judge where a model looked.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.bootstrap import Estimate, Weights, bootstrap
from keyhole.data.item import Item
from keyhole.errors import DataError
from keyhole.prediction import Prediction
from keyhole.regions import Region, covered, read_regions, touching

_BLOCK = 50_000
"""Patches whose boxes are held at once."""


@dataclass(frozen=True)
class LesionShare:
    """One image's prediction against its annotation.

    Attributes:
        regions: outlined; without any the shares say nothing of the model.
        attention: by task, the attention of each kept patch times the share of its area in lesions, summed: 1 where
            all attention lies wholly inside.
        kept: share of the kept patches that touch a lesion.
        looked_at: share of all patches that were looked at that touch one, which is what keeping at random would
            give; None where their scores were not kept.
    """

    regions: int
    attention: Mapping[str, float]
    kept: float
    looked_at: float | None


@dataclass(frozen=True)
class Lesions:
    """Means over the images with at least one outlined lesion.

    Attributes:
        images: how many these are.
        empty: names of images whose annotation outlines nothing; they do not count.
        left_out: by name, why an annotation could not be used; these images do not count here.
        attention: by task, mean of `LesionShare.attention`.
        kept: mean share of the kept patches that touch a lesion.
        looked_at: the same of all patches looked at.
    """

    images: int
    empty: tuple[str, ...]
    left_out: Mapping[str, str]
    attention: Mapping[str, Estimate]
    kept: Estimate
    looked_at: Estimate

    def to_json(self) -> dict[str, Any]:
        """A plain dict, without NaN."""
        return {
            "images": self.images,
            "without_region": list(self.empty),
            "left_out": dict(self.left_out),
            "attention_in_lesions": {task: asdict(estimate) for task, estimate in self.attention.items()},
            "kept_touching_a_lesion": asdict(self.kept),
            "looked_at_touching_a_lesion": asdict(self.looked_at),
        }

    def lines(self) -> list[str]:
        """The means with their intervals, and what does not count."""
        several = len(self.attention) > 1
        images = f"{self.images} annotated image{'' if self.images == 1 else 's'}"
        lines = [
            f"{f'{task} ' if several else ''}attention in lesions {estimate}, mean of {images}"
            for task, estimate in self.attention.items()
        ]
        lines.append(f"kept patches that touch a lesion {self.kept}; of all looked at {self.looked_at}")
        if self.empty:
            lines.append(f"{_counted(self.empty, 'outlines nothing', 'outline nothing')} count; see lesions.csv")
        if self.left_out:
            lines.append(f"{_counted(self.left_out, 'cannot be used', 'cannot be used')} count; see lesions.csv")
        return lines


def _counted(names: Sized, one: str, several: str) -> str:
    if len(names) == 1:
        return f"1 annotation {one} and does not"
    return f"{len(names)} annotations {several} and do not"


Judged = LesionShare | str
"""A share, or why there is none."""


def check_annotations(items: Iterable[Item]) -> None:
    """Raises DataError for the first annotation that cannot be read: before hours are spent on predicting."""
    for item in items:
        if item.annotation is not None:
            read_regions(item.annotation)


def judge(prediction: Prediction, annotation: Path, on_bad: Literal["fail", "skip"] = "fail") -> Judged:
    """The prediction's share in the regions of an annotation file, or why it is not known.

    Raises:
        DataError: the file cannot be read and `on_bad` is "fail".
    """
    if not prediction.kept.boxes[:, 2:].all():
        return "stored features without coordinates, so it is not known where on the slide they are from"
    try:
        return lesion_share(prediction, read_regions(annotation))
    except DataError as error:
        if on_bad == "fail":
            raise DataError(f"{error} Or leave such annotations out: --on-bad-image skip.") from error
        return str(error)


def lesion_share(prediction: Prediction, regions: Sequence[Region]) -> LesionShare:
    """Where the prediction looked, against the regions of the same image in level-0 pixels.

    The area of a patch is its whole box, also where it reaches over the border of the image.
    """
    kept, scores = prediction.kept, prediction.scores
    inside = covered(regions, kept.boxes)
    looked_at = None
    if scores is not None:
        blocks = (scores.index[start : start + _BLOCK] for start in range(0, len(scores), _BLOCK))
        looked_at = sum(int(touching(regions, scores.boxes(index)).sum()) for index in blocks) / len(scores)
    return LesionShare(
        regions=len(regions),
        attention={task: float(weights.astype(np.float64) @ inside) for task, weights in kept.attention.items()},
        kept=float(touching(regions, kept.boxes).mean()),
        looked_at=looked_at,
    )


def lesion_means(
    judged: Mapping[str, Judged], groups: Mapping[str, str | None], tasks: Sequence[str], seed: int = 0
) -> Lesions:
    """Means with 95 % bootstrap intervals over images, or groups where there are any.

    Args:
        judged: by image name.
        groups: of each image; drawn whole.
        tasks: of the model.
        seed: of the bootstrap.
    """
    used = {name: share for name, share in judged.items() if isinstance(share, LesionShare) and share.regions}
    columns: dict[tuple[str, str], NDArray[np.float64]] = {
        ("attention", task): np.array([share.attention[task] for share in used.values()]) for task in tasks
    }
    columns["kept", ""] = np.array([share.kept for share in used.values()])
    known = [share.looked_at for share in used.values() if share.looked_at is not None]
    if len(known) == len(used):
        columns["looked at", ""] = np.array(known)

    def means(weights: Weights) -> dict[tuple[str, str], Weights]:
        return {key: weights @ values / weights.sum(axis=1) for key, values in columns.items()}

    found = dict.fromkeys(columns, Estimate(None, note="no image has an annotated lesion"))
    if used:
        of = [groups.get(name) for name in used]
        found = bootstrap(means, len(used), of if any(of) else None, seed)
    return Lesions(
        images=len(used),
        empty=tuple(name for name, share in judged.items() if isinstance(share, LesionShare) and not share.regions),
        left_out={name: problem for name, problem in judged.items() if isinstance(problem, str)},
        attention={task: found["attention", task] for task in tasks},
        kept=found["kept", ""],
        looked_at=found.get(("looked at", ""), Estimate(None, note="the scores of the patches were not kept")),
    )


def lesion_table(judged: Mapping[str, Judged], tasks: Sequence[str]) -> str:
    """CSV with a row per annotated image: shares with six digits, or the problem in the last column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    attention = ["attention"] if len(tasks) == 1 else [f"attention {task}" for task in tasks]
    writer.writerow(["image", "regions", *attention, "kept_touching", "looked_at_touching", "problem"])
    for name, share in judged.items():
        if isinstance(share, str):
            writer.writerow([name, "", *("" for _ in tasks), "", "", share])
            continue
        values = [*(share.attention[task] for task in tasks), share.kept, share.looked_at]
        problem = "" if share.regions else "the annotation outlines nothing"
        writer.writerow([name, share.regions, *("" if v is None else f"{v:.6f}" for v in values), problem])
    return out.getvalue()
