"""Compare predictions with annotated regions: the shares of attention and of kept patches inside, their means, a table.

A region is what the annotation outlines or masks: a lesion, a traffic sign, a pothole. Annotations only judge the
attention; training never uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keyhole.errors import DataError
from keyhole.patches.foreground.annotations import Annotation, far_regions, read_annotation
from keyhole.report.prediction import Prediction, Scores
from keyhole.tasks.intervals import IntervalEstimate, Weights, bootstrap
from keyhole.util.files import csv_text
from keyhole.util.wording import counted

_BLOCK = 50_000
"""Number of patches compared at once."""
_BOUNDS = ("looked_at", "area", "most_attention", "most_kept")
"""Fields of `LesionShare` that need the scores of all patches."""
_OUTSIDE = "the regions lie outside of the image"
"""How the reason begins for an annotation of which nothing lies in the image."""


@dataclass(frozen=True)
class LesionShare:
    """Comparison of the prediction of an image with its annotation.

    Attributes:
        regions: Number of outlines, or of connected areas of a mask; without any, the shares have no meaning.
        attention: By task, the sum over kept patches of their attention times the share of their area in regions: 1 if
            all attention is inside.
        kept: Share of the kept patches that touch a region.
        looked_at: Share of all patches that touch one, the expected value of `kept` for a random choice. This and the
            fields below are None if the prediction has no scores.
        area: Share of the area of all patches in regions, the value of `attention` if it were uniform.
        most_attention: Maximum of `attention`: all of it on the patch with the largest share in regions.
        most_kept: Maximum of `kept`: fewer patches may touch a region than are kept.
    """

    regions: int
    attention: Mapping[str, float]
    kept: float
    looked_at: float | None = None
    area: float | None = None
    most_attention: float | None = None
    most_kept: float | None = None


@dataclass(frozen=True)
class Lesions:
    """Means over the images with at least one annotated region.

    Attributes:
        images: Number of these images.
        empty: Names of images whose annotation marks nothing; they do not count.
        left_out: By name, the reason why an annotation cannot be used; these images do not count.
        attention: By task, mean of `LesionShare.attention`.
        kept, looked_at, area, most_attention, most_kept: Means of those of `LesionShare`.
    """

    images: int
    empty: tuple[str, ...]
    left_out: Mapping[str, str]
    attention: Mapping[str, IntervalEstimate]
    kept: IntervalEstimate
    looked_at: IntervalEstimate
    area: IntervalEstimate
    most_attention: IntervalEstimate
    most_kept: IntervalEstimate

    @property
    def outside(self) -> tuple[str, ...]:
        """Names of the images outside of which their whole annotation lies; they are in `left_out`."""
        return tuple(name for name, reason in self.left_out.items() if reason.startswith(_OUTSIDE))

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "without_region": list(self.empty),
            "left_out": dict(self.left_out),
            "attention_in_lesions": {task: asdict(estimate) for task, estimate in self.attention.items()},
            "kept_touching_a_lesion": asdict(self.kept),
            "looked_at_touching_a_lesion": asdict(self.looked_at),
            "attention_in_lesions_by_chance": asdict(self.area),
            "attention_in_lesions_at_most": asdict(self.most_attention),
            "kept_touching_a_lesion_by_chance": asdict(self.looked_at),
            "kept_touching_a_lesion_at_most": asdict(self.most_kept),
        }

    def lines(self) -> list[str]:
        several = len(self.attention) > 1
        lines = [
            f"{f'{task} ' if several else ''}attention in annotated regions {estimate}; "
            f"{_bounds(self.area, self.most_attention)}; mean of {counted(self.images, 'annotated image')}"
            for task, estimate in self.attention.items()
        ]
        bounds = _bounds(self.looked_at, self.most_kept)
        lines.append(f"kept patches that touch an annotated region {self.kept}; {bounds}")
        if self.empty:
            said = "annotation marks nothing and does not", "annotations mark nothing and do not"
            lines.append(f"{counted(len(self.empty), *said)} count; see lesions.csv")
        if self.outside:
            said = (
                "annotation lies outside of its image and does not",
                "annotations lie outside of their images and do not",
            )
            lines.append(f"{counted(len(self.outside), *said)} count; see lesions.csv")
        if others := len(self.left_out) - len(self.outside):
            said = "annotation cannot be used and does not", "annotations cannot be used and do not"
            lines.append(f"{counted(others, *said)} count; see lesions.csv")
        return lines


def _bounds(chance: IntervalEstimate, most: IntervalEstimate) -> str:
    if chance.value is None or most.value is None:
        return f"by chance {chance}"
    return f"by chance {chance.value:.3f}, at most {most.value:.3f}"


Judged = LesionShare | str
"""A share, or the reason why there is none."""


def judge(prediction: Prediction, annotation: Path, on_bad: Literal["fail", "skip"] = "fail") -> Judged:
    """Compare a prediction with an annotation file; with "skip", a reason replaces the error of a damaged file.

    An annotation that lies outside of the image is left out with a reason in both cases: its shares would all be 0, as
    of a model that looks elsewhere.
    """
    if not prediction.kept.boxes[:, 2:].all():
        return "stored features without coordinates, so it is not known where on the slide they are from"
    try:
        marked = read_annotation(annotation, prediction.size, prediction.origin)
    except DataError as error:
        if on_bad == "fail":
            raise DataError(f"{error} Or leave such annotations out: --on-bad-image skip.") from error
        return str(error)
    # The size of a slide that is known from coordinates alone ends at its last patch; regions may lie beyond.
    where = far_regions(marked, prediction.size) if prediction.patch.get("size_known", True) else ""
    if where:
        size = f"{prediction.size.width:,} x {prediction.size.height:,} px"
        return f"{_OUTSIDE} ({size}), at {where}; are they in microns, or of another slide?"
    return lesion_share(prediction, marked)


def lesion_share(prediction: Prediction, marked: Annotation) -> LesionShare:
    """Compare a prediction with the annotation of the same image.

    The area of a patch is that of its whole box, including parts outside of the image.
    """
    kept = prediction.kept
    inside = marked.covered(kept.boxes)
    share = LesionShare(
        regions=len(marked),
        attention={task: float(weights.astype(np.float64) @ inside) for task, weights in kept.attention.items()},
        kept=float(marked.touching(kept.boxes).mean()),
    )
    if prediction.scores is None:
        return share
    touched, area, most = _of_all(prediction.scores, marked)
    n = len(prediction.scores)
    return replace(
        share, looked_at=touched / n, area=area, most_attention=most, most_kept=min(1.0, touched / len(kept))
    )


def _of_all(scores: Scores, marked: Annotation) -> tuple[int, float, float]:
    """Return the number of patches that touch a region, the share of all area inside, and the largest of a patch."""
    touched, inside, most = 0, 0.0, 0.0
    for start in range(0, len(scores), _BLOCK):
        boxes = scores.boxes(scores.index[start : start + _BLOCK])
        near = boxes[marked.touching(boxes)]
        touched += len(near)
        if len(near):
            shares = marked.covered(near)
            inside, most = inside + float(shares.sum()), max(most, float(shares.max()))
    return touched, inside / len(scores), most


def lesion_means(
    judged: Mapping[str, Judged], groups: Mapping[str, str | None], tasks: Sequence[str], seed: int = 0
) -> Lesions:
    """Return means with 95 % bootstrap intervals over images, or over groups if there are any."""
    used = {name: share for name, share in judged.items() if isinstance(share, LesionShare) and share.regions}
    columns: dict[tuple[str, str], NDArray[np.float64]] = {
        ("attention", task): np.array([share.attention[task] for share in used.values()]) for task in tasks
    }
    columns["kept", ""] = np.array([share.kept for share in used.values()])
    for name in _BOUNDS:
        known = [value for share in used.values() if (value := getattr(share, name)) is not None]
        if len(known) == len(used):
            columns[name, ""] = np.array(known)

    def means(weights: Weights) -> dict[tuple[str, str], Weights]:
        return {key: weights @ values / weights.sum(axis=1) for key, values in columns.items()}

    shares = any(isinstance(share, LesionShare) for share in judged.values())
    nothing = "no image has an annotated region" if shares or not judged else "no annotation can be used"
    found = dict.fromkeys(columns, IntervalEstimate(None, note=nothing))
    if used:
        of = [groups.get(name) for name in used]
        found = bootstrap(means, len(used), of if any(of) else None, seed)
    return Lesions(
        images=len(used),
        empty=tuple(name for name, share in judged.items() if isinstance(share, LesionShare) and not share.regions),
        left_out={name: problem for name, problem in judged.items() if isinstance(problem, str)},
        attention={task: found["attention", task] for task in tasks},
        kept=found["kept", ""],
        **{
            name: found.get((name, ""), IntervalEstimate(None, note="the scores of the patches were not kept"))
            for name in _BOUNDS
        },
    )


def lesion_table(judged: Mapping[str, Judged], tasks: Sequence[str]) -> str:
    """Return a CSV with a row per annotated image: shares with six digits, or the problem in the last column.

    `looked_at_touching` and `area_inside` are the values of `kept_touching` and `attention` by chance; `most_...` are
    the largest possible ones.
    """
    attention = ["attention"] if len(tasks) == 1 else [f"attention {task}" for task in tasks]
    shares = ["kept_touching", "looked_at_touching", "area_inside", "most_attention", "most_kept_touching"]
    rows: list[list[object]] = [["image", "regions", *attention, *shares, "problem"]]
    for name, share in judged.items():
        if isinstance(share, str):
            rows.append([name, "", *("" for _ in (*tasks, *shares)), share])
            continue
        values = [*(share.attention[task] for task in tasks), share.kept, *(getattr(share, name) for name in _BOUNDS)]
        problem = "" if share.regions else "the annotation marks nothing"
        rows.append([name, share.regions, *("" if v is None else f"{v:.6f}" for v in values), problem])
    return csv_text(rows)
