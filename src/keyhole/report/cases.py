"""The best, the worst and the most uncertain predictions of an evaluation, drawn while they are predicted.

Only these carry pictures, and each is kept as a few small JPEG files, so that memory does not grow with the images.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image as Picture

from keyhole.data.item import Item
from keyhole.report.captions import TIED
from keyhole.report.drawing import as_picture, percent
from keyhole.report.overlay import panel
from keyhole.report.prediction import Prediction
from keyhole.report.score_layer import ScoreScale
from keyhole.tasks.kinds import Task

MAX_TASKS = 12
"""Tasks with cases; of more, the first."""
SIDE = 400
"""Longer side of a picture in pixels."""
PATCHES, PATCH_SIDE = 9, 96
QUALITY = 82


class CasePatch(NamedTuple):
    """A kept patch of a case: its pixels as JPEG, and its share of the attention."""

    picture: bytes
    attention: str


@dataclass(frozen=True)
class Case:
    """An image as the report shows it.

    Attributes:
        name: The image.
        order: Place among the predictions.
        truth, label: True label as written, and predicted label; "" where there is none.
        right: Whether the label is right; None for an unknown one or a number.
        said: The largest probabilities, with their classes.
        image, map: JPEG of the image with the kept patches, and of the score of every patch; None without pictures.
        patches: The kept patches with the most attention.
        about: Size, patches, and what the brightest colour of the map means.
    """

    name: str
    order: int
    truth: str
    label: str
    right: bool | None
    said: tuple[tuple[str, str], ...]
    image: bytes | None
    map: bytes | None
    patches: tuple[CasePatch, ...]
    about: tuple[str, ...]


class CaseList(NamedTuple):
    """Cases under a heading, and the rule by which they were chosen."""

    title: str
    rule: str
    cases: list[Case]


@dataclass
class _Shelf:
    """The cases with the lowest values, at most `size`; of equal values the earlier one."""

    size: int
    keys: list[tuple[float, int]] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)

    def takes(self, value: float | None) -> bool:
        return value is not None and (len(self.keys) < self.size or value < self.keys[-1][0])

    def put(self, value: float, case: Case) -> None:
        place = bisect.bisect(self.keys, (value, case.order))
        self.keys.insert(place, (value, case.order))
        self.cases.insert(place, case)
        del self.keys[self.size :], self.cases[self.size :]


class Cases:
    """Collects the cases of every task from predictions, each of which is offered once, in their order."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks[:MAX_TASKS])
        self.count = {1: 4, 2: 3, 3: 2, 4: 2}.get(len(tasks), 1)
        # An image is shown once, so that the uncertain ones may be among those shown already.
        sizes = {"worst": self.count, "best": self.count, "uncertain": 3 * self.count}
        self._shelves = {task: {name: _Shelf(size) for name, size in sizes.items()} for task in self.tasks}
        self._labelled = dict.fromkeys(self.tasks, 0)
        self._offered = 0

    def wants(self, item: Item, prediction: Prediction) -> bool:
        """Return whether `add` would keep this prediction, which then needs pictures."""
        return any(next(self._places(task, item, prediction), None) is not None for task in self.tasks)

    def add(self, item: Item, prediction: Prediction) -> None:
        """Draw and keep a prediction if it is among the cases so far."""
        for task in self.tasks:
            places = list(self._places(task, item, prediction))
            if places:
                case = draw_case(task, item, prediction, self._offered)
                for shelf, value in places:
                    shelf.put(value, case)
            self._labelled[task] += bool(item.labels.get(task.name))
        self._offered += 1

    def _places(self, task: Task, item: Item, prediction: Prediction) -> Iterator[tuple[_Shelf, float]]:
        probability = np.array(list(prediction.probability[task.name].values()))
        credit = task.credit(task.encode(item.labels.get(task.name, "")), probability)
        values = {
            "worst": credit,
            "best": None if credit is None else -credit,
            "uncertain": task.certainty(probability),
        }
        for name, value in values.items():
            shelf = self._shelves[task][name]
            if value is not None and shelf.takes(value):
                yield shelf, value

    def of(self, task: Task) -> list[CaseList]:
        """Return the cases of a task, each image once: the worst, the most uncertain, the best."""
        if task not in self._shelves:
            return []
        shelves, shown = self._shelves[task], set[int]()
        share = -(-self._labelled[task] // 3)  # a third each of few images

        def pick(name: str, most: int) -> list[Case]:
            found = [case for case in shelves[name].cases if case.order not in shown][:most]
            shown.update(case.order for case in found)
            return found

        few = min(self.count, share)
        worst, best, uncertain = pick("worst", few), pick("best", few), pick("uncertain", self.count)
        fit = "probability of the true class" if task.exclusive else "probability of the true labels, on average"
        lists = [
            CaseList("Worst cases", f"The lowest {fit}." if task.classes else "The largest errors.", worst),
            CaseList("Most uncertain cases", "The closest to another decision, right or wrong.", uncertain),
            CaseList("Best cases", f"The highest {fit}." if task.classes else "The smallest errors.", best),
        ]
        return [each for each in lists if each.cases]


def draw_case(task: Task, item: Item, prediction: Prediction, order: int) -> Case:
    """Return a prediction as the report shows it; without pictures if it carries none."""
    label, truth = prediction.label[task.name], item.labels.get(task.name, "").strip()
    said = prediction.probability[task.name]
    classes = sorted(task.classes, key=lambda name: -said[name])[:3]
    scores, pictures, m = prediction.scores, prediction.pictures, len(prediction.kept)
    n = "" if scores is None else f" of {len(scores):,}"
    patches_kept = f"kept {m:,}{n} {'patch' if (m if scores is None else len(scores)) == 1 else 'patches'}"
    about = [f"{prediction.size.width:,} x {prediction.size.height:,} pixels", patches_kept]
    image = layer = None
    patches: list[CasePatch] = []
    if pictures is not None:
        attention = prediction.kept.attention[task.name]
        if not pictures.of_scores:
            image = _jpeg(panel(prediction, task, SIDE, layer=False))
        if scores is not None:
            layer = _jpeg(panel(prediction, task, SIDE))
            about += [TIED] if scores.tied(prediction.kept.index) else []
            about.append(f"colours up to {ScoreScale.of(scores.per_task[task.name]).top:,.3g} times 1/N")
        for carried in np.argsort(-attention[pictures.place], kind="stable")[:PATCHES]:
            patch = as_picture(pictures.patches[carried]).resize((PATCH_SIDE, PATCH_SIDE), Picture.Resampling.BICUBIC)
            patches.append(CasePatch(_jpeg(patch), percent(float(attention[pictures.place[carried]]))))
        about += [pictures.note] if pictures.note else []
    return Case(
        item.name,
        order,
        truth,
        label,
        task.is_right(truth, label),
        tuple((name, percent(said[name])) for name in classes),
        image,
        layer,
        tuple(patches),
        tuple(about),
    )


def _jpeg(picture: Picture.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=QUALITY, optimize=True)
    return out.getvalue()
